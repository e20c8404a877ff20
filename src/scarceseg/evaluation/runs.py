"""Run folders -> groups of runs that differ in the seed alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from scarceseg.config import FREE, Config
from scarceseg.data.images import read_image
from scarceseg.errors import ConfigError, DataError, RunError
from scarceseg.evaluation.metrics import METRICS
from scarceseg.evaluation.published import summands
from scarceseg.evaluation.result import ClassMetrics, Units
from scarceseg.evaluation.tables import OVERLAPS, read_evaluation
from scarceseg.methods import METHODS
from scarceseg.methods.base import build_options

EVALUATION = "evaluation.json"
NOT_COMPARED = {"dataset", "val", "method", "terms", "labeled", "seed", "memory_format"} | FREE
"""Settings that are compared in another form (cases by their names, terms with their defaults), or not at all."""
FREE_OPTIONS = {"tuned_in", "workers", "remember"}
"""Options of terms that say where and how fast something is computed, and not what."""


@dataclass(frozen=True)
class MeasuredRun:
    """A finished run with its metrics.

    Attributes:
        folder: the run's.
        config: its settings.
        method: terms joined by ``+``, ``supervised`` left out unless it is alone.
        dataset, classes: name and foreground classes by the plan.
        labelled: names of the labelled cases.
        training: number of labelled and unlabelled cases.
        units: of the distances.
        cases: case -> class -> metric, NaN where it is undefined.
        settings: every setting that is compared, by its dotted key.
    """

    folder: Path
    config: Config
    method: str
    dataset: str
    classes: tuple[str, ...]
    labelled: tuple[str, ...]
    training: int
    units: Units
    cases: dict[str, ClassMetrics]
    settings: dict[str, Any] = field(default_factory=dict)


def read_run(folder: Path, scores: str = EVALUATION) -> MeasuredRun | str:
    """Read a run and its metrics.

    Args:
        folder: made by ``scarceseg train --out``.
        scores: file in it with a result of `evaluate`.

    Returns:
        The run, or the reason to leave it out when it has not come to its end yet.

    Raises:
        RunError: no run folder, or a finished run without the file.
        ConfigError, DataError: a file of the run is damaged.
    """
    if not (folder / "config.yaml").is_file():
        found = (
            "no such folder"
            if not folder.exists()
            else "a file"
            if folder.is_file()
            else "there is no config.yaml in it"
        )
        raise RunError(f"{folder} is no run folder ({found}): expected a folder that 'scarceseg train --out' made")
    config = Config.load(folder / "config.yaml")
    measured = (folder / scores).is_file()
    if not (folder / "model.safetensors").is_file() or (not measured and scores == EVALUATION and config.val):
        return f"{folder} has not come to its end (in training, or stopped: --resume goes on) and is left out"
    if not measured:
        raise RunError(
            f"{folder} has no {scores}: it was trained without validation cases (--val); measure it with 'scarceseg "
            f"predict' and 'scarceseg evaluate --json {folder / 'test.json'}', then compare with --scores test.json"
            if scores == EVALUATION
            else f"{folder} has no {scores}: expected a result of 'scarceseg evaluate --json' there; check --scores"
        )
    plan, split = _read_json(folder / "plan.json"), _read_json(folder / "split.json")
    units, cases = _read_scores(folder / scores)
    try:
        labelled = tuple(str(name) for name in split["labelled"])
        training = len(labelled) + len(split["unlabelled"])
        dataset, classes = str(plan["dataset"]), tuple(str(name) for name in plan["classes"][1:])
    except (KeyError, TypeError):
        raise DataError(f"{folder}: plan.json or split.json is not what a run leaves; train again") from None
    names = summands(config.method)
    settings = _settings(config, names) | {"labelled cases": " ".join(labelled), "training cases": training}
    return MeasuredRun(folder, config, "+".join(names), dataset, classes, labelled, training, units, cases, settings)


def _settings(config: Config, names: Iterable[str]) -> dict[str, Any]:
    """What is compared, flat; options of terms with their defaults filled in, so that writing one out is no difference."""
    terms = {}
    for name in sorted({*names, "supervised"}):
        terms[name] = config.terms.get(name, {})
        with suppress(ConfigError):  # a term that is no longer there, or not with this option
            terms[name] = build_options(METHODS.get(name), name, terms[name]).model_dump(mode="json")
    values = {key: value for key, value in config.model_dump(mode="json").items() if key not in NOT_COMPARED}
    flat = _flat(values | {"terms": terms})
    return {key: value for key, value in flat.items() if not _is_free(key)}


def _is_free(key: str) -> bool:
    """Whether a dotted key is an option of a term that no comparison looks at."""
    group, _, name = key.rpartition(".")
    return group.startswith("terms.") and name in FREE_OPTIONS


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}; train again, or leave this run out") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(values).__name__}; train again")
    return values


def _read_scores(path: Path) -> tuple[Units, dict[str, ClassMetrics]]:
    values = read_evaluation(path)
    try:
        cases = {
            case: {
                name: {metric: math.nan if row[metric] is None else float(row[metric]) for metric in METRICS}
                for name, row in classes.items()
            }
            for case, classes in values["cases"].items()
        }
    except (TypeError, ValueError):
        raise DataError(f"{path}: expected numbers or null as metrics; evaluate again") from None
    if not cases or values["units"] not in get_args(Units):
        raise DataError(f"{path}: expected at least one case, and units mm or voxel; evaluate again")
    return values["units"], cases


def in_units(run: MeasuredRun, units: Units) -> dict[str, ClassMetrics]:
    """The metrics of the run's cases with distances in other units, by the voxel size of its validation masks.

    Raises:
        ConfigError: a mask is not there, or its voxels are not cubes, so that the distances have to be measured anew.
    """
    if units == run.units:
        return run.cases
    converted = {}
    for case, classes in run.cases.items():
        mask = run.folder / "validation" / f"{case}.nii.gz"
        spacing = read_image(mask)[1].spacing_mm if mask.is_file() else (math.nan,) * 3
        if not max(spacing) - min(spacing) <= 1e-4 * max(spacing):
            why = f"the voxels of {mask} are not cubes" if mask.is_file() else f"there is no {mask}"
            raise ConfigError(
                f"distances of {run.folder} cannot be given in {units}: {why}; measure them with 'scarceseg evaluate "
                f"{run.folder / 'validation'} REFERENCES --units {units} --json {run.folder / f'{units}.json'}' and "
                f"compare with --scores {units}.json"
            )
        factor = spacing[0] if units == "mm" else 1 / spacing[0]
        converted[case] = {
            name: {metric: value if metric in OVERLAPS else value * factor for metric, value in row.items()}
            for name, row in classes.items()
        }
    return converted
