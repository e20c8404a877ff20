"""Cutting and putting together are exact inverses, whatever the size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scarceseg.functional.cubes import CubeGrid, random_order
from tests.reference import decoders as oracle

sides = st.tuples(*[st.integers(1, 13)] * 3)
counts = st.tuples(*[st.integers(1, 4)] * 3)
divisors = st.tuples(*[st.integers(1, 4)] * 3)


@settings(max_examples=60, deadline=None)
@given(sides, counts, divisors, st.integers(1, 3))
def test_round_trips(
    size: tuple[int, int, int], most: tuple[int, int, int], divisor: tuple[int, int, int], rows: int
) -> None:
    grid = CubeGrid.fit(size, most, divisor)
    x = torch.arange(rows * 2 * int(np.prod(size))).view(rows, 2, *size)
    assert torch.equal(grid.join(grid.cut(x)), x)
    assert torch.equal(grid.join_windows(grid.cut_windows(x)), x)
    order = random_order(len(grid.cubes), rows, torch.Generator().manual_seed(0))
    mixed = grid.swap(x, order)
    assert torch.equal(grid.swap(mixed, order.argsort(1)), x)
    assert torch.equal(mixed.sort(0).values, x)  # rows start apart and keep their order: nothing is lost at any voxel


@settings(max_examples=60, deadline=None)
@given(counts, st.tuples(*[st.integers(1, 5)] * 3), divisors)
def test_the_grid_suits_the_network(
    most: tuple[int, int, int], times: tuple[int, int, int], divisor: tuple[int, int, int]
) -> None:
    size = tuple(n * d for n, d in zip(times, divisor, strict=True))
    grid = CubeGrid.fit(size, most, divisor)
    assert len(grid.cubes) == len(grid.windows) == int(np.prod(grid.counts))
    assert grid.window != divisor or grid.counts == (1, 1, 1)
    for axis in range(3):
        assert grid.counts[axis] <= most[axis]
        assert grid.window[axis] % divisor[axis] == 0
        thickness = {cube[axis].stop - cube[axis].start for cube in grid.cubes}
        assert min(thickness) >= divisor[axis] and max(thickness) - min(thickness) <= 1
        for cube, window in zip(grid.cubes, grid.windows, strict=True):
            assert 0 <= window[axis].start <= cube[axis].start < cube[axis].stop <= window[axis].stop <= size[axis]
            assert window[axis].stop - window[axis].start == grid.window[axis]


@pytest.mark.parametrize(
    ("size", "cubes", "window"),
    [
        ((96, 96, 96), (3, 3, 3), (32, 32, 32)),  # as in the paper
        ((112, 112, 80), (3, 3, 3), (48, 48, 32)),
        ((48, 32, 32), (2, 2, 2), (32, 16, 16)),  # three would leave one voxel at the bottleneck
        ((32, 32, 16), (1, 2, 1), (32, 16, 16)),
        ((16, 16, 16), (1, 1, 1), (16, 16, 16)),
    ],
)
def test_usual_patches(size: tuple[int, int, int], cubes: tuple[int, int, int], window: tuple[int, int, int]) -> None:
    grid = CubeGrid.fit(size, (3, 3, 3), (16, 16, 16))
    assert grid.counts == cubes and grid.window == window
    if size == (96, 96, 96):
        assert grid.windows == grid.cubes


def test_swap_voxel_by_voxel() -> None:
    grid = CubeGrid.fit((5, 4, 7), (2, 1, 3), (1, 1, 1))
    edges = [[0, 2, 5], [0, 4], [0, 2, 4, 7]]
    x = torch.randn(3, 2, 5, 4, 7)
    order = random_order(6, 3, torch.Generator().manual_seed(1))
    assert sorted(order[0].tolist()) == [0, 1, 2]
    np.testing.assert_array_equal(grid.swap(x, order).numpy(), oracle.swapped(x.numpy(), edges, order.numpy()))


def test_gradient_goes_back_to_where_the_cube_came_from() -> None:
    grid = CubeGrid.fit((4, 4, 4), (2, 2, 2), (1, 1, 1))
    order = random_order(8, 2, torch.Generator().manual_seed(0))
    x = torch.randn(2, 1, 4, 4, 4, requires_grad=True)
    weight = torch.randn(2, 1, 4, 4, 4)
    (grid.swap(x, order) * weight).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, grid.swap(weight, order.argsort(1)))
