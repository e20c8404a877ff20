"""Cutting patches into cubes and putting them together again, exactly, for any size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

Size = tuple[int, int, int]
Place = tuple[slice, slice, slice]


@dataclass(frozen=True)
class CubeGrid:
    """How a patch falls into cubes: along each axis into parts that differ by one voxel at most.

    A cube that is shown to a network alone is cut out with a `window` around it, because its own sides need not suit the
    network. Windows overlap; what the network says of a window is cropped to its cube again.

    Attributes:
        size: sides of the patch ``(X, Y, Z)``, voxels.
        counts: number of cubes along each axis.
        window: sides of the box around a cube that is shown alone.
    """

    size: Size
    counts: Size
    window: Size

    @classmethod
    def fit(cls, size: Sequence[int], most: Sequence[int], divisor: Sequence[int]) -> CubeGrid:
        """The finest grid with at most `most` cubes along each axis, none of them thinner than `divisor`.

        The window is the smallest multiple of `divisor` that holds the largest cube. A patch of 96 voxels, three cubes
        and a divisor of 16 give cubes and windows of 32; 112 voxels give cubes of 37 or 38 in windows of 48. A window
        of one divisor along every axis would be a single voxel at the bottleneck: there the axis with the most cubes gets
        fewer.

        Args:
            size: sides of the patch, multiples of `divisor`.
            most: wanted number of cubes along each axis.
            divisor: what the sides of a network's input are multiples of.
        """
        counts = [max(1, min(n, side // step)) for side, n, step in zip(size, most, divisor, strict=True)]
        while (window := _window(size, counts, divisor)) == tuple(divisor) and max(counts) > 1:
            counts[counts.index(max(counts))] -= 1
        return cls(_three(size), _three(counts), window)

    @cached_property
    def cubes(self) -> list[Place]:
        """Where the cubes lie, the last axis running fastest."""
        axes = [
            [slice(i * side // n, (i + 1) * side // n) for i in range(n)]
            for side, n in zip(self.size, self.counts, strict=True)
        ]
        return [(x, y, z) for x in axes[0] for y in axes[1] for z in axes[2]]

    @cached_property
    def windows(self) -> list[Place]:
        """Where the windows lie: centred on their cubes as far as the patch allows."""

        def around(cube: slice, width: int, side: int) -> slice:
            start = (cube.start + cube.stop - width) // 2
            start = min(max(start, 0), side - width)
            return slice(start, start + width)

        return [
            _place([around(*axis) for axis in zip(cube, self.window, self.size, strict=True)]) for cube in self.cubes
        ]

    def cut(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The cubes of ``[..., X, Y, Z]``, as views."""
        return [_at(x, place) for place in self.cubes]

    def join(self, cubes: Sequence[torch.Tensor]) -> torch.Tensor:
        """Inverse of `cut`."""
        for axis, n in zip((-1, -2, -3), reversed(self.counts), strict=True):
            cubes = [torch.cat(list(cubes[i : i + n]), axis) for i in range(0, len(cubes), n)]
        return cubes[0]

    def swap(self, x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """Exchange cubes between rows; every cube keeps its position.

        Args:
            x: ``[B, ..., X, Y, Z]``.
            order: ``[positions, B]``, a permutation of the rows in each line: row b of the result has at position p the
                cube of row ``order[p, b]``. ``order.argsort(1)`` takes it back.
        """
        return self.join([cube[rows] for cube, rows in zip(self.cut(x), order, strict=True)])

    def cut_windows(self, x: torch.Tensor) -> torch.Tensor:
        """Every cube alone, in its window: ``[B, C, X, Y, Z]`` becomes ``[B * positions, C, *window]``, row by row."""
        return torch.stack([_at(x, place) for place in self.windows], 1).flatten(0, 1)

    def join_windows(self, x: torch.Tensor) -> torch.Tensor:
        """Crop each window to its cube and put the cubes together: the inverse of `cut_windows`."""
        rows = x.unflatten(0, (-1, len(self.cubes)))
        inner = [
            _place([slice(c.start - w.start, c.stop - w.start) for c, w in zip(cube, window, strict=True)])
            for cube, window in zip(self.cubes, self.windows, strict=True)
        ]
        return self.join([_at(rows[:, p], place) for p, place in enumerate(inner)])


def random_order(positions: int, rows: int, generator: torch.Generator) -> torch.Tensor:
    """A random permutation of the rows for each position, ``[positions, rows]``, on the generator's device."""
    return torch.rand(positions, rows, generator=generator, device=generator.device).argsort(1)


def _window(size: Sequence[int], counts: Sequence[int], divisor: Sequence[int]) -> Size:
    """Sides of the window: the largest cube's, rounded up to the divisor, but never more than the patch's."""
    largest = [-(-side // n) for side, n in zip(size, counts, strict=True)]
    return _three([min(side, -(-cube // step) * step) for side, cube, step in zip(size, largest, divisor, strict=True)])


def _three(values: Sequence[int]) -> Size:
    x, y, z = values
    return int(x), int(y), int(z)


def _place(slices: Sequence[slice]) -> Place:
    x, y, z = slices
    return x, y, z


def _at(x: torch.Tensor, place: Place) -> torch.Tensor:
    return x[..., place[0], place[1], place[2]]
