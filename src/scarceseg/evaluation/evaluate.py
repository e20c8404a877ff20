"""Predicted label files against reference label files: the metrics of every case and class, as one JSON object."""

from __future__ import annotations

import json as jsonlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
from scipy import ndimage

from scarceseg.data.geometry import describe, same_geometry
from scarceseg.data.images import SUFFIXES, image_suffix, read_image
from scarceseg.errors import ConfigError, DataError
from scarceseg.evaluation.metrics import Empty, binary_metrics
from scarceseg.evaluation.result import (
    ClassMetrics,
    EvaluationResult,
    Failure,
    IncompleteEvaluation,
    Units,
    mean_metrics,
)
from scarceseg.evaluation.tables import to_csv
from scarceseg.files import write_text
from scarceseg.types import Geometry, LabelMap


class _Score(NamedTuple):
    """Metrics of one case, the reason for each class of which just one mask is empty, and the classes that are in neither."""

    metrics: ClassMetrics
    empty: dict[str, str]
    absent: frozenset[str]


def evaluate(
    predictions: Path | str,
    references: Path | str | Mapping[str, Path],
    *,
    json: Path | str | None = None,
    csv: Path | str | None = None,
    units: Units = "mm",
    empty: Empty = "nan",
    classes: Mapping[str, int] | None = None,
    workers: int | None = None,
) -> EvaluationResult:
    """Compare label files, found by case name: the file name without its ending, so that formats may differ.

    Every prediction needs a reference; a reference without prediction is left out with a warning, and named in the JSON.
    Probability and uncertainty files that `predict` wrote beside the masks are passed over. Label values are
    named by the ``dataset.json`` beside the folder of references (or in it) when there is one, otherwise by themselves.
    A class that is in neither file of a case counts as two empty masks (Dice 1, distances 0); `EvaluationResult.absent` has how
    many there are.

    Args:
        predictions: folder of label files, or one file.
        references: folder of label files, one file when `predictions` is one, or the label file of each case by its name.
        json: file to write the result to, in the form of `EvaluationResult.to_json`.
        csv: file to write one row a case and class to.
        units: "mm", or "voxel" for distances as in the published tables (spacing taken as 1).
        empty: distances when just one mask is empty, see `binary_metrics`.
        classes: label value of each class name, instead of ``dataset.json``; other values are then not looked at.
        workers: cases compared at the same time; None takes one a processor, eight at most.

    Raises:
        ConfigError: `units` or `empty` is none of the known words, or a value in `classes` is not one of 1 to 255.
        DataError: nothing to compare, or a prediction has no reference.
        IncompleteEvaluation: a file is unreadable, its pair lies on another grid, or it has a value that is no class.
            Raised after the other cases are computed and written.
        RunError: an output file cannot be written.
    """
    _check_word("units", units, get_args(Units))
    _check_word("empty", empty, get_args(Empty))
    if wrong := [f"{name}: {value}" for name, value in (classes or {}).items() if not 1 <= value <= 255]:
        raise ConfigError(f"classes: expected label values of foreground classes, 1 to 255, got {wrong[0]}")
    known = references if isinstance(references, Mapping) else Path(references)
    pairs, missing = _pairs(Path(predictions), known)
    names = dict(classes) if classes is not None else _class_values(known)

    def score(case: str) -> _Score | DataError:
        try:
            return _score(*pairs[case], names, classes is not None, units, empty)
        except DataError as error:
            return error

    count = min(len(pairs), 8, os.cpu_count() or 1) if workers is None else max(workers, 1)
    if count == 1:
        scores = [score(case) for case in pairs]
    else:
        # Threads and not processes: nearly all the time is spent in compiled code that lets the others go on.
        with ThreadPoolExecutor(count) as pool:
            scores = list(pool.map(score, pairs))
    result = _summary(dict(zip(pairs, scores, strict=True)), units, names, missing)
    if json is not None:
        write_text(Path(json), jsonlib.dumps(result.to_json(), indent=1, allow_nan=False) + "\n")
    if csv is not None:
        write_text(Path(csv), to_csv(result))
    _raise_for_broken(result, len(pairs))
    return result


def _check_word(name: str, word: str, known: tuple[str, ...]) -> None:
    if word not in known:
        raise ConfigError(f"{name}: expected {' or '.join(known)}, got {word!r}")


def _pairs(
    predictions: Path, references: Path | Mapping[str, Path]
) -> tuple[dict[str, tuple[Path, Path]], tuple[str, ...]]:
    """Prediction and reference file of each case, sorted by name, and the cases without prediction."""
    if isinstance(references, Mapping):
        if not references:
            raise DataError("there are no references: expected the label file of at least one case")
        known, where = dict(references), ""
    elif predictions.is_file() and references.is_file():
        return {_case_name(predictions): (predictions, references)}, ()
    if not predictions.exists():
        raise DataError(f"there are no predictions at {predictions}: check the path")
    if not isinstance(references, Mapping):
        if references.is_file():
            raise DataError(
                f"expected a folder of references for the folder {predictions}, got the file {references}; "
                "give two folders or two files"
            )
        known, where = _label_files(references, "references"), f" in {references}"
    found = (
        {_case_name(predictions): predictions} if predictions.is_file() else _label_files(predictions, "predictions")
    )
    maps = {name for name in found.keys() - known.keys() if _is_map(name, known)}
    found = {case: path for case, path in found.items() if case not in maps}
    if not found:
        raise DataError(
            f"{predictions} has maps of {_some(sorted(maps))} and no masks: expected label files named like their references, "
            f"such as {next(iter(known))!r}; run predict again or give the folder with the masks"
        )
    if missing := sorted(found.keys() - known.keys()):
        raise DataError(
            f"{len(missing)} of {len(found)} predictions have no reference of the same name{where}: "
            f"{_some(missing)}; references are named like {next(iter(known))!r}: rename the predictions, or move what "
            "is none out of the folder"
        )
    unused = sorted(known.keys() - found.keys()) if predictions.is_dir() else []
    return {case: (found[case], known[case]) for case in sorted(found)}, tuple(unused)


def _is_map(name: str, known: Iterable[str]) -> bool:
    """Whether a file is what `predict` writes beside the mask of a known case: its uncertainty or a probability."""
    return any(name.startswith((f"{case}_prob_", f"{case}_uncertainty")) for case in known)


def _label_files(folder: Path, role: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError(f"there are no {role} at {folder}: expected a folder of label files, or one; check the path")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_file() or image_suffix(path) is None:
            continue
        case = _case_name(path)
        if case in files:
            raise DataError(f"{folder} has case {case!r} twice, as {files[case].name} and {path.name}; remove one")
        files[case] = path
    if not files:
        raise DataError(f"{folder}: expected {role} that end in {', '.join(SUFFIXES)}, found none; check the path")
    return files


def _case_name(path: Path) -> str:
    return path.name[: -len(image_suffix(path) or "")] if image_suffix(path) else path.name


def _class_values(known: Path | Mapping[str, Path]) -> dict[str, int] | None:
    """Value of each foreground class by ``dataset.json`` beside or in the folder of references; None without one."""
    references = next(iter(known.values())) if isinstance(known, Mapping) else known
    folder = references if references.is_dir() else references.parent
    path = next((p for p in (folder.absolute().parent / "dataset.json", folder / "dataset.json") if p.is_file()), None)
    if path is None:
        return None
    try:
        labels = jsonlib.loads(path.read_text(encoding="utf-8"))["labels"]
        if all(str(key).isdigit() for key in labels):  # the former form: number -> name
            values = {str(name): int(value) for value, name in labels.items()}
        else:
            values = {str(name): int(value) for name, value in labels.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(
            f'{path}: expected labels such as {{"background": 0, "heart": 1}}, one whole number a class; correct the '
            "file, or move it away to have the classes named by their number"
        ) from None
    if wrong := [value for value in values.values() if not 0 <= value <= 255]:
        raise DataError(f"{path}: expected class values from 0 to 255, got {wrong[0]}; correct the file")
    return {name: value for name, value in values.items() if value != 0}


def _score(
    prediction: Path, reference: Path, names: Mapping[str, int] | None, chosen: bool, units: Units, empty: Empty
) -> _Score:
    p, geometry_p = _read_labels(prediction)
    r, geometry_r = _read_labels(reference)
    if not same_geometry(geometry_p, geometry_r):
        raise DataError(
            f"prediction and reference must lie on one grid: {prediction} has {describe(geometry_p)}, {reference} has "
            f"{describe(geometry_r)}; resample the prediction to the reference (nearest neighbour)"
        )
    boxes_p, boxes_r = _boxes(p), _boxes(r)
    if names is None:
        names = {str(value): value for value in sorted(boxes_p.keys() | boxes_r.keys())}
    elif not chosen:
        _check_values(prediction, boxes_p, names)
        _check_values(reference, boxes_r, names)
    spacing = geometry_r.spacing_mm if units == "mm" else (1.0, 1.0, 1.0)
    metrics, reasons = {}, {}
    for name, value in names.items():
        box = _union(boxes_p.get(value), boxes_r.get(value))  # nothing outside of both masks matters
        metrics[name] = binary_metrics(p[box] == value, r[box] == value, spacing, empty)
        if (value in boxes_p) != (value in boxes_r):
            reasons[name] = "empty reference" if value in boxes_p else "empty prediction"
    present = boxes_p.keys() | boxes_r.keys()
    return _Score(metrics, reasons, frozenset(name for name, value in names.items() if value not in present))


def _read_labels(path: Path) -> tuple[LabelMap, Geometry]:
    array, geometry = read_image(path)
    labels = array.astype(np.uint8)
    if array.dtype != np.uint8 and not np.array_equal(labels, array):
        example = float(array[labels != array].flat[0])
        raise DataError(
            f"{path}: expected whole class numbers from 0 to 255, got {example:g}; give a label file (a probability "
            "map must be thresholded first)"
        )
    return labels, geometry


Box = tuple[slice, ...]


def _boxes(labels: LabelMap) -> dict[int, Box]:
    return {value: box for value, box in enumerate(ndimage.find_objects(labels), 1) if box is not None}


def _union(a: Box | None, b: Box | None) -> Box:
    if a is None or b is None:
        return a or b or (slice(0, 0),) * 3
    return tuple(slice(min(i.start, j.start), max(i.stop, j.stop)) for i, j in zip(a, b, strict=True))


def _check_values(path: Path, boxes: Mapping[int, Box], names: Mapping[str, int]) -> None:
    if unknown := sorted(boxes.keys() - set(names.values())):
        listing = ", ".join(f"{value} ({name})" for name, value in names.items())
        raise DataError(
            f"{path}: expected the classes of dataset.json, 0 (background), {listing}, found also {_some(unknown)}; "
            "correct the file, or add the classes to dataset.json"
        )


def _summary(
    scores: Mapping[str, _Score | DataError],
    units: Units,
    names: Mapping[str, int] | None,
    missing: tuple[str, ...],
) -> EvaluationResult:
    cases = {case: score.metrics for case, score in scores.items() if isinstance(score, _Score)}
    nowhere = [score.absent for score in scores.values() if isinstance(score, _Score)]
    if names is None:
        # Values name themselves, so a class is known only once every case is read; absent from both files = both empty.
        seen = sorted({name for classes in cases.values() for name in classes}, key=int)
        nothing = np.zeros((1, 1, 1), dtype=bool)
        neither = binary_metrics(nothing, nothing, (1, 1, 1))
        nowhere = [frozenset(seen) - classes.keys() for classes in cases.values()]
        cases = {case: {name: classes.get(name, dict(neither)) for name in seen} for case, classes in cases.items()}
    failed: list[Failure] = []
    for case, score in scores.items():
        reasons = {None: str(score)} if isinstance(score, DataError) else score.empty
        failed += [Failure(case, name, reason) for name, reason in reasons.items()]
    mean = mean_metrics(cases)
    absent = {name: sum(name in classes for classes in nowhere) for name in mean}
    warnings = []
    if missing:
        references = f"{len(missing)} of {len(scores) + len(missing)} references"
        warnings.append(f"{references} have no prediction and are left out: {_some(missing)}")
    return EvaluationResult(units, cases, mean, tuple(failed), tuple(warnings), absent, missing)


def _raise_for_broken(result: EvaluationResult, count: int) -> None:
    broken = [failure for failure in result.failed if failure.class_name is None]
    if broken:
        listing = "\n".join(f"  {failure.case}: {failure.reason}" for failure in broken)
        raise IncompleteEvaluation(
            f"{len(broken)} of {count} cases could not be evaluated (the results of the others are kept):\n{listing}",
            result,
        )


def _some(names: Iterable[object]) -> str:
    shown = [str(name) for name in names]
    return ", ".join(shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "")
