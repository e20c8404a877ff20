"""Paired comparison of two methods on the same cases: Wilcoxon's signed-rank test, and Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

MIN_CASES = 6
"""With fewer pairs the two-sided test cannot fall below 0.05: 2 / 2**5 = 0.0625."""


@dataclass(frozen=True)
class PairedTest:
    """One method against another in one metric.

    Attributes:
        cases: number of pairs, cases in which both values are defined.
        difference: mean over those cases, method minus baseline; NaN without any.
        p: two-sided, or None when there are fewer than `MIN_CASES` pairs.
        p_holm: the same after Holm's correction over the methods that are compared, or None.
    """

    cases: int
    difference: float
    p: float | None = None
    p_holm: float | None = None

    def to_json(self) -> dict[str, Any]:
        """``{"cases", "difference", "p", "p_holm"}``, None where there is no value."""
        difference = None if math.isnan(self.difference) else self.difference
        return {"cases": self.cases, "difference": difference, "p": self.p, "p_holm": self.p_holm}


def paired_test(values: Mapping[str, float], baseline: Mapping[str, float]) -> PairedTest:
    """Wilcoxon's signed-rank test (Wilcoxon 1945) on the cases that both have.

    Cases without a difference are left out of the ranking, as Wilcoxon did; with no difference at all p is 1.

    Args:
        values, baseline: one value a case, averaged over seeds, NaN where it is undefined.
    """
    cases = [case for case in values if math.isfinite(values[case]) and math.isfinite(baseline.get(case, math.nan))]
    # Averages over seeds of equal values differ in their last bits; those are no differences.
    differences = np.round([values[case] - baseline[case] for case in cases], 12)
    mean = float(differences.mean()) if cases else math.nan
    if len(cases) < MIN_CASES:
        return PairedTest(len(cases), mean)
    moved = differences[differences != 0]
    return PairedTest(len(cases), mean, float(stats.wilcoxon(moved).pvalue) if len(moved) else 1.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Holm 1979): adjusted p-values in the order given, each in [0, 1].

    The smallest of m is multiplied by m, the next by m - 1 and so on; none falls below its predecessor.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def corrected(tests: Sequence[PairedTest]) -> list[PairedTest]:
    """The tests with `p_holm` filled in, over those that have a p."""
    with_p = [index for index, test in enumerate(tests) if test.p is not None]
    found = dict(zip(with_p, holm([tests[index].p or 0.0 for index in with_p]), strict=True))
    return [replace(test, p_holm=found.get(index)) for index, test in enumerate(tests)]
