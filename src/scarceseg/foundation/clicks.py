"""Where the next click goes when one mask is to become another: the published click samplers, on any two masks.

The masks may be a model's answer and a student's prediction, two models' answers, or, in an evaluation, an answer and a
reference. In training, `target` is never the reference label of an unlabelled case: such a case has none.

Errors are *false negatives* (in `target` alone; a click there has label 1) and *false positives* (in `prediction` alone;
label 0).
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from scipy import ndimage

from scarceseg.errors import ConfigError, DataError

Style = Literal["ritm", "random", "largest"]
Click = tuple[tuple[int, int, int], int]
"""Voxel index ``(x, y, z)`` and label: 1 inside, 0 outside."""


def error_distances(
    prediction: torch.Tensor, target: torch.Tensor, spacing_mm: tuple[float, float, float] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """How deep each false-negative and each false-positive voxel lies in its error region.

    Args:
        prediction: mask ``[X, Y, Z]``, bool or 0 and 1.
        target: mask of the same size; never a reference label of an unlabelled case.
        spacing_mm: distances in millimetres of these voxels; None measures in voxels.

    Returns:
        Euclidean distance of the centre of each false-negative voxel to the nearest voxel outside the false negatives, and the
        same for the false positives: two maps ``[X, Y, Z]`` float32, 0 elsewhere. All that lies beyond the volume counts as
        outside.

    Raises:
        DataError: no 3D masks, or different sizes.
    """
    predicted, wanted = _masks(prediction, target)
    return _depth(wanted & ~predicted, spacing_mm), _depth(predicted & ~wanted, spacing_mm)


def ritm_region(
    prediction: torch.Tensor, target: torch.Tensor, spacing_mm: tuple[float, float, float] | None = None
) -> tuple[torch.Tensor, bool]:
    """Heart of the deeper kind of error (Sofiiuk et al., "Reviving iterative training with mask guidance", ICIP 2022).

    The kind whose distance map has the larger maximum is taken, false positives when they are equal; the region is where that map
    is above half of its maximum.

    Args:
        prediction, target, spacing_mm: see `error_distances`.

    Returns:
        Region ``[X, Y, Z]`` bool, empty when the masks are equal, and whether it lies in the false negatives (a click there has
        label 1).

    Raises:
        DataError: no 3D masks, or different sizes.
    """
    false_negative, false_positive = error_distances(prediction, target, spacing_mm)
    positive = bool(false_negative.max() > false_positive.max())
    depth = false_negative if positive else false_positive
    return depth > depth.max() / 2, positive


def random_region(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """All error voxels ``[X, Y, Z]`` bool; the label of a click there is the target's value.

    Args:
        prediction, target: see `error_distances`.

    Raises:
        DataError: no 3D masks, or different sizes.
    """
    predicted, wanted = _masks(prediction, target)
    return predicted ^ wanted


def next_click(
    prediction: torch.Tensor,
    target: torch.Tensor,
    generator: torch.Generator | None = None,
    style: Style = "ritm",
    spacing_mm: tuple[float, float, float] | None = None,
) -> Click | None:
    """One click that corrects `prediction` towards `target`.

    Args:
        prediction: mask ``[X, Y, Z]`` so far, bool or 0 and 1; all 0 before the first click.
        target: mask it should become; never a reference label of an unlabelled case.
        generator: source of chance for ``ritm`` and ``random``; None takes PyTorch's own.
        style: ``ritm`` draws from `ritm_region`, ``random`` from all error voxels, ``largest`` takes the deepest voxel of all
            errors, that is the centre of the largest ball that fits into one (no chance; the first such voxel in index order,
            false positives before false negatives).
        spacing_mm: measures depth in millimetres of these voxels instead of voxels.

    Returns:
        Voxel index and label, or None when the masks are equal.

    Raises:
        DataError: no 3D masks, or different sizes.
        ConfigError: unknown style.
    """
    if style not in get_args(Style):
        raise ConfigError(f"style of clicks: expected {', '.join(get_args(Style))}, got {style!r}")
    if style == "random":
        region = random_region(prediction, target)
    elif style == "ritm":
        region, _ = ritm_region(prediction, target, spacing_mm)
    else:
        false_negative, false_positive = error_distances(prediction, target, spacing_mm)
        depth = false_negative if false_negative.max() > false_positive.max() else false_positive
        region = (depth == depth.max()) & (depth > 0)
    places = region.nonzero()
    if len(places) == 0:
        return None
    pick = 0
    if style != "largest":
        device = "cpu" if generator is None else generator.device
        pick = int(torch.randint(len(places), (1,), generator=generator, device=device))
    x, y, z = (int(value) for value in places[pick])
    return (x, y, z), int(bool(target[x, y, z]))


def _masks(prediction: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if prediction.ndim != 3 or prediction.shape != target.shape or 0 in prediction.shape:
        raise DataError(
            f"clicks: expected two masks [X, Y, Z] of one size, got {list(prediction.shape)} and {list(target.shape)}"
        )
    return prediction != 0, (target != 0).to(prediction.device)


def _depth(region: torch.Tensor, spacing_mm: tuple[float, float, float] | None) -> torch.Tensor:
    depth = torch.zeros(region.shape, device=region.device)
    places = region.nonzero()
    if len(places) == 0:
        return depth
    # A rim of one voxel around the region's box is enough: whatever lies further out lies behind a voxel of the rim.
    box = tuple(slice(int(low), int(high) + 1) for low, high in zip(places.amin(0), places.amax(0), strict=True))
    inside = np.pad(region[box].cpu().numpy(), 1)
    distance = ndimage.distance_transform_edt(inside, sampling=spacing_mm)[1:-1, 1:-1, 1:-1]
    depth[box] = torch.from_numpy(distance.astype(np.float32)).to(depth.device)
    return depth
