"""What a file of weights is, told by its own words or by the names of its tensors, and whether it is complete."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scarceseg.errors import ConfigError, DataError, RunError
from scarceseg.foundation.layouts import Kind, Shapes, layout, student_layout
from scarceseg.foundation.weights import read_tensors

WORDS: dict[Kind, str] = {
    "sam-official": "Segment Anything (2D), official names",
    "sam-hf": "Segment Anything (2D), Hugging Face names",
    "sam-med3d": "SAM-Med3D (3D)",
    "sam-lora": "LoRA file of a tuned SAM, to be used with the SAM it was tuned from",
    "sam-tuned": "tuned decoder of a SAM, to be used with the SAM it was tuned from",
    "tiny-sam": "tiny-sam",
    "tiny-sam3d": "tiny-sam3d",
    "student": "network trained by a run; use it with 'scarceseg predict'",
    "unknown": "none of the architectures known here",
}
_FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
_SHOWN = 20


@dataclass(frozen=True)
class CheckReport:
    """What `check` found.

    Attributes:
        path: file or folder.
        kind: see `Kind`.
        sizes: what tells models of this kind apart (width, depth, image size ...), and ``tensors`` and ``values``.
        missing: names the architecture has and the file has not.
        unexpected: names the file has and the architecture has not.
        reshaped: names that both have, with other shapes than the architecture of these sizes.
        problem: why the layout could not be worked out, or None.
    """

    path: Path
    kind: Kind
    sizes: dict[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def ok(self) -> bool:
        """Whether it is known and every name and shape fits."""
        return self.kind != "unknown" and not (self.missing or self.unexpected or self.reshaped or self.problem)

    @property
    def text(self) -> str:
        """Lines for people: what it is, its sizes, and every name that does not fit (the first of many)."""
        lines = [f"{self.path}: {WORDS[self.kind]}"]
        if self.sizes:
            lines.append("  " + ", ".join(f"{name} {value}" for name, value in self.sizes.items()))
        if self.problem:
            lines.append(f"  {self.problem}")
        for what, names in (("missing", self.missing), ("unexpected", self.unexpected), ("other shape", self.reshaped)):
            if names:
                lines.append(f"  {len(names)} {what}:")
                lines += [f"    {name}" for name in names[:_SHOWN]]
                lines += [f"    ... and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
        if self.ok:
            lines.append("  all names and shapes fit")
        return "\n".join(lines)


def identify(path: Path) -> Kind:
    """What a file or folder is. Only names and shapes are read.

    Args:
        path: file of weights, Hugging Face folder (``config.json`` and weights), or run folder.

    Raises:
        DataError: missing, damaged, code in it, or a folder without weights.
    """
    if _run_folder(path):
        return "student"
    file = weights_file(path)
    return kind_of(*read_tensors(file, "meta"))


def weights_file(path: Path) -> Path:
    """The file with the tensors: `path` itself, or that of a Hugging Face folder.

    Raises:
        DataError: neither.
    """
    if not path.exists():
        raise DataError(f"there is no file or folder {path}: check the path")
    if path.is_file():
        return path
    found = [path / name for name in _FOLDER_FILES if (path / name).is_file()]
    if not found:
        raise DataError(f"{path}: expected a folder with {' or '.join(_FOLDER_FILES)}, found neither; give the file")
    return found[0]


def kind_of(state: Shapes, metadata: Mapping[str, str]) -> Kind:
    """What tensors of these names and shapes are; see `identify`."""
    ours: tuple[Kind, ...] = ("tiny-sam", "tiny-sam3d")
    for kind in ours:
        if metadata.get("kind") == kind:
            return kind
    parts = {name.split(".")[0] for name in state}
    if any(name.startswith("w_a_") for name in parts):
        return "sam-lora"
    if "vision_encoder" in parts:
        return "sam-hf"
    if not parts & {"image_encoder", "prompt_encoder", "mask_decoder"}:
        return "unknown"
    upscaling = [tensor for name, tensor in state.items() if name.startswith("mask_decoder.output_upscaling.")]
    encoder = {name: tensor for name, tensor in state.items() if name.startswith("image_encoder.")}
    if any(".lora." in name or ".adapter." in name for name in state) or (
        not encoder and any(tensor.ndim == 5 for tensor in upscaling)
    ):
        return "unknown"  # what the tuning of a volumetric model leaves: parts alone
    if not encoder or any(name.startswith("image_encoder.adapters.") for name in encoder):
        return "sam-tuned"
    is_3d = any(name.endswith("rel_pos_d") or tensor.ndim == 5 for name, tensor in encoder.items())
    return "sam-med3d" if is_3d else "sam-official"


def check(path: Path) -> CheckReport:
    """Compare a file of weights with the full layout of the architecture it belongs to. Only names and shapes are read.

    Args:
        path: see `identify`.

    Returns:
        The report; it is not `ok` when names are missing or unexpected, or the architecture is not known.

    Raises:
        DataError: missing, damaged, code in it, or a folder without weights.
    """
    run = _run_folder(path)
    tensors = read_tensors(run / "model.safetensors" if run else weights_file(path), "meta")
    kind = "student" if run else kind_of(*tensors)
    count = {"tensors": len(tensors.state), "values": sum(tensor.numel() for tensor in tensors.state.values())}
    if kind == "unknown":
        examples = ", ".join(sorted(tensors.state)[:3])
        return CheckReport(path, kind, count, problem=f"its first names are {examples}")
    if kind == "sam-hf" and path.is_dir() and (problem := _config_problem(path / "config.json")):
        return CheckReport(path, kind, count, problem=problem)
    try:
        expected, sizes = student_layout(run) if run else layout(kind, *tensors)
    except (DataError, ConfigError, RunError) as error:
        return CheckReport(path, kind, count, problem=str(error))
    missing, unexpected, reshaped = compare(tensors.state, expected)
    return CheckReport(path, kind, sizes | count, missing, unexpected, reshaped)


def compare(state: Shapes, expected: Shapes) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Names that are missing, that are unexpected, and that have another shape, each in sorted order."""
    reshaped = (
        f"{name}: expected {list(expected[name].shape)}, got {list(state[name].shape)}"
        for name in sorted(state.keys() & expected.keys())
        if state[name].shape != expected[name].shape
    )
    return tuple(sorted(expected.keys() - state.keys())), tuple(sorted(state.keys() - expected.keys())), tuple(reshaped)


def _config_problem(path: Path) -> str | None:
    """What is wrong with the description of a Hugging Face folder, or None."""
    try:
        kind = json.loads(path.read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path.name} is missing or damaged: get it again, or give the file with the weights alone"
    return (
        None
        if kind == "sam"
        else f"{path.name}: expected model_type 'sam', got {kind!r}; the folder holds another model"
    )


def _run_folder(path: Path) -> Path | None:
    """The run folder `path` is, or whose model file it is."""
    folder = path.parent if path.name in {"model.safetensors", "model.json"} else path
    there = (folder / "model.json").is_file() and (folder / "model.safetensors").is_file()
    return folder if there else None
