"""Read what a run folder holds; whatever is missing or damaged becomes a note instead of an error."""

from __future__ import annotations

import json
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from scarceseg.config import Config
from scarceseg.errors import ConfigError, DataError, RunError
from scarceseg.evaluation.tables import read_evaluation

T = TypeVar("T")
VALIDATION = "validation"

Curve = tuple[list[float], list[float]]
"""Iterations and values."""


@dataclass(frozen=True)
class ShownCase:
    """A case to draw.

    Attributes:
        title: its name.
        image, prediction, reference, uncertainty: ``[X, Y, Z]``; the last two may be missing.
        spacing_mm: voxel distances.
        direction: 3x3 row-major, or None when it was not kept.
    """

    title: str
    image: NDArray[Any]
    prediction: NDArray[Any]
    reference: NDArray[Any] | None
    uncertainty: NDArray[Any] | None
    spacing_mm: tuple[float, ...]
    direction: tuple[float, ...] | None


@dataclass
class RunRecord:
    """A run folder as far as it can be read.

    Attributes:
        folder: the run's.
        config_text: ``config.yaml`` as it is.
        config: the same as an object, or None when it is not valid (any more).
        plan, split, environment, stages: the JSON files, empty when missing.
        curves: stage -> key (``loss``, ``loss/supervised``, ``dice/heart`` ...) -> curve.
        evaluation: in the form `evaluate` writes, or None.
        figures: paths of the cases kept for pictures.
        warnings: what the run warned of.
        notes: what could not be read.
    """

    folder: Path
    config_text: str
    config: Config | None = None
    plan: dict[str, Any] = field(default_factory=dict)
    split: dict[str, list[str]] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    curves: dict[str, dict[str, Curve]] = field(default_factory=dict)
    evaluation: dict[str, Any] | None = None
    figures: list[Path] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        """Foreground class names, by the plan or else by the evaluation."""
        names = self.plan.get("classes")
        if isinstance(names, list | tuple) and len(names) > 1:
            return [str(name) for name in names[1:]]
        return [str(name) for name in (self.evaluation or {}).get("mean", {})]

    @property
    def trained(self) -> int:
        """Finished training iterations, as far as they were logged."""
        ends = [curve[0][-1] for key, curve in self.curves.get("train", {}).items() if key == "loss" and curve[0]]
        last = int(ends[0]) + 1 if ends else 0
        total = self.config.iterations if self.config else last
        # The last line of a finished run may lie up to log_every before its end.
        return total if (self.folder / "model.safetensors").exists() else min(last, total)

    @property
    def seconds(self) -> float:
        """Time of all stages."""
        return math.fsum(float(stage.get("seconds") or 0) for stage in self.stages.values())


def read_run(folder: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        RunError: there is no such folder, or no ``config.yaml`` in it.
    """
    path = folder / "config.yaml"
    if not folder.is_dir():
        raise RunError(f"there is no run folder {folder}: expected a folder that 'scarceseg train --out' made")
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        raise RunError(
            f"{folder} is no run folder: expected a config.yaml in it, as 'scarceseg train' leaves; check the path"
        ) from None
    run = RunRecord(folder, text)
    run.config = _try(run, "config.yaml", lambda: Config.load(path))
    run.plan = _json(run, "plan.json", dict)
    run.split = {
        str(role): [str(name) for name in names] for role, names in _json(run, "split.json", dict).items() if names
    }
    run.environment = _json(run, "environment.json", dict)
    run.stages = {k: v for k, v in _json(run, "stages.json", dict).items() if isinstance(v, dict)}
    run.warnings = [str(warning) for warning in _json(run, "warnings.json", list)]
    run.curves = _curves(run)
    if (folder / "evaluation.json").exists():
        run.evaluation = _try(run, "evaluation.json", lambda: read_evaluation(folder / "evaluation.json"))
    run.figures = sorted((folder / "figures").glob("*.npz"))
    return run


def _try(run: RunRecord, name: str, read: Callable[[], T]) -> T | None:
    try:
        return read()
    except (ConfigError, DataError, OSError, ValueError) as error:
        run.notes.append(f"{name} could not be read: {(str(error).splitlines() or [type(error).__name__])[0]}")
        return None


def _json(run: RunRecord, name: str, kind: type[T]) -> T:
    path = run.folder / name
    if not path.exists():
        return kind()
    value = _try(run, name, lambda: json.loads(path.read_text(encoding="utf-8")))
    if value is not None and not isinstance(value, kind):
        run.notes.append(f"{name} could not be read: expected a JSON {kind.__name__}, got {type(value).__name__}")
    return value if isinstance(value, kind) else kind()


def _curves(run: RunRecord) -> dict[str, dict[str, Curve]]:
    """Curves by stage and key; of lines for one iteration the later one counts, a line cut short is left out."""
    path = run.folder / "metrics.jsonl"
    if not path.exists():
        return {}
    text = _try(run, path.name, lambda: path.read_text(encoding="utf-8", errors="replace")) or ""
    points: dict[str, dict[str, dict[float, float]]] = {}
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            stage, iteration = str(entry.pop("stage")), float(entry.pop("iteration"))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        for key, value in entry.items():
            number = float("nan") if value is None else value
            if isinstance(number, int | float):
                points.setdefault(stage, {}).setdefault(str(key), {})[iteration] = float(number)
    return {
        stage: {key: (sorted(values), [values[x] for x in sorted(values)]) for key, values in keys.items()}
        for stage, keys in points.items()
    }


def read_arrays(path: Path, names: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
    """Arrays of a file the run kept for pictures: all, or those in `names`; the others are not read.

    Raises:
        DataError: the file or one of `names` is missing, or it is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names or file.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} could not be read: {error}; run 'scarceseg train' again to have it made") from None


def without_rank(title: str) -> str:
    """The name of a kept case: its title without the rank among its run's cases."""
    return re.sub(r" \((best|median|worst)\)$", "", title)


def read_case(path: Path) -> ShownCase:
    """Read one ``figures/*.npz``.

    Raises:
        DataError: damaged, or its arrays do not fit each other.
    """
    return case_of(read_arrays(path), path)


def case_of(arrays: Mapping[str, NDArray[Any]], path: Path) -> ShownCase:
    """What `read_arrays` gave as a case.

    Raises:
        DataError: arrays are missing or do not fit each other.
    """
    try:
        image, prediction = arrays["image"], arrays["prediction"]
        reference, uncertainty = arrays.get("reference"), arrays.get("uncertainty")
        for other in (prediction, reference, uncertainty):
            if image.ndim != 3 or (other is not None and other.shape != image.shape):
                raise ValueError(f"expected 3D arrays of one shape, got {image.shape}")
        spacing = tuple(float(s) for s in arrays.get("spacing_mm", np.ones(3)))
        direction = tuple(float(d) for d in arrays["direction"].ravel()) if "direction" in arrays else None
    except (ValueError, KeyError) as error:
        raise DataError(f"{path} could not be read: {error}; run 'scarceseg train' again to have it made") from None
    title = str(arrays["title"]) if "title" in arrays else path.stem
    return ShownCase(title, image, prediction, reference, uncertainty, spacing, direction)
