"""Slow, obvious mosaics of slices: one loop over slices, one over pixels, straight from the formulas."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Layout(NamedTuple):
    """Where the voxels of slice z go; rows and columns are given as pairs."""

    canvas: tuple[int, int]
    grid: tuple[int, int]
    cell: tuple[int, int]
    padding: tuple[int, int]
    origin: tuple[int, int]
    first_slot: int
    run: int


def published_layout(size: tuple[int, int, int], side: int) -> Layout:
    """SFR's script."""
    x, y, z = size
    n_row, n_col = side // y, side // x
    pw = round((side / n_row - y) / 2)
    ph = round((side / n_col - x) / 2)
    s_l, s_w = y + 2 * pw, x + 2 * ph
    ps = max(math.floor((n_row * n_col - z) / 2), 0)
    pww = math.floor((side - n_row * s_l) / 2)
    phh = math.floor((side - n_col * s_w) / 2)
    return Layout((side, side), (n_row, n_col), (s_l, s_w), (pw, ph), (pww, phh), ps, z)


def plane_of(volume: Array, axis: int, z: int) -> Array:
    """Slice z with the later axis along the rows."""
    return np.take(volume, z, axis=axis).T


def place_of(layout: Layout, z: int, row: int, column: int) -> tuple[int, int, int] | None:
    """Canvas, row and column of a voxel; None where it is cut off."""
    canvas, slot = z // layout.run, z % layout.run + layout.first_slot
    n_row, n_col = layout.grid
    if slot >= n_row * n_col:
        return None
    r = layout.origin[0] + (slot // n_col) * layout.cell[0] + layout.padding[0] + row
    c = layout.origin[1] + (slot % n_col) * layout.cell[1] + layout.padding[1] + column
    if not (0 <= r < layout.canvas[0] and 0 <= c < layout.canvas[1]):
        return None
    return canvas, r, c


def stitched(volume: Array, layout: Layout, fill: float, axis: int = 2) -> Array:
    """``[X, Y, Z]`` -> ``[N, rows, columns]``."""
    count = volume.shape[axis]
    out = np.full((math.ceil(count / layout.run), *layout.canvas), fill, dtype=volume.dtype)
    for z in range(count):
        for (row, column), value in np.ndenumerate(plane_of(volume, axis, z)):
            place = place_of(layout, z, row, column)
            if place is not None:
                assert out[place] == fill, "two voxels on one pixel"
                out[place] = value
    return out


def unstitched(canvases: Array, layout: Layout, size: tuple[int, int, int], fill: float, axis: int = 2) -> Array:
    """``[N, rows, columns]`` -> ``[X, Y, Z]``."""
    out = np.full(size, fill, dtype=canvases.dtype)
    for z in range(size[axis]):
        plane = plane_of(out, axis, z).copy()
        for row, column in np.ndindex(plane.shape):
            place = place_of(layout, z, row, column)
            if place is not None:
                plane[row, column] = canvases[place]
        index: list[Any] = [slice(None)] * 3
        index[axis] = z
        out[tuple(index)] = plane.T
    return out


def largest_scale(count: int, plane: tuple[int, int], canvas: tuple[int, int]) -> float:
    """The largest scale at which `count` slices fit a canvas, by trying every grid."""
    return max(
        min(canvas[0] / (rows * plane[0]), canvas[1] / (columns * plane[1]))
        for rows in range(1, count + 1)
        for columns in range(1, count + 1)
        if rows * columns >= count
    )


def resized(plane: Array, shape: tuple[int, int]) -> Array:
    """Linear interpolation to a larger or equal plane that has the same outer edges."""
    for axis, count in enumerate(shape):
        old = plane.shape[axis]
        at = np.clip((np.arange(count) + 0.5) * old / count - 0.5, 0, old - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, old - 1)
        weight = (at - low).reshape([-1 if i == axis else 1 for i in range(2)])
        plane = np.take(plane, low, axis) * (1 - weight) + np.take(plane, high, axis) * weight
    return plane
