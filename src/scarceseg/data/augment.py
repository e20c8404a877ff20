"""Augmentations: small bends that leave a patch or a volume in its frame, other contrasts, intensity curves of slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage

from scarceseg.data.crop import crop_padded, padded_size

Array = NDArray[Any]
Image = NDArray[np.float32]


def intensity_curve(image: Image, draw: np.random.Generator, points: int = 1000) -> Image:
    """Send intensities through a random rising curve from the darkest to the brightest value.

    The curve is a cubic Bezier curve through (0, 0) and (1, 1) with two random control points in the unit square, whose
    coordinates are sorted so that it rises (Zhou et al., Models Genesis, 2019, sec. 3.2; used by SFR's fine-tuning). The
    range of the intensities stays.

    Args:
        image: any shape; one slice, or one volume.
        draw: source of the random curve.
        points: of the table the curve is read from.
    """
    low, high = float(image.min()), float(image.max())
    if high <= low:
        return image.copy()
    control = np.sort(draw.random((2, 2)), axis=0)
    t = np.linspace(0.0, 1.0, points)[:, None]
    curve = 3 * (1 - t) ** 2 * t * control[0] + 3 * (1 - t) * t**2 * control[1] + t**3
    bent = np.interp((image - low) / (high - low), curve[:, 0], curve[:, 1])
    return (bent * (high - low) + low).astype(np.float32)


def curve_slices(image: Image, draw: np.random.Generator) -> Image:
    """Every slice ``[..., z]`` of every channel of ``[C, X, Y, Z]`` through a curve of its own."""
    bent = np.empty_like(image)
    for channel in range(image.shape[0]):
        for z in range(image.shape[-1]):
            bent[channel, ..., z] = intensity_curve(image[channel, ..., z], draw)
    return bent


def bend(
    image: Image,
    label: Array,
    size: Sequence[int],
    draw: np.random.Generator,
    strength: float = 1.0,
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
) -> tuple[Image, Array]:
    """A small random affine map and elastic bend of a whole volume, sampled on a grid of `size`. (ours)

    Entries of the matrix deviate from the identity by 0.08, the shift is 0.04 of the side and the elastic part, a cubic
    spline through 5x5x5 random vectors, 0.03 of the side, all standard deviations. Flips and quarter turns are left out:
    a model that knows a place by its position in the volume would lose it.

    Args:
        image: ``[C, X, Y, Z]``.
        label: ``[X, Y, Z]``; voxels that come from outside become 0.
        size: voxels of the result; the whole volume fills it.
        draw: source of the random map.
        strength: factor of all deviations; 0 only resamples.
        spacing_mm: of the volume's voxels, in which the affine map is drawn.

    Returns:
        Image ``[C, *size]`` (linear) and label ``[*size]`` (nearest).
    """
    shape = np.asarray(label.shape, dtype=float)
    grid = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in size), indexing="ij"))
    step = (shape / np.asarray(size))[:, None, None, None]
    grid = (grid + 0.5) * step - 0.5
    matrix = _near_identity(draw, strength, spacing_mm)
    centre = (shape - 1) / 2
    offset = centre - matrix @ centre + strength * draw.normal(0, 0.04, 3) * shape
    at = np.tensordot(matrix, grid, 1) + offset[:, None, None, None]
    for axis in range(3):
        coarse = draw.normal(0, 1, (5, 5, 5))
        at[axis] += strength * 0.03 * shape[axis] * ndimage.zoom(coarse, np.asarray(size) / 5, order=3)
    moved = np.stack([ndimage.map_coordinates(c, at, order=1, mode="nearest") for c in image])
    return moved.astype(np.float32), ndimage.map_coordinates(label, at, order=0, mode="grid-constant", cval=0)


def deform(
    maps: Mapping[str, Array],
    start: Sequence[int],
    patch: Sequence[int],
    draw: np.random.Generator,
    strength: float = 1.0,
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
) -> dict[str, Array]:
    """A patch of a volume after a small random affine map and elastic bend, with another contrast. (ours)

    The deviations are those of `bend`, about the centre of the patch: 0.08 for an entry of the matrix, and 0.03 of the
    patch's sides for the elastic part, a cubic spline through 5x5x5 random vectors. What lies around the patch in the
    volume is seen where the map leads there; beyond the volume its border is repeated. A volume with a side shorter than the
    patch counts as padded with zeros (`scarceseg.data.crop`).

    Args:
        maps: ``image`` ``[C, X, Y, Z]`` (linear, and `contrast`) and other maps ``[..., X, Y, Z]`` of the same volume (nearest).
        start: first voxel of the patch, in the padded volume.
        patch: its voxels ``(X, Y, Z)``.
        draw: source of the random map.
        strength: factor of all deviations; 0 only crops.
        spacing_mm: of the voxels. The affine map is drawn in mm, so that thick slices are not tilted more than thin ones.
    """
    sides = np.asarray(patch)
    matrix = _near_identity(draw, strength, spacing_mm)
    nodes = strength * 0.03 * sides[:, None, None, None] * draw.normal(0, 1, (3, _NODES, _NODES, _NODES))
    centre = (sides - 1) / 2
    axes = [np.arange(side, dtype=np.float32) - middle for side, middle in zip(sides, centre, strict=True)]
    at = np.tensordot(matrix.astype(np.float32), np.stack(np.meshgrid(*axes, indexing="ij")), 1)
    spline = [_spline(int(side)) for side in patch]
    at += np.einsum("cijk,xi,yj,zk->cxyz", nodes.astype(np.float32), *spline, optimize=True)
    at += (np.asarray(start) + centre).astype(np.float32)[:, None, None, None]
    first, size, where = _around(at, padded_size(maps["image"].shape[-3:], patch))
    moved = {}
    for key, value in maps.items():
        part = np.ascontiguousarray(crop_padded(value, first, size, patch))
        flat = torch.from_numpy(part.reshape(1, -1, *part.shape[-3:]).astype(np.float32))
        mode = "bilinear" if key == "image" else "nearest"
        seen = F.grid_sample(flat, where, mode, "border", align_corners=False)[0].numpy()
        moved[key] = seen.reshape(*part.shape[:-3], *patch).astype(value.dtype)
    if strength:
        moved["image"] = contrast(moved["image"], draw)
    return moved


def _near_identity(draw: np.random.Generator, strength: float, spacing_mm: Sequence[float]) -> NDArray[np.float64]:
    """A random affine map of voxels whose deviations from the identity are alike in mm."""
    spacing = np.asarray(spacing_mm, dtype=float)
    matrix: NDArray[np.float64] = np.eye(3) + strength * draw.normal(0, 0.08, (3, 3)) * (spacing / spacing[:, None])
    return matrix


_NODES = 5


@lru_cache
def _spline(side: int) -> Image:
    """Cubic spline ``[side, nodes]`` that sends values at the nodes to the voxels of a side."""
    return np.stack([ndimage.zoom(row, side / _NODES, order=3) for row in np.eye(_NODES, dtype=np.float32)], 1)


def _around(at: Image, size: Sequence[int]) -> tuple[list[int], list[int], torch.Tensor]:
    """First voxel and size of the block of a volume of `size` in which the places ``[3, *patch]`` lie, and the places as
    `grid_sample` wants them."""
    first, sides, where = [], [], []
    for places, side in zip(at, size, strict=True):
        low = int(np.clip(np.floor(places.min()), 0, side - 1))
        high = int(np.clip(np.ceil(places.max()) + 1, low + 1, side))
        first.append(low)
        sides.append(high - low)
        where.append((places - low + 0.5) * (2 / (high - low)) - 1)
    return first, sides, torch.from_numpy(np.stack(where[::-1], -1).astype(np.float32))[None]


def contrast(image: Image, draw: np.random.Generator) -> Image:
    """Another contrast, brightness and noise level for each channel of z-scored ``[C, X, Y, Z]``. (ours)

    Power 0.75 .. 1.33 of the distance from zero, gain 0.8 .. 1.2, shift with standard deviation 0.15, noise of up to 0.15.
    """
    changed = np.empty_like(image)
    for channel, values in zip(changed, image, strict=True):
        curve = np.sign(values) * np.abs(values) ** draw.uniform(0.75, 1.33)
        noise = draw.normal(0, draw.uniform(0, 0.15), values.shape)
        channel[...] = curve * draw.uniform(0.8, 1.2) + draw.normal(0, 0.15) + noise
    return changed
