"""Voxel grids: comparing them, turning them to one orientation, and resampling arrays from one grid to another.

Arrays are in index order ``[X, Y, Z]``. World coordinates are ITK's (LPS, millimetres).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

from scarceseg.types import Geometry

Array = NDArray[Any]

CANONICAL_DIRECTION = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)
"""Index axes that run to the patient's right, front and head: a NIfTI file with a positive diagonal affine has them."""

SAME_SPACING = 1e-3
"""Spacings whose ratio differs from one by less than this are taken as equal."""


def describe(geometry: Geometry) -> str:
    """Size, spacing, origin and direction in one line, for messages."""
    size = "x".join(str(n) for n in geometry.size)

    def numbers(values: Sequence[float]) -> str:
        return ", ".join(f"{value:.4g}" for value in values)

    return (
        f"size {size}, spacing ({numbers(geometry.spacing_mm)}) mm, origin ({numbers(geometry.origin)}), "
        f"direction ({numbers(geometry.direction)})"
    )


def same_geometry(a: Geometry, b: Geometry) -> bool:
    """Whether two grids lie on each other: equal size, spacing within 0.1 %, origin within 0.01 mm, direction 0.001."""
    return (
        a.size == b.size
        and np.allclose(a.spacing_mm, b.spacing_mm, rtol=SAME_SPACING, atol=0)
        and np.allclose(a.origin, b.origin, rtol=0, atol=1e-2)
        and np.allclose(a.direction, b.direction, rtol=0, atol=1e-3)
    )


def matrix(geometry: Geometry) -> NDArray[np.float64]:
    """The 3x3 direction matrix; column j is the world direction of index axis j."""
    return np.asarray(geometry.direction, dtype=np.float64).reshape(3, 3)


def to_world(geometry: Geometry, index: Sequence[float]) -> tuple[float, float, float]:
    """World position in mm of a (fractional) voxel index."""
    step = np.asarray(index, dtype=np.float64) * geometry.spacing_mm
    x, y, z = np.asarray(geometry.origin) + matrix(geometry) @ step
    return float(x), float(y), float(z)


def canonical_axes(geometry: Geometry) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Which index axis goes where, and which are then reversed, to come nearest `CANONICAL_DIRECTION`.

    Returns:
        ``(order, flip)``: new axis i is old axis ``order[i]``, reversed where ``flip[i]``.
    """
    probe = sitk.Image(1, 1, 1, sitk.sitkUInt8)
    probe.SetDirection(geometry.direction)
    turn = sitk.DICOMOrientImageFilter()
    # The letters are asked from the library, since their meaning has changed between its versions.
    turn.SetDesiredCoordinateOrientation(turn.GetOrientationFromDirectionCosines(CANONICAL_DIRECTION))
    turn.Execute(probe)
    a, b, c = turn.GetPermuteOrder()
    f, g, h = turn.GetFlipAxes()
    return (int(a), int(b), int(c)), (bool(f), bool(g), bool(h))


def orient_geometry(geometry: Geometry) -> Geometry:
    """The same voxels with axes in canonical order and sense; nothing is interpolated, oblique axes stay oblique."""
    order, flip = canonical_axes(geometry)
    first = [0, 0, 0]
    for axis, reverse in zip(order, flip, strict=True):
        first[axis] = geometry.size[axis] - 1 if reverse else 0
    directions = matrix(geometry)[:, list(order)] * np.where(flip, -1.0, 1.0)
    size, spacing = geometry.size, geometry.spacing_mm
    return Geometry(
        (size[order[0]], size[order[1]], size[order[2]]),
        (spacing[order[0]], spacing[order[1]], spacing[order[2]]),
        to_world(geometry, first),
        tuple(float(value) for value in directions.ravel()),
    )


def orient(array: Array, geometry: Geometry) -> Array:
    """A view of ``array [X, Y, Z]`` whose grid is ``orient_geometry(geometry)``."""
    order, flip = canonical_axes(geometry)
    return array.transpose(order)[tuple(slice(None, None, -1) if reverse else slice(None) for reverse in flip)]


def respace(geometry: Geometry, spacing_mm: Sequence[float]) -> Geometry:
    """The grid of another spacing over the same box.

    The two grids share the outer corner of the first voxel, not its centre, so that halving the resolution puts every
    new voxel exactly over a 2x2x2 block of old ones. Size is ``round(size * old / new)``, at least one; a last
    fraction of a voxel is kept when it is half a new voxel or more. Axes whose spacing differs by less than 0.1 %
    keep their own.
    """
    size, spacing, shift = [], [], []
    for count, old, wanted in zip(geometry.size, geometry.spacing_mm, spacing_mm, strict=True):
        new = old if abs(wanted / old - 1) < SAME_SPACING else float(wanted)
        size.append(count if new == old else max(int(np.floor(count * old / new + 0.5)), 1))
        spacing.append(new)
        shift.append((new / old - 1) / 2)
    return Geometry(
        (size[0], size[1], size[2]),
        (spacing[0], spacing[1], spacing[2]),
        to_world(geometry, shift),
        geometry.direction,
    )


def to_sitk(array: Array, geometry: Geometry) -> sitk.Image:
    """SimpleITK image of ``array [X, Y, Z]``; booleans become uint8."""
    array = array.view(np.uint8) if array.dtype == np.bool_ else array
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing(geometry.spacing_mm)
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    return image


def resample(array: Array, source: Geometry, target: Geometry, *, nearest: bool = False) -> Array:
    """Values of ``array [X, Y, Z]`` on another grid, found through world positions.

    Linear interpolation (or the nearest voxel); beyond the border the border voxel's value goes on, so that no zeros
    creep in and class probabilities keep their sum.

    Returns:
        ``[X', Y', Z']`` of ``target.size``; float32, or the input's type for `nearest`.
    """
    # The library's own extrapolation is nearest-neighbour along all three axes. A rim of copied border voxels keeps it
    # linear along the border, and reaches as far as two grids over the same box can differ.
    framed = np.pad(array, 1, mode="edge")
    sx, sy, sz = array.shape
    rim = Geometry((sx + 2, sy + 2, sz + 2), source.spacing_mm, to_world(source, (-1, -1, -1)), source.direction)
    image = to_sitk(framed, rim)
    moved = sitk.Resample(
        image,
        target.size,
        sitk.Transform(),
        sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear,
        target.origin,
        target.spacing_mm,
        target.direction,
        0.0,
        image.GetPixelID() if nearest else sitk.sitkFloat32,
        True,  # nearest-neighbour extrapolation further out
    )
    return sitk.GetArrayFromImage(moved).transpose(2, 1, 0)


def smooth_for(array: Array, source: Geometry, spacing_mm: Sequence[float]) -> Array:
    """Low-pass filter before a strong reduction, so that fine texture does not fold into the coarse grid.

    At ratio r = new / old linear interpolation averages over two voxels at most, which is right up to r = 2. Beyond it
    a Gaussian of variance (r^2 - 4) / 12 voxels^2 is applied first: together they have the variance of the mean over
    r voxels, and the filter vanishes where r reaches 2.
    """
    for axis, (old, new) in enumerate(zip(source.spacing_mm, spacing_mm, strict=True)):
        ratio = new / old
        if ratio > 2 * (1 + SAME_SPACING):
            sigma = float(np.sqrt((ratio**2 - 4) / 12))
            array = ndimage.gaussian_filter1d(array.astype(np.float32, copy=False), sigma, axis=axis, mode="nearest")
    return array
