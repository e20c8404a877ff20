"""Masks as an unsure student draws them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from scarceseg.functional.spoilt import COARSE_AND_FINE, FINE, Grid, spoilt_masks


def balls(*radii: float) -> torch.Tensor:
    axes = torch.meshgrid(*(torch.arange(24) for _ in range(3)), indexing="ij")
    return torch.stack([sum((axis - 12) ** 2 for axis in axes) <= radius**2 for radius in radii])  # type: ignore[misc]


def overlaps(bumps: Mapping[Grid, float]) -> list[float]:
    targets, found = balls(5, 7, 9), []
    for seed in range(8):
        masks = spoilt_masks(targets, np.random.default_rng(seed), bumps)
        assert masks.shape == (3, 1, 24, 24, 24) and ((masks >= 0) & (masks <= 1)).all()
        drawn = masks[:, 0] > 0.5
        assert not torch.equal(drawn, targets)
        found += [float(2 * (d & t).sum() / (d.sum() + t.sum())) for d, t in zip(drawn, targets, strict=True)]
    return found


@pytest.mark.parametrize(("bumps", "alike"), [(FINE, 0.6), (COARSE_AND_FINE, 0.4)])
def test_they_resemble_their_targets(bumps: Mapping[Grid, float], alike: float) -> None:
    found = overlaps(bumps)
    assert np.mean(found) > alike and min(found) < 0.9


def test_larger_bumps_spoil_more() -> None:
    assert np.mean(overlaps({(3, 3, 3): 1.5})) < np.mean(overlaps({(3, 3, 3): 0.1})) - 0.05


def test_the_same_draws_give_the_same_masks() -> None:
    first, again, other = (spoilt_masks(balls(6), np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
