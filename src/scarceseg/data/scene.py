"""The canvas synthetic volumes are painted on: warped coordinates, random smooth shapes, soft-edged images, labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.interpolate import BSpline
from scipy.spatial.transform import Rotation

from scarceseg.types import LabelMap, Volume

Field = NDArray[np.float32]
Box = tuple[slice, slice, slice]
Shape = tuple[Box, Field]
"""A box of voxels, and in each of them the (approximate) distance to the shape's surface: negative inside."""

FAR = np.float32(9)
"""A distance beyond the whole scene."""
REACH = 0.15
"""Distances are right at least so far outside of a shape."""


def smooth_fields(rng: np.random.Generator, shape: Sequence[int], count: int, cells: int | Sequence[int]) -> Field:
    """Random smooth functions: cubic B-splines with normal coefficients on a coarse grid.

    Args:
        rng: source of the coefficients.
        shape: voxels ``(X, Y, Z)``.
        count: number of functions.
        cells: spline pieces along each axis (one number, or one an axis); more is rougher.

    Returns:
        ``[count, X, Y, Z]`` of about unit variance.
    """
    pieces = (cells,) * 3 if isinstance(cells, int) else tuple(cells)
    fields: Field = rng.standard_normal((count, *(n + 3 for n in pieces)), dtype=np.float32)
    fields /= np.float32((151 / 315) ** 1.5)  # 151/315: mean sum of squares of the cubic basis along one axis
    for size, n in zip(shape, pieces, strict=True):
        knots = np.arange(-3, n + 4, dtype=np.float64) / n
        basis = BSpline.design_matrix((np.arange(size) + 0.5) / size, knots, 3).toarray().astype(np.float32)
        # Contracts the axis in front and appends it behind: after three turns the order is X, Y, Z again.
        fields = np.tensordot(fields, basis, axes=(1, 1))
    return fields


class Scene:
    """Canvas of one case: warped coordinates, images without noise, and the label painted so far.

    Shapes are given in the scene's frame, ``[-1, 1]`` along each axis of the volume before the case's own pose and
    warp. Each gets jitter of its own.

    Args:
        rng: all randomness comes from it.
        shape: voxels ``(X, Y, Z)``.
        variety: factor on all jitter of poses and shapes.
        levels: intensity of each tissue in each channel ``[C]``; the canvas starts with ``levels["air"]``.
        labels: label value of each structure; one that is not in it is painted as background.

    Attributes:
        image: ``[C, X, Y, Z]``.
        label: ``[X, Y, Z]``.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        shape: tuple[int, int, int],
        variety: float,
        levels: Mapping[str, NDArray[np.float64]],
        labels: Mapping[str, int],
    ) -> None:
        self.rng, self.variety, self.levels, self.labels = rng, variety, levels, labels
        warp = smooth_fields(rng, shape, 3, 4) * np.float32(0.025 * variety)
        axes = [((2 * np.arange(n) + 1) / n - 1).astype(np.float32) for n in shape]
        grid: Sequence[Field] = np.meshgrid(*axes, indexing="ij", sparse=True)
        turn = Rotation.from_euler("xyz", rng.normal(0, 3.5 * variety, 3), degrees=True).as_matrix()
        turn = turn / np.exp(rng.normal(0, 0.04 * variety, 3))[:, None]
        shift = rng.normal(0, 0.035 * variety, 3)
        grid = [axis - np.float32(s) for axis, s in zip(grid, shift, strict=True)]
        self._at: list[Field] = [_weighted(turn[i], grid) + warp[i] for i in range(3)]
        self._bumps = smooth_fields(rng, shape, 1, 6)[0]
        # Range of each warped coordinate in each slab of voxels: finds the box that can hold a structure.
        others = [tuple(a for a in range(3) if a != axis) for axis in range(3)]
        self._low = [self._at[i].min(axis=others[i]) for i in range(3)]
        self._high = [self._at[i].max(axis=others[i]) for i in range(3)]
        self._voxel = float(np.mean([2 / n for n in shape]))
        self.image: Volume = np.empty((len(levels["air"]), *shape), np.float32)
        self.image[:] = levels["air"][:, None, None, None]
        self.label: LabelMap = np.zeros(shape, np.uint8)

    def _near(self, low: NDArray[np.float64], high: NDArray[np.float64]) -> Box:
        """The voxels whose coordinates can lie between two corners, with `REACH` around."""
        box = []
        for axis in range(3):
            found = (self._low[axis] <= high[axis] + REACH) & (self._high[axis] >= low[axis] - REACH)
            inside = np.flatnonzero(found)
            box.append(slice(int(inside[0]), int(inside[-1]) + 1) if inside.size else slice(0, 0))
        return box[0], box[1], box[2]

    def ellipsoid(
        self,
        centre: Sequence[float],
        radii: Sequence[float],
        turn_deg: float = 0.0,
        power: float = 2.0,
        bump: float = 0.0,
    ) -> Shape:
        """A jittered, turned, bumpy ellipsoid, or superellipsoid of another `power`; `turn_deg` is about the z axis."""
        rng = self.rng
        c = np.asarray(centre) + rng.normal(0, 0.015 * self.variety, 3)
        r = np.asarray(radii) * np.exp(rng.normal(0, 0.055 * self.variety, 3))
        angles = rng.normal(0, 5.5 * self.variety, 3) + np.array([0, 0, turn_deg])
        turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
        corner = np.abs(turn) @ r if power > 2 else np.sqrt(turn**2 @ r**2)
        box = self._near(c - corner, c + corner)
        offsets = [self._at[i][box] - np.float32(c[i]) for i in range(3)]
        total: Field = np.zeros_like(offsets[0])
        for axis in range(3):
            local = _weighted(turn[:, axis] / r[axis], offsets)
            total += np.square(local) if power == 2 else np.abs(local) ** np.float32(power)
        radius = np.sqrt(total) if power == 2 else total ** np.float32(1 / power)
        distance: Field = (radius - 1) * np.float32(r.min())
        return box, distance + np.float32(bump * self.variety) * self._bumps[box]

    def tube(self, points: Sequence[Sequence[float]], start: float, end: float) -> Shape:
        """A tube through jittered `points` (the first keeps its place) whose radius goes from `start` to `end`."""
        rng = self.rng
        knots = np.asarray(points, dtype=np.float64)
        knots[1:] += rng.normal(0, 0.018 * self.variety, knots[1:].shape)
        radii = np.array([start, end]) * np.exp(rng.normal(0, 0.055 * self.variety))
        if len(knots) > 2:
            steps = max(len(knots), round(float(np.linalg.norm(np.diff(knots, axis=0), axis=1).sum()) / 0.2))
            knots = ndimage.zoom(knots, (steps / len(knots), 1), order=2)
        widths = np.linspace(radii[0], radii[1], len(knots))
        ends = zip(knots[:-1], knots[1:], widths[:-1], widths[1:], strict=True)
        return union(*(self._segment(a, b, ra, rb) for a, b, ra, rb in ends))

    def _segment(self, a: NDArray[np.float64], b: NDArray[np.float64], ra: float, rb: float) -> Shape:
        wide = max(ra, rb)
        box = self._near(np.minimum(a, b) - wide, np.maximum(a, b) + wide)
        offsets = [self._at[i][box] - np.float32(a[i]) for i in range(3)]
        along = b - a
        t = np.clip(_weighted(along / max(float(along @ along), 1e-6), offsets), 0, 1)
        squares: Field = np.zeros_like(t)
        for axis in range(3):
            squares += np.square(offsets[axis] - t * np.float32(along[axis]))
        return box, np.sqrt(squares) - (np.float32(ra) + t * np.float32(rb - ra))

    def paint(self, shape: Shape, tissue: str, structure: str | None = None) -> None:
        """Put a shape over what is there. Border voxels mix both; the label changes where the distance is negative."""
        box, distance = shape
        share = np.clip(np.float32(0.5) - distance / np.float32(self._voxel), 0, 1)
        offset = self.rng.normal(0, 0.01 * self.variety) if structure else 0.0
        for channel, level in zip(self.image, self.levels[tissue], strict=True):
            part = channel[box]
            part += share * (np.float32(level + offset) - part)
        self.label[box][distance < 0] = self.labels.get(structure or "", 0)

    def lesion(self, shape: Shape) -> None:
        """A spot of another intensity well inside of a shape; the label stays."""
        box, distance = shape
        inside = np.argwhere(distance < -0.04)
        if not len(inside):
            return
        centre = tuple(inside[self.rng.integers(len(inside))])
        apart = np.zeros_like(distance)
        for axis in range(3):
            apart += np.square(self._at[axis][box] - self._at[axis][box][centre])
        spot = np.maximum(np.sqrt(apart) - np.float32(self.rng.uniform(0.06, 0.11)), distance + np.float32(0.02))
        share = np.clip(np.float32(0.5) - spot / np.float32(self._voxel), 0, 1)
        change = np.float32(self.rng.choice([-1, 1]) * self.rng.uniform(0.15, 0.3))
        for channel in self.image:
            channel[box] += share * change


def grown(shape: Shape, by: float) -> Shape:
    """The shape with its surface moved outwards (at most `REACH`), or inwards for a negative value."""
    return shape[0], shape[1] - np.float32(by)


def clipped(shape: Shape, within: Shape) -> Shape:
    """The part of a shape that lies inside of another one, on the box that both have in common."""
    pairs = list(zip(shape[0], within[0], strict=True))
    box = [slice(max(a.start, b.start), max(min(a.stop, b.stop), a.start, b.start)) for a, b in pairs]
    a, b = (
        part[tuple(slice(s.start - o.start, s.stop - o.start) for s, o in zip(box, outer, strict=True))]
        for outer, part in (shape, within)
    )
    return (box[0], box[1], box[2]), np.maximum(a, b)


def union(*shapes: Shape) -> Shape:
    """One shape out of several: the least of their distances, on the box around their boxes."""
    filled = [shape for shape in shapes if shape[1].size] or [shapes[0]]
    box = [slice(min(s[0][a].start for s in filled), max(s[0][a].stop for s in filled)) for a in range(3)]
    distance = np.full([s.stop - s.start for s in box], FAR)
    for inner, part in filled:
        here = tuple(slice(i.start - o.start, i.stop - o.start) for i, o in zip(inner, box, strict=True))
        np.minimum(distance[here], part, out=distance[here])
    return (box[0], box[1], box[2]), distance


def _weighted(weights: NDArray[np.float64], fields: Sequence[Field]) -> Field:
    """Sum of three fields with three weights."""
    a, b, c = (np.float32(weight) * field for weight, field in zip(weights, fields, strict=True))
    return a + b + c
