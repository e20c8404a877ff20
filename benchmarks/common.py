"""What every benchmark records beside its numbers: commit, hash of the code that made them, hardware."""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGE = ROOT / "src" / "scarceseg"

# What every trained network and its score depend on; messages, commands and reports are left out on purpose.
TRAINING = ("data/prepare.py", "data/sampling.py", "engine/loop.py", "seeds.py", "engine/statistics.py", "engine/step.py",
            "functional/sliding.py", "networks/vnet.py", "methods/supervised.py")  # fmt: skip
# Folders in which imports are followed from there and from the terms of a method.
INTERFACES = {"foundation/base.py"}
FOLLOWED = (
    "functional",
    "methods",
    "networks",
    "foundation",
    "atlas",
    "data/augment.py",
    "data/crop.py",
    "data/whole.py",
    "networks/ema.py",
)

# What clicks on tiny-sam3d do depends on: the weights are part of it.
CLICKS = (
    *(f"foundation/{name}.py" for name in ("clicks", "tiny_sam3d", "tiny_sam3d_net")),
    "foundation/weights_data/tiny_sam3d.safetensors",
    "benchmark",
    "pretrain/volumes.py",
)

# What the speed of inference, and of what stands beside the training step, depends on.
INFERENCE = ("functional/sliding.py", "inference/predictor.py", "networks/vnet.py", "data/prepare.py")
PIPELINE = {
    "loader": ("data/sampling.py", "data/augment.py", "data/crop.py"),
    "labels": ("foundation/tiny_sam.py", "foundation/tiny_sam3d_tuned.py", "foundation/tiny_sam3d_net.py"),
    "help": ("cli.py", "__init__.py"),
}


@cache
def training_code(method: str) -> tuple[str, ...]:
    """Files a run of a method depends on: the common ones, its terms, and what these import; weights in the package too."""
    from scarceseg.methods import METHODS, parse_method

    terms = [METHODS.get(name) for name in parse_method(method)]
    waiting = [*TRAINING, *(_file_of(kind.__module__) for kind in terms)]
    found: set[str] = set()
    for model in {name for kind in terms for labels in (1, 2) if (name := kind.usual_foundation({}, labels))}:
        file = model.replace("-", "_")
        waiting.append(f"foundation/{file}.py")
        found.add(f"foundation/weights_data/{file}.safetensors")
    while waiting:
        part = waiting.pop()
        if part not in found:
            found.add(part)
            waiting += [other for other in _imports(PACKAGE / part) if other.startswith(FOLLOWED)]
    return tuple(sorted(found - INTERFACES))


@cache
def step_code(method: str) -> tuple[str, ...]:
    """Files that the time of a training step depends on: those of a run but for what stands beside the step."""
    beside = (
        "data/prepare.py",
        "data/sampling.py",
        "data/augment.py",
        "data/crop.py",
        "engine/statistics.py",
        "functional/sliding.py",
    )
    return tuple(part for part in training_code(method) if part not in beside)


@cache
def direct_code(teacher: str) -> tuple[str, ...]:
    """Files the labels of a teacher without a network depend on."""
    return ("data/prepare.py", "evaluation/metrics.py", *(("atlas",) if teacher == "atlas" else ("atlas/warp.py",)))


def _file_of(module: str) -> str:
    path = module.removeprefix("scarceseg.").replace(".", "/")
    return f"{path}.py" if (PACKAGE / f"{path}.py").exists() else f"{path}/__init__.py"


def _imports(path: Path) -> list[str]:
    """Modules of this package that a file imports when it runs."""
    found = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("scarceseg."):
            found.append(_file_of(node.module or ""))
    return found


@cache
def code_hash(parts: tuple[str, ...] = TRAINING) -> str:
    """Hash of the named files and folders: code by its syntax tree (comments and docstrings do not count), weights by bytes."""
    digest = hashlib.sha256()
    for part in parts:
        path = PACKAGE / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            if file.suffix != ".py":
                digest.update(file.read_bytes())
                continue
            tree = ast.parse(file.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                body = getattr(node, "body", None)
                if (
                    isinstance(body, list)
                    and body
                    and isinstance(body[0], ast.Expr)
                    and isinstance(body[0].value, ast.Constant)
                ):
                    body[0].value.value = ""
            digest.update(f"{file.relative_to(PACKAGE)}\n{ast.dump(tree)}".encode())
    return digest.hexdigest()[:16]


def provenance(parts: tuple[str, ...] = TRAINING) -> dict[str, Any]:
    """Commit, code hash and hardware."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    return {
        "commit": git("rev-parse", "--short", "HEAD"),
        "code": code_hash(parts),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": processor(),
    }


def processor() -> str:
    """Model name of the CPU and the extensions that decide which arithmetic is fast."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    text = info.read_text(encoding="utf-8")
    name = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "CPU")
    extensions = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag} " in text]
    return f"{name} ({', '.join(extensions)})"


def save(name: str, values: dict[str, Any]) -> Path:
    """Write one result file."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n")
    return path
