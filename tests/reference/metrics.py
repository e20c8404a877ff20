"""Metrics of binary masks, voxel by voxel and pair by pair, from the definitions."""

from __future__ import annotations

import math

import numpy as np


def surface_points(mask: np.ndarray) -> list[tuple[int, ...]]:
    """Voxels of the mask with a face neighbour that is background or outside of the array."""
    points: list[tuple[int, ...]] = []
    for voxel in np.ndindex(mask.shape):
        if not mask[voxel]:
            continue
        for axis in range(mask.ndim):
            for step in (-1, 1):
                at = list(voxel)
                at[axis] += step
                outside = not 0 <= at[axis] < mask.shape[axis]
                if (outside or not mask[tuple(at)]) and voxel not in points[-1:]:
                    points.append(voxel)
    return points


def distances(start: np.ndarray, target: np.ndarray, spacing: tuple[float, ...]) -> list[float]:
    """Of each surface voxel of `start`, to the nearest surface voxel of `target`, by trying all."""
    ends = surface_points(target)
    return [
        min(math.sqrt(sum(((a - b) * s) ** 2 for a, b, s in zip(p, q, spacing, strict=True))) for q in ends)
        for p in surface_points(start)
    ]


def percentile(values: list[float], q: float) -> float:
    """With linear interpolation between the two nearest ranks."""
    ordered = sorted(values)
    rank = q / 100 * (len(ordered) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (rank - low) * (ordered[high] - ordered[low])


def metrics(prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...]) -> dict[str, float]:
    """Dice, Jaccard, ASD, ASSD and HD95 with the conventions for empty masks."""
    p = {voxel for voxel in np.ndindex(prediction.shape) if prediction[voxel]}
    r = {voxel for voxel in np.ndindex(reference.shape) if reference[voxel]}
    if not p and not r:
        return {"dice": 1.0, "jaccard": 1.0, "asd": 0.0, "assd": 0.0, "hd95": 0.0}
    overlap = {"dice": 2 * len(p & r) / (len(p) + len(r)), "jaccard": len(p & r) / len(p | r)}
    if not p or not r:
        return overlap | {"asd": math.nan, "assd": math.nan, "hd95": math.nan}
    there, back = distances(prediction, reference, spacing), distances(reference, prediction, spacing)
    return overlap | {
        "asd": sum(there) / len(there),
        "assd": sum(there + back) / len(there + back),
        "hd95": percentile(there + back, 95),
    }
