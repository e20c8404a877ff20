"""The run folder: who may write it, and what may change between a run and its resumption."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from scarceseg.config import FREE, Config
from scarceseg.engine.parallel import rank
from scarceseg.errors import RunError, ScarceSegError
from scarceseg.files import write_text
from scarceseg.methods.models import with_places

FACTS = "fingerprint.json"
"""What the volumes of a run are like: its dataset may lie elsewhere when it goes on, but has to be the same."""


MADE_FIRST = ("config.yaml", "stages.json", FACTS, "plan.json", "split.json", "environment.json")
"""What is in a run folder before the first stage."""


def open_run(folder: Path, config: Config, resume: bool) -> bool:
    """Make the folder of a new run, or check that an old one belongs to the same config.

    Returns:
        True when an old run goes on.

    Raises:
        RunError: the folder is taken, cannot be written, or belongs to another config.
    """
    saved = folder / "config.yaml"
    if resume and saved.exists():
        check_same(Config.load(saved), config, folder)
        return True
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        hint = "add --resume to go on with it, or choose another --out" if saved.exists() else "choose another --out"
        raise RunError(f"{folder} exists and is not empty: {hint}")
    write_text(saved, config.dump())
    return False


@contextmanager
def given_back(folder: Path, resumed: bool) -> Iterator[None]:
    """Leave the folder of a new run free for another try when it is refused inside, before the first stage."""
    try:
        yield
    except ScarceSegError:
        if not resumed and rank() == 0:
            for name in MADE_FIRST:
                (folder / name).unlink(missing_ok=True)
        raise


def check_same(old: Config, new: Config, folder: Path) -> None:
    """Refuse to resume with settings that would make another run of it.

    Raises:
        RunError: listing each setting that differs.
    """
    before, after = (_flat(with_places(config).model_dump(mode="json")) for config in (old, new))
    free = FREE - ({"validate_every"} if new.select == "best" else set())
    if (folder / FACTS).exists():
        free = free | {"dataset"}  # the volumes themselves are compared
    changed = [
        f"{key}: {before.get(key)!r} then, {after.get(key)!r} now"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key not in free
    ]
    if changed:
        raise RunError(
            f"{folder} was started with other settings ({'; '.join(changed)}): resume with the old ones "
            "(without --recipe and --set they are kept), or start a new run in another --out"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def write_json(path: Path, value: Any) -> None:
    """Atomic write of a JSON file."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path, default: Any) -> Any:
    """Content of a JSON file, or `default` when there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else default


@contextmanager
def timed_stage(folder: Path, stage: str) -> Iterator[None]:
    """Add the seconds and the peak memory of a stage to ``stages.json``, also when it is interrupted."""
    start = time.perf_counter()
    try:
        yield
    finally:
        if rank() == 0:
            _add_time(folder, stage, time.perf_counter() - start)


def _add_time(folder: Path, stage: str, seconds: float) -> None:
    stages = read_json(folder / "stages.json", {})
    entry = stages.setdefault(stage, {"seconds": 0.0})
    entry["seconds"] = round(entry["seconds"] + seconds, 3)
    entry["peak_memory_mb"] = peak_memory_mb()
    write_json(folder / "stages.json", stages)


def peak_memory_mb() -> int:
    """Largest memory of this process so far: of the GPU when one is used, else resident memory, in MiB."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated() // 2**20)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak // (2**20 if platform.system() == "Darwin" else 2**10))


def environment() -> dict[str, Any]:
    """Versions and hardware a result depends on."""
    versions = {}
    for package in ("scarceseg", "torch", "monai", "numpy", "SimpleITK", "lightning-fabric"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }
