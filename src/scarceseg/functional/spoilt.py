"""Masks spoilt as an unsure student draws them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F

Grid = tuple[int, int, int]
FINE: Mapping[Grid, float] = {(6, 6, 5): 0.5}
COARSE_AND_FINE: Mapping[Grid, float] = {(6, 6, 6): 0.7, (3, 3, 3): 0.35}
"""Holes and islands of both sizes, as a student of few labels leaves them."""


def spoilt_masks(target: torch.Tensor, rng: np.random.Generator, bumps: Mapping[Grid, float] = FINE) -> torch.Tensor:
    """Masks like those of an unsure student: moved, grown or shrunk, with smooth holes and islands. (ours)

    Args:
        target: ``[R, X, Y, Z]`` bool.
        rng: all randomness comes from it.
        bumps: nodes of smooth random fields along each axis, and the most that each may lift the mask by.

    Returns:
        Probabilities ``[R, 1, X, Y, Z]``.
    """
    soft = F.avg_pool3d(target.float()[:, None], 5, stride=1, padding=2)
    fields = [
        F.interpolate(
            torch.from_numpy(rng.standard_normal((len(target), 1, *nodes), dtype=np.float32)).to(target.device),
            size=target.shape[1:],
            mode="trilinear",
            align_corners=False,
        )
        for nodes in bumps
    ]
    level = torch.from_numpy(rng.uniform(-0.25, 0.25, (len(target), 1, 1, 1, 1)).astype(np.float32)).to(target.device)
    moved = torch.roll(soft, tuple(int(s) for s in rng.integers(-2, 3, 3)), (2, 3, 4))
    lifted = moved - 0.5 + level
    for field, most in zip(fields, bumps.values(), strict=True):
        lifted = lifted + float(rng.uniform(0, most)) * field
    return torch.sigmoid(lifted * float(rng.uniform(4, 12)))
