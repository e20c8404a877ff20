"""Ramps and schedules against the equations, written once more."""

from __future__ import annotations

import pytest

from scarceseg.functional import ramps
from tests.reference import ramps as reference


@pytest.mark.parametrize("name", sorted(ramps.RAMPS))
@pytest.mark.parametrize(("total", "parts"), [(6000, 40), (1000, 40), (77, 10)])
def test_ramps(name: str, total: int, parts: int) -> None:
    for t in (0, 1, total // 40, total // 3, total // 2, total - 1):
        assert ramps.RAMPS[name](t, total, parts) == pytest.approx(reference.RAMPS[name](t, total, parts), rel=1e-12)


def test_every_ramp_has_a_reference_and_a_course() -> None:
    assert set(ramps.RAMPS) == set(reference.RAMPS)
    for name, ramp in ramps.RAMPS.items():
        course = [ramp(t, 6000, 40) for t in range(0, 6000, 150)]
        assert all(0 < value <= 1 for value in course)
        assert course == sorted(course, reverse=name.endswith("-down"))
    assert (
        ramps.RAMPS["laine"](149, 6000, 40) == ramps.RAMPS["laine"](0, 6000, 40) < ramps.RAMPS["laine"](150, 6000, 40)
    )


def test_schedules() -> None:
    for t in (0, 1, 2499, 2500, 4999, 5000, 5999):
        assert ramps.step_lr(t, 0.01, 2500, 0.1) == pytest.approx(reference.step_lr(t, 0.01, 2500, 0.1), rel=1e-12)
        assert ramps.poly_lr(t, 6000, 0.01, 0.9) == pytest.approx(reference.poly_lr(t, 6000, 0.01, 0.9), rel=1e-12)


def test_weight_of_the_old_teacher() -> None:
    assert [ramps.ema_alpha(t, 0.99) for t in (0, 1, 3, 98, 99, 5000)] == pytest.approx(
        [0, 0.5, 0.75, 98 / 99, 0.99, 0.99]
    )
