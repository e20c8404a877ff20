"""What a comparison of runs gives: groups with mean and spread, tests, published rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scarceseg.evaluation.paired import PairedTest
from scarceseg.evaluation.published import Benchmark, row_metrics
from scarceseg.evaluation.result import ClassMetrics, Units, finite_mean
from scarceseg.evaluation.runs import MeasuredRun
from scarceseg.evaluation.tables import PublishedRow
from scarceseg.methods.models import foundation_words

OVERALL = None
"""Key of the mean over classes, beside the class names."""

Scope = str | None
"""A class name, or `OVERALL`."""


@dataclass(frozen=True)
class Spread:
    """A metric over the runs of a group.

    Attributes:
        mean: over runs in which it is defined; NaN when there is none.
        std: standard deviation of a sample (n - 1); NaN with fewer than two runs.
        undefined: cases, summed over runs, that the runs' own means do not count.
    """

    mean: float
    std: float
    undefined: int

    def to_json(self) -> dict[str, float | int | None]:
        """``{"mean", "std", "undefined"}``, None for NaN."""
        return {"mean": nullable(self.mean), "std": nullable(self.std), "undefined": self.undefined}


@dataclass
class Group:
    """Runs that differ in the seed alone.

    Attributes:
        method: terms joined by ``+``.
        labels: number of labelled cases.
        settings: what differs between the groups of the comparison beside method and labels.
        runs: with distances in the units of the comparison.
        metrics: class or `OVERALL` -> metric -> spread over the runs.
        baseline: title of the group this one is tested against, or None.
        tests: class or `OVERALL` -> metric -> test; empty without a baseline.
        untested: why there is no test although a baseline was asked for.
    """

    method: str
    labels: int
    settings: dict[str, Any]
    runs: list[MeasuredRun]
    metrics: dict[Scope, dict[str, Spread]]
    baseline: str | None = None
    tests: dict[Scope, dict[str, PairedTest]] = field(default_factory=dict)
    untested: str = ""

    @property
    def title(self) -> str:
        """Method, number of labels and what else differs."""
        return ", ".join([self.method, f"{self.labels} label{'' if self.labels == 1 else 's'}", *self.differing])

    @property
    def differing(self) -> list[str]:
        """`settings` for people, long values cut."""
        shown = {key.removeprefix("terms."): str(value) for key, value in self.settings.items()}
        return [f"{key}={text if len(text) <= 32 else f'{text[:29]}...'}" for key, text in shown.items()]

    @property
    def cases(self) -> list[str]:
        """Names of the cases it was measured on, sorted."""
        return sorted(self.runs[0].cases)

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``classes`` by name and ``overall`` hold the metrics, ``tests`` is None without a baseline."""
        return {
            "title": self.title,
            "method": self.method,
            "labels": self.labels,
            "network": self.runs[0].config.network.name,
            "foundation": foundation_words(self.runs[0].config) or None,
            "settings": self.settings,
            "runs": [str(run.folder) for run in self.runs],
            "seeds": [run.config.seed for run in self.runs],
            "cases": self.cases,
            "classes": {name: _plain(self.metrics[name]) for name in self.metrics if name is not OVERALL},
            "overall": _plain(self.metrics[OVERALL]),
            "baseline": self.baseline,
            "tests": {
                "classes": {name: _plain(tests) for name, tests in self.tests.items() if name is not OVERALL},
                "overall": _plain(self.tests[OVERALL]),
            }
            if self.tests
            else None,
            "untested": self.untested or None,
        }

    def by_case(self, scope: Scope, metric: str) -> dict[str, float]:
        """One value a case: mean over the seeds in which it is defined, or NaN; over classes likewise."""
        values = {}
        for case in self.cases:
            rows = [pick(run.cases[case], scope, metric) for run in self.runs]
            values[case] = finite_mean(rows)
        return values

    def by_class(self, case: str, metric: str) -> dict[str, float]:
        """Mean over the seeds for each class of a case; NaN where it is undefined in any of them."""
        found = {name for run in self.runs for name in run.cases[case]}
        return {
            name: float(np.mean([run.cases[case].get(name, {}).get(metric, math.nan) for run in self.runs]))
            for name in sorted(found)
        }


def matched(group: Group, baseline: Group, scope: Scope, metric: str) -> tuple[dict[str, float], dict[str, float]]:
    """One value a case of two groups of the same cases, both over the classes that are defined in every run of both.

    A distance is undefined where a mask is empty; averaged over different classes, a method that misses the hardest of them
    would seem the better one. Cases without a class in common are NaN.
    """
    values: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for case in group.cases:
        sides = [side.by_class(case, metric) for side in (group, baseline)]
        names = [scope] if scope is not None else sorted(sides[0].keys() & sides[1].keys())
        common = [name for name in names if all(math.isfinite(side.get(name, math.nan)) for side in sides)]
        for side, kept in zip(sides, values, strict=True):
            kept[case] = finite_mean(side[name] for name in common)
    return values


@dataclass
class Comparison:
    """Groups of runs on one dataset.

    Attributes:
        dataset: its name.
        classes: foreground classes.
        units: of the distances.
        groups: fewest labels first.
        benchmark: which one the dataset is, or None.
        published: rows of the tables for the numbers of labels and methods compared, and the best of each number.
        notes: what to know when reading the numbers.
        warnings: runs that were left out, and what makes numbers doubtful.
    """

    dataset: str
    classes: tuple[str, ...]
    units: Units
    groups: list[Group]
    benchmark: Benchmark | None = None
    published: list[PublishedRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """All numbers as plain values: overlaps in [0, 1], undefined ones None; see the guide "Compare runs"."""
        known = self.benchmark
        return {
            "dataset": self.dataset,
            "classes": list(self.classes),
            "units": self.units,
            "groups": [group.to_json() for group in self.groups],
            "benchmark": None
            if known is None
            else {"name": known.name, "training": known.training, "test": known.test},
            "published": [
                {"method": row.method, "labels": row.labeled}
                | {f"{name}_{unit}" if unit else name: value for name, (value, unit) in row_metrics(row).items()}
                | {"source": row.source, "note": row.note}
                for row in self.published
            ],
            "notes": self.notes,
            "warnings": self.warnings,
        }

    @property
    def scopes(self) -> list[Scope]:
        """The classes, and the mean over them where there are several."""
        return [*self.classes, OVERALL] if len(self.classes) > 1 else [OVERALL]


def _plain(metrics: Mapping[str, Spread] | Mapping[str, PairedTest]) -> dict[str, Any]:
    return {metric: value.to_json() for metric, value in metrics.items()}


def pick(classes: ClassMetrics, scope: Scope, metric: str) -> float:
    """Value of a class, or the mean over the classes in which it is defined."""
    if scope is not None:
        return classes[scope][metric]
    return finite_mean(row[metric] for row in classes.values())


def nullable(value: float) -> float | None:
    """None for NaN, which JSON does not have."""
    return value if math.isfinite(value) else None
