"""What an evaluation gives: metrics by case and class, their means, and what the means do not count."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from scarceseg.errors import DataError
from scarceseg.evaluation.metrics import METRICS

Units = Literal["mm", "voxel"]

ClassMetrics = dict[str, dict[str, float]]
"""Values of `METRICS` by class."""


@dataclass(frozen=True)
class Failure:
    """A case that some mean does not count: a mask is empty on one side, or a file could not be used.

    Attributes:
        case: its name.
        class_name: the class, or None when the whole case could not be evaluated.
        reason: "empty prediction", "empty reference", or what is wrong with the files.
    """

    case: str
    class_name: str | None
    reason: str

    def to_json(self) -> dict[str, str | None]:
        """``{"case", "class", "reason"}``."""
        return {"case": self.case, "class": self.class_name, "reason": self.reason}


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics of all cases.

    Attributes:
        units: of the distances, "mm" or "voxel".
        cases: case -> class -> metric; an undefined distance is NaN.
        mean: class -> metric, over the cases in which it is finite; NaN when there is none.
        failed: empty masks on one side (listed with ``empty="zero"`` too) and cases that could not be evaluated.
        warnings: what the user should know. Not part of the JSON.
        absent: class -> cases in which both masks are empty; they count as right in the means (Dice 1, distances 0).
        missing: cases with a reference and no prediction; no mean counts them.
    """

    units: Units
    cases: dict[str, ClassMetrics]
    mean: ClassMetrics
    failed: tuple[Failure, ...] = ()
    warnings: tuple[str, ...] = field(default=(), compare=False)
    absent: dict[str, int] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """``{"units", "cases": {id: {class: {metric}}}, "mean": {class: {metric}}, "failed": [...], "absent", "missing"}``.

        Undefined numbers are ``null``, since JSON has no NaN. An entry of ``failed`` is
        ``{"case", "class", "reason"}``, ``class`` being ``null`` when the whole case could not be evaluated.
        """
        return {
            "units": self.units,
            "cases": {case: _nullable(classes) for case, classes in self.cases.items()},
            "mean": _nullable(self.mean),
            "failed": [failure.to_json() for failure in self.failed],
            "absent": dict(self.absent),
            "missing": list(self.missing),
        }


class IncompleteEvaluation(DataError):
    """Some cases could not be evaluated; `result` holds all the others, and the files asked for are written."""

    def __init__(self, message: str, result: EvaluationResult) -> None:
        super().__init__(message)
        self.result = result


def mean_metrics(cases: Mapping[str, ClassMetrics]) -> ClassMetrics:
    """Mean of each metric over the cases in which it is finite, by class; NaN when there is none."""
    by_class: dict[str, list[dict[str, float]]] = {}
    for classes in cases.values():
        for name, values in classes.items():
            by_class.setdefault(name, []).append(values)
    return {
        name: {metric: finite_mean(v[metric] for v in rows) for metric in METRICS} for name, rows in by_class.items()
    }


def finite_mean(values: Iterable[float]) -> float:
    """Mean of the finite values; NaN when there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def _nullable(classes: ClassMetrics) -> dict[str, dict[str, float | None]]:
    return {
        name: {metric: value if math.isfinite(value) else None for metric, value in values.items()}
        for name, values in classes.items()
    }
