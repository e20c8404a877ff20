"""Stitching: a volume laid out as one mosaic of its slices, and cut back again (Li et al., SFR, TMI 2025, section III-B).

A 2D model that sees all slices at once sees what is above and below a slice, always at the same distance and direction. Slices
stand row by row in slice order, as equal tiles. Cells without a slice hold a fill value in an image and the ignore label in a
label map, so that no loss reads them.

Everything is padding, reshaping and permuting of tensors: gradients pass, any device and type will do, and no Python loop runs
over the slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F

from scarceseg.errors import ConfigError, DataError
from scarceseg.types import IGNORE_LABEL, ImageBatch, LabelBatch

Pair = tuple[int, int]


@dataclass(frozen=True)
class Stitch:
    """A layout of the slices of a volume on one or several canvases; made by `fit` or `published`.

    Slice z stands on canvas ``z // run`` in slot ``k = first_slot + z % run``, which is cell ``(k // n_col, k % n_col)``. Its
    rows are the later and its columns the earlier of the two other axes: along Z a tile is ``V[:, :, z]`` transposed. Pixel
    (r, c) of a tile lies at ``origin + cell * (row, column) + padding + (r, c)``. What falls outside the canvas is cut off,
    and so is a slice whose slot lies behind the last cell; with `fit` neither happens.

    B volumes on N canvases each give ``[B*N, ...]``, volume by volume: canvas n of volume b is row ``b * N + n``.

    Attributes:
        size: voxels (X, Y, Z) of the volume.
        canvas: rows and columns of a canvas in pixels.
        grid: rows and columns of a canvas in cells.
        cell: rows and columns of a cell in pixels.
        tile: rows and columns of pixels that a slice takes; equal to its voxels unless slices are resized.
        run: slices on one canvas (fewer on the last).
        canvases: N, canvases of one volume.
        first_slot: empty cells before the first slice.
        axis: index axis along which the volume is sliced.
    """

    size: tuple[int, int, int]
    canvas: Pair
    grid: Pair
    cell: Pair
    tile: Pair
    run: int
    canvases: int = 1
    first_slot: int = 0
    axis: int = 2

    @staticmethod
    def fit(
        size: Sequence[int],
        canvas: int | Sequence[int],
        *,
        grid: Sequence[int] | None = None,
        canvases: int | None = None,
        resize: bool = False,
        axis: int = 2,
    ) -> Stitch:
        """The layout that holds every slice, on as few canvases and in as coarse a grid as possible.

        For square slices on a square canvas the grid is the paper's ``d x d``, ``d = ceil(sqrt(Z))``. Cells have
        ``canvas // grid`` pixels and slices stand in their middle. When the slices do not fit one canvas at full size, each
        canvas takes a run of consecutive slices; all runs but the last are equally long.

        Args:
            size: voxels (X, Y, Z).
            canvas: pixels of a canvas: side, or (rows, columns).
            grid: rows and columns of cells; None chooses them.
            canvases: at most so many canvases, to spread slices over more than needed; None takes as few as possible.
            resize: scale each slice, up or down, until it fills its cell; one canvas then holds any volume.
            axis: index axis along which the volume is sliced.

        Raises:
            ConfigError: a size that is not positive, slices larger than the canvas, or a grid and a number of canvases
                that do not hold all slices.
        """
        size, canvas = _checked(size, canvas, axis)
        rows, columns, depth = _plane(size, axis)
        # A resized slice needs no more than a pixel.
        most = canvas if resize else (canvas[0] // rows, canvas[1] // columns)
        if 0 in most:
            raise ConfigError(
                f"slices of {rows}x{columns} do not fit a canvas of {canvas[0]}x{canvas[1]} pixels: cut the volume into "
                "patches, take a larger canvas, or let slices be resized"
            )
        if grid is not None:
            most = _given_grid(grid, most)
        room = most[0] * most[1]
        fewest = -(-depth // room)
        count = fewest if canvases is None else canvases
        if not fewest <= count <= depth:
            raise ConfigError(
                f"{depth} slices, {most[0]}x{most[1]} on a canvas: expected {fewest} to {depth} canvases, got {count}"
            )
        run = -(-depth // count)
        cells = most if grid is not None else _coarsest_grid(run, (rows, columns), canvas, most)
        cell = (canvas[0] // cells[0], canvas[1] // cells[1])
        tile = cell if resize else (rows, columns)
        return Stitch(size, canvas, cells, cell, tile, run, -(-depth // run), axis=axis)

    @staticmethod
    def published(size: Sequence[int], canvas: int) -> Stitch:
        """The layout of SFR's script, pixel by pixel, for weights that were trained on its mosaics.

        The grid is as fine as the canvas allows (``canvas // side``, not ``ceil(sqrt(Z))``) and slices stand in its middle
        slots. The padding of a tile is rounded, so that the grid may be larger than the canvas and lose its rim. Slices
        beyond the last cell are dropped. `dropped` and `covered` tell what is lost.

        Differs from the authors' code: slices that are not square on a grid larger than the canvas follow the same formula;
        the script stops there or misplaces tiles.

        Args:
            size: voxels (X, Y, Z).
            canvas: side of the square canvas in pixels.

        Raises:
            ConfigError: a size that is not positive, or slices larger than the canvas.
        """
        size, sides = _checked(size, canvas, axis=2)
        rows, columns, depth = _plane(size, axis=2)
        if max(rows, columns) > canvas:
            raise ConfigError(f"slices of {rows}x{columns} do not fit a canvas of {canvas}x{canvas}: cut patches first")
        grid = (canvas // rows, canvas // columns)
        cell = (
            rows + 2 * round((canvas / grid[0] - rows) / 2),
            columns + 2 * round((canvas / grid[1] - columns) / 2),
        )
        first_slot = max((grid[0] * grid[1] - depth) // 2, 0)
        return Stitch(size, sides, grid, cell, (rows, columns), depth, first_slot=first_slot)

    @property
    def plane(self) -> Pair:
        """Rows and columns of a slice in voxels."""
        return _plane(self.size, self.axis)[:2]

    @property
    def scale(self) -> tuple[float, float]:
        """Pixels for one voxel along rows and columns."""
        return self.tile[0] / self.plane[0], self.tile[1] / self.plane[1]

    @property
    def padding(self) -> Pair:
        """Free pixels above and left of the tile in its cell."""
        return (self.cell[0] - self.tile[0]) // 2, (self.cell[1] - self.tile[1]) // 2

    @property
    def origin(self) -> Pair:
        """Row and column where the first cell begins; negative when the grid is larger than the canvas."""
        rows, columns = (s - n * cell for s, n, cell in zip(self.canvas, self.grid, self.cell, strict=True))
        return rows // 2, columns // 2

    @property
    def dropped(self) -> int:
        """Slices at the end of the volume that have no cell; always 0 for `fit`."""
        return max(self.first_slot + self.run - self.grid[0] * self.grid[1], 0)

    @property
    def resized(self) -> bool:
        """Whether slices are scaled; if not, cutting back is exact."""
        return self.tile != self.plane

    def stitch(self, volume: ImageBatch, fill: float = 0.0) -> torch.Tensor:
        """Lay volumes out.

        Args:
            volume: ``[B, C, X, Y, Z]`` of any type. Resized slices are interpolated bilinearly, low-pass filtered where they
                shrink; whole numbers become float32 then.
            fill: value of pixels that hold no voxel.

        Returns:
            ``[B*N, C, rows, columns]``.

        Raises:
            DataError: another number of axes or voxels.
        """
        slices = self._slices(volume, 5)
        return self._lay(_interpolate(slices, self.tile) if self.resized else slices, fill)

    def stitch_label(self, label: LabelBatch) -> torch.Tensor:
        """Lay label maps ``[B, X, Y, Z]`` out as ``[B*N, rows, columns]``, with 255 (ignore) where no voxel lies.

        Resized slices take the nearest voxel. The type stays; bool and int8, which cannot hold 255, become uint8.

        Raises:
            DataError: another number of axes or voxels.
        """
        if label.dtype in (torch.bool, torch.int8):
            label = label.to(torch.uint8)
        return self._lay(_nearest(self._slices(label, 4), self.tile), IGNORE_LABEL)[:, 0]

    def unstitch(self, canvas: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """Cut canvases back into volumes: the inverse of `stitch`, exact unless slices are resized.

        Args:
            canvas: ``[B*N, K, rows, columns]`` image, logits or probabilities. Resized slices are scaled back bilinearly,
                each by itself; probabilities keep their sum over the classes.
            fill: value of voxels without a pixel, which only the published layout has, for some sizes. With 0 the
                probabilities of such a voxel are 0 for every class; `covered` tells where.

        Returns:
            ``[B, K, X, Y, Z]``.

        Raises:
            DataError: another number of axes or pixels, or a number of canvases that is not a multiple of N.
        """
        tiles = self._cut(canvas, 4, fill)
        return self._volume(_interpolate(tiles, self.plane) if self.resized else tiles)

    def unstitch_label(self, canvas: torch.Tensor, fill: int = 0) -> torch.Tensor:
        """Cut label maps ``[B*N, rows, columns]`` back into ``[B, X, Y, Z]``; resized slices take the nearest pixel.

        Raises:
            DataError: as `unstitch`.
        """
        return self._volume(_nearest(self._cut(canvas, 3, fill), self.plane))[:, 0]

    def covered(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """``[X, Y, Z]`` bool, which voxels have a pixel: all of them, but for the published layout of some sizes."""
        ones = torch.ones(self.canvases, *self.canvas, dtype=torch.uint8, device=device)
        return self.unstitch_label(ones)[0].bool()

    def to_canvas(self, points_voxel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where voxels lie on the canvases.

        Args:
            points_voxel: ``[N, 3]`` voxel indices (x, y, z). Fractions are kept in the plane of a slice; across slices
                the nearest one is meant.

        Returns:
            Number of the canvas ``[N]`` (int64), and pixel indices ``[N, 2]`` as (column, row), SAM's (x, y), where whole
            numbers are pixel centres. Resizing keeps the outer edges of slice and tile together, so that a place may lie
            up to half a pixel beyond the centres of the tile's first and last pixels.

        Raises:
            DataError: a point outside the volume, or one that the published layout cuts off.
        """
        points = points_voxel if points_voxel.is_floating_point() else points_voxel.float()
        if points.ndim != 2 or points.shape[1] != 3:
            raise DataError(f"expected points [N, 3] in voxel indices (x, y, z), got {list(points.shape)}")
        across, *inside = self._order
        _refuse(points, _outside(points, self.size), f"point outside the volume, which has size {self.size}")
        points = points.minimum(points.new_tensor(self.size) - 1)  # up to the far edge of the last voxel
        index = (points[:, across] + 0.5).floor().long()
        slot = index % self.run + self.first_slot
        pixel = self._corner(slot) + (points[:, inside] + 0.5) * points.new_tensor(self.scale) - 0.5
        lost = (slot >= self.grid[0] * self.grid[1]) | _outside((pixel + 0.5).floor(), self.canvas)
        _refuse(points, lost, "point cut off by the published layout (Stitch.fit holds every voxel)")
        return index // self.run, pixel.flip(1)

    def to_volume(self, canvas_index: torch.Tensor, xy: torch.Tensor) -> torch.Tensor:
        """Voxel indices of pixels: the inverse of `to_canvas`.

        Args:
            canvas_index: ``[N]`` number of the canvas.
            xy: ``[N, 2]`` pixel indices (column, row).

        Returns:
            ``[N, 3]`` (x, y, z), a whole number along the sliced axis.

        Raises:
            DataError: a pixel outside the canvases, or on no slice.
        """
        pixel = (xy if xy.is_floating_point() else xy.float()).flip(1)
        if pixel.ndim != 2 or pixel.shape[1] != 2 or len(canvas_index) != len(pixel):
            raise DataError(f"expected pixels [N, 2] on N canvases, got {list(xy.shape)} on {len(canvas_index)}")
        across, *inside = self._order
        nearest = (pixel + 0.5).floor().long()
        lost = _outside(nearest, self.canvas)
        cell = (nearest - nearest.new_tensor(self.origin)).div(nearest.new_tensor(self.cell), rounding_mode="floor")
        lost |= _outside(cell, self.grid)
        slot = cell[:, 0] * self.grid[1] + cell[:, 1]
        lost |= _outside(nearest - self._corner(slot), self.tile)
        place = torch.stack([slot - self.first_slot, canvas_index * self.run + slot - self.first_slot], dim=1)
        lost |= _outside(place, (self.run, self.size[across]))
        _refuse(xy, lost, "pixel (column, row) on no slice of this layout")
        points = pixel.new_empty(len(pixel), 3)
        points[:, across] = place[:, 1].to(points)
        points[:, inside] = (pixel - self._corner(slot) + 0.5) / pixel.new_tensor(self.scale) - 0.5
        return points

    @property
    def _order(self) -> tuple[int, int, int]:
        """Index axes of slices, rows and columns."""
        columns, rows = (i for i in range(3) if i != self.axis)
        return self.axis, rows, columns

    def _corner(self, slot: torch.Tensor) -> torch.Tensor:
        """Row and column ``[N, 2]`` of the first pixel of the tile in each slot."""
        cell = torch.stack([slot.div(self.grid[1], rounding_mode="floor"), slot % self.grid[1]], dim=1)
        return cell * cell.new_tensor(self.cell) + cell.new_tensor(self.origin) + cell.new_tensor(self.padding)

    def _slices(self, volume: torch.Tensor, ndim: int) -> torch.Tensor:
        """``[B, C, slices, rows, columns]``; a label map has one channel."""
        if volume.ndim != ndim or tuple(volume.shape[-3:]) != self.size:
            axes = ", ".join(["B", "C", *map(str, self.size)] if ndim == 5 else ["B", *map(str, self.size)])
            raise DataError(f"this layout is for [{axes}], got {list(volume.shape)}: make one for that size")
        batch = volume if ndim == 5 else volume[:, None]
        return batch.permute(0, 1, *(2 + i for i in self._order))

    def _volume(self, slices: torch.Tensor) -> torch.Tensor:
        """The inverse of `_slices`."""
        order = self._order
        return slices.permute(0, 1, *(2 + order.index(i) for i in range(3))).contiguous()

    def _lay(self, slices: torch.Tensor, fill: float) -> torch.Tensor:
        """Tiles ``[B, C, Z, *tile]`` -> canvases ``[B*N, C, *canvas]``."""
        missing = self.canvases * self.run - slices.shape[2]
        slices = _pad(slices, [(0, missing), (0, 0), (0, 0)], fill)
        slices = slices.unflatten(2, (self.canvases, self.run)).movedim(2, 1).flatten(0, 1)
        cells = _pad(slices, self._around_tile(), fill).unflatten(2, self.grid).transpose(3, 4)
        return _pad(cells.flatten(4, 5).flatten(2, 3), self._around_grid(), fill)

    def _cut(self, canvas: torch.Tensor, ndim: int, fill: float) -> torch.Tensor:
        """The inverse of `_lay`."""
        if canvas.ndim != ndim or tuple(canvas.shape[-2:]) != self.canvas or len(canvas) % self.canvases:
            axes = ", ".join([f"B*{self.canvases}", *["K"][: ndim - 3], *map(str, self.canvas)])
            raise DataError(f"this layout has canvases [{axes}], got {list(canvas.shape)}")
        canvas = canvas if ndim == 4 else canvas[:, None]
        whole = _pad(canvas, _negative(self._around_grid()), fill)
        cells = whole.unflatten(3, (self.grid[1], self.cell[1])).unflatten(2, (self.grid[0], self.cell[0]))
        slots, *plane = _negative(self._around_tile())
        tiles = _pad(cells.transpose(3, 4), plane, fill).flatten(2, 3)
        tiles = _pad(tiles, [slots, (0, 0), (0, 0)], fill)
        slices = tiles.unflatten(0, (-1, self.canvases)).movedim(1, 2).flatten(2, 3)
        return slices[:, :, : self.size[self.axis]]

    def _around_tile(self) -> list[Pair]:
        """Empty slots around a run of slices and empty pixels around a tile; negative where something is cut off."""
        first, rows, columns = self.first_slot, *self.padding
        return [
            (first, self.grid[0] * self.grid[1] - first - self.run),
            (rows, self.cell[0] - self.tile[0] - rows),
            (columns, self.cell[1] - self.tile[1] - columns),
        ]

    def _around_grid(self) -> list[Pair]:
        """Pixels around the grid on a canvas; negative where something is cut off."""
        sides = zip(self.origin, self.grid, self.cell, self.canvas, strict=True)
        return [(before, canvas - before - count * cell) for before, count, cell, canvas in sides]


def _checked(size: Sequence[int], canvas: int | Sequence[int], axis: int) -> tuple[tuple[int, int, int], Pair]:
    sides = (canvas, canvas) if isinstance(canvas, int) else tuple(canvas)
    if len(size) != 3 or min(size) < 1 or len(sides) != 2 or min(sides) < 1:
        raise ConfigError(f"expected a volume of 3 and a canvas of 1 or 2 positive sides, got {size} and {canvas}")
    if axis not in (0, 1, 2):
        raise ConfigError(f"a volume is sliced along axis 0, 1 or 2, not {axis}")
    x, y, z = (int(side) for side in size)
    return (x, y, z), (int(sides[0]), int(sides[1]))


def _plane(size: tuple[int, int, int], axis: int) -> tuple[int, int, int]:
    """Rows and columns of a slice, and how many slices there are."""
    columns, rows = (size[i] for i in range(3) if i != axis)
    return rows, columns, size[axis]


def _given_grid(grid: Sequence[int], most: Pair) -> Pair:
    if len(grid) != 2 or min(grid) < 1 or grid[0] > most[0] or grid[1] > most[1]:
        raise ConfigError(f"this canvas takes a grid of 1x1 to {most[0]}x{most[1]} cells, got {tuple(grid)}")
    return int(grid[0]), int(grid[1])


def _coarsest_grid(count: int, plane: Pair, canvas: Pair, most: Pair) -> Pair:
    """The grid of the largest scale, common to rows and columns, at which `count` slices fit the canvas."""
    sides = list(zip(canvas, plane, most, strict=True))
    for scale in sorted({Fraction(s, n * p) for s, p, m in sides for n in range(1, min(count, m) + 1)}, reverse=True):
        rows, columns = (min(int(s / (scale * p)), m) for s, p, m in sides)
        if rows * columns >= count:
            return rows, columns
    return most


def _pad(x: torch.Tensor, pads: Sequence[Pair], fill: float) -> torch.Tensor:
    """Constant padding of the last axes, first to last; a negative number cuts off, without a copy."""
    for dim, (before, after) in enumerate(pads, start=-len(pads)):
        if before < 0 or after < 0:
            start = max(-before, 0)
            x = x.narrow(dim, start, x.shape[dim] - start - max(-after, 0))
    flat = [max(n, 0) for pair in reversed(pads) for n in pair]
    return F.pad(x, flat, value=fill) if any(flat) else x


def _negative(pads: Sequence[Pair]) -> list[Pair]:
    return [(-before, -after) for before, after in pads]


def _interpolate(slices: torch.Tensor, plane: Pair) -> torch.Tensor:
    """Bilinear scaling of ``[B, C, Z, rows, columns]`` slice by slice, edge on edge, without aliasing when they shrink."""
    kind = slices.dtype if slices.is_floating_point() else torch.float32
    slices = slices.to(torch.promote_types(kind, torch.float32))
    # Two matrix products rather than F.interpolate: its antialiasing is wrong for planes of a single column (PyTorch 2.13),
    # and its gradient on a GPU depends on chance.
    with torch.autocast(slices.device.type, enabled=False):
        slices = _weights(slices, -2, plane[0]) @ slices
        slices = slices @ _weights(slices, -1, plane[1]).T
    return slices.to(kind)


def _weights(x: torch.Tensor, dim: int, count: int) -> torch.Tensor:
    """What each of the n voxels of an axis adds to each of `count` pixels ``[count, n]``: a triangle that reaches one voxel, or
    one pixel where that is more, to either side.
    """
    length = x.shape[dim]
    centre = (torch.arange(count, device=x.device, dtype=x.dtype)[:, None] + 0.5) * (length / count) - 0.5
    reach = max(length / count, 1.0)
    weights = (1 - (torch.arange(length, device=x.device, dtype=x.dtype) - centre).abs() / reach).clamp_min(0)
    return weights / weights.sum(dim=1, keepdim=True)


def _nearest(slices: torch.Tensor, plane: Pair) -> torch.Tensor:
    """Nearest pixel of the last two axes, for any type."""
    for dim, count in zip((-2, -1), plane, strict=True):
        length = slices.shape[dim]
        if length != count:
            index = (2 * torch.arange(count, device=slices.device) + 1) * length // (2 * count)
            slices = slices.index_select(dim, index)
    return slices


def _outside(places: torch.Tensor, limit: Sequence[int]) -> torch.Tensor:
    """Which rows of ``[N, D]`` have a number below 0 or from `limit` on; NaN counts as outside."""
    return ~((places >= 0) & (places < places.new_tensor(limit))).all(dim=1)


def _refuse(places: torch.Tensor, lost: torch.Tensor, why: str) -> None:
    if lost.any():
        first = tuple(round(float(value), 2) for value in places[lost][0])
        raise DataError(f"{why}: got {first}")
