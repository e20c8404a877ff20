"""Made-up bodies for the tests of this folder: the same organs, placed in differently shaped bodies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from scarceseg.data.geometry import orient, orient_geometry, to_world
from scarceseg.data.prepare import PreparedCase
from scarceseg.types import Geometry, LabelMap, Volume

RAS = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)
FEET_FIRST = (0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
"""Axes permuted and partly reversed against the canonical ones."""


def grid(
    size: tuple[int, int, int] = (33, 30, 27),
    spacing_mm: tuple[float, float, float] = (2.0, 2.0, 2.0),
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0),
    direction: tuple[float, ...] = RAS,
) -> Geometry:
    return Geometry(size, spacing_mm, origin, direction)


def body_points(geometry: Geometry) -> NDArray[np.float64]:
    """Position of every voxel from the middle of the box along canonical axes, in mm: ``[3, X, Y, Z]``."""
    turned = orient_geometry(geometry)
    middle = [(n - 1) / 2 for n in turned.size]
    steps = [(np.arange(n) - m) * s for n, m, s in zip(turned.size, middle, turned.spacing_mm, strict=True)]
    canonical = np.stack(np.meshgrid(*steps, indexing="ij"))
    points = np.empty((3, *geometry.size))
    for row, values in zip(points, canonical, strict=True):
        orient(row, geometry)[...] = values  # a view: writes through to the file's own axes
    return points


def bend(points: NDArray[np.float64], amount: float) -> NDArray[np.float64]:
    """A smooth deformation; `amount` is the largest displacement in mm."""
    x, y, z = points
    return points + amount * np.stack([np.sin(y / 11), np.sin(z / 9 + 1), np.sin(x / 13 - 0.5)])


def body(
    geometry: Geometry,
    matrix: NDArray[np.float64] | None = None,
    shift: tuple[float, float, float] = (0, 0, 0),
    bent: float = 0.0,
    contrast: float = 1.0,
    seed: int = 0,
) -> tuple[Volume, LabelMap]:
    """Image and label of the body on a grid; organs 1 and 2, and unlabelled structure around them.

    Args:
        geometry: grid.
        matrix, shift: point p of this scan shows the point ``matrix @ p + shift`` of the body (mm).
        bent: of `bend`, before the matrix.
        contrast: negative reverses light and dark.
        seed: of the noise.
    """
    points = bend(body_points(geometry), bent)
    points = np.einsum("ij,jxyz->ixyz", np.eye(3) if matrix is None else matrix, points)
    x, y, z = points + np.reshape(shift, (3, 1, 1, 1))
    image = 0.3 * np.sin(x / 5.0) * np.cos(y / 6.0) * np.sin(z / 5.5 + 0.7)
    image += (x / 27) ** 2 + (y / 25) ** 2 + (z / 22) ** 2 < 1
    first = ((x + 8) / 10) ** 2 + ((y - 3) / 8) ** 2 + ((z + 1) / 9) ** 2 < 1
    second = ((x - 9) / 7) ** 2 + ((y + 4) / 9) ** 2 + ((z - 2) / 8) ** 2 < 1
    image = image + 1.0 * first - 0.8 * second
    image = ndimage.gaussian_filter(image, [0.7 * 2 / s for s in geometry.spacing_mm])
    noise = np.random.default_rng(seed).normal(scale=0.05, size=geometry.size)
    label = np.where(first, 1, np.where(second, 2, 0)).astype(np.uint8)
    return (contrast * image + noise).astype(np.float32)[None], label


def case(name: str, geometry: Geometry, label: bool = True, **how: Any) -> PreparedCase:
    image, organs = body(geometry, **how)
    return PreparedCase(name, image, organs if label else None, geometry, geometry)


def without_label(known: PreparedCase) -> PreparedCase:
    return replace(known, label=None)


def dice(first: NDArray[Any], second: NDArray[Any], value: int) -> float:
    a, b = first == value, second == value
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


def world_of(geometry: Geometry, point: NDArray[np.float64]) -> tuple[float, float, float]:
    """World position of a point given in mm from the middle of the box along canonical axes."""
    turned = orient_geometry(geometry)
    index = np.asarray(point) / turned.spacing_mm + (np.array(turned.size) - 1) / 2
    return to_world(turned, index.tolist())
