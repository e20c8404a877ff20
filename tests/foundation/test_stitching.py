"""Mosaics against the published arrays, a slow oracle, and their promises: nothing lost, nothing moved, nothing doubled."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scarceseg.errors import ConfigError, DataError
from scarceseg.foundation.stitching import Stitch
from tests.reference import stitching as oracle

CASES = [
    "st_25x25x12_128",
    "st_28x28x14_128",
    "st_28x28x20_256",
    "st_exact_32x32x16_128",
    "st_la_112x112x80_1024",
    "st_nonsquare_30x28x9_128",
    "st_overflow_32x32x20_128",
]
FAILING = "st_nonsquare_24x28x20_256"

sides = st.integers(1, 9)
sizes = st.tuples(sides, sides, sides)
axes = st.integers(0, 2)
seeds = st.integers(0, 2**31 - 1)


@st.composite
def layouts(draw: st.DrawFn, resize: bool = False) -> Stitch:
    """Any fitted layout at full size: sizes, axes, canvases that are just large enough or far too large, given grids."""
    size, axis = draw(sizes), draw(axes)
    columns, rows = (size[i] for i in range(3) if i != axis)
    canvas = (draw(st.integers(rows, 40)), draw(st.integers(columns, 40)))
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        most = canvas if resize else (canvas[0] // rows, canvas[1] // columns)
        options["grid"] = (draw(st.integers(1, min(most[0], 6))), draw(st.integers(1, min(most[1], 6))))
    stitch = Stitch.fit(size, canvas, axis=axis, resize=resize, **options)
    if draw(st.booleans()):
        options["canvases"] = draw(st.integers(stitch.canvases, size[axis]))
        stitch = Stitch.fit(size, canvas, axis=axis, resize=resize, **options)
    return stitch


def layout_of(stitch: Stitch) -> oracle.Layout:
    """The same layout for the oracle."""
    return oracle.Layout(
        stitch.canvas, stitch.grid, stitch.cell, stitch.padding, stitch.origin, stitch.first_slot, stitch.run
    )


def numbered(batch: int, channels: int, size: tuple[int, ...]) -> torch.Tensor:
    """Every voxel another number, none of them 0."""
    return 1.0 + torch.arange(batch * channels * math.prod(size)).reshape(batch, channels, *size).float()


def published(shared: Path, case: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    folder = shared / "conformance" / "stitching"
    config = json.loads((folder / f"{case}.json").read_text(encoding="utf-8"))["config"]
    with np.load(folder / f"{case}.npz") as arrays:
        return config, dict(arrays)


def pattern(config: dict[str, Any]) -> torch.Tensor:
    """Logits of the published un-stitching."""
    shape = (config["batch"], config["channels"], config["input_size"], config["input_size"])
    b, k, r, c = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    return (((7 * r + 13 * c + 5 * k + 3 * b) % 11) - 5) / 2


@pytest.mark.parametrize("case", CASES)
def test_published_mosaics(shared: Path, case: str) -> None:
    config, arrays = published(shared, case)
    stitch = Stitch.published(config["volume_shape"], config["input_size"])
    layout = config["layout"]
    assert stitch.grid == (layout["n_row"], layout["n_col"])
    assert stitch.cell == (layout["s_l"], layout["s_w"])
    assert stitch.padding == (layout["pw"], layout["ph"])
    assert stitch.origin == (layout["pww"], layout["phh"])
    assert stitch.first_slot == layout["ps"]
    volume = numbered(config["batch"], 1, stitch.size)
    if "image" in arrays:
        assert np.array_equal(volume.numpy(), arrays["image"])
    assert np.array_equal(stitch.stitch(volume)[:, 0].numpy(), arrays["stitched_image"])
    x, y, z = torch.meshgrid(*map(torch.arange, stitch.size), indexing="ij")
    label = ((x + 2 * y + 3 * z) % config["channels"]).expand(config["batch"], *stitch.size)
    assert np.array_equal(stitch.stitch_label(label).numpy(), arrays["stitched_label"])
    assert np.array_equal(stitch.stitch_label(label.to(torch.uint8)).numpy(), arrays["stitched_label"])


@pytest.mark.parametrize("case", CASES)
def test_published_unstitching(shared: Path, case: str) -> None:
    config, arrays = published(shared, case)
    stitch = Stitch.published(config["volume_shape"], config["input_size"])
    logits = pattern(config)
    if "unstitched_softmax" in arrays:
        np.testing.assert_allclose(
            stitch.unstitch(logits.softmax(1)).numpy(), arrays["unstitched_softmax"], rtol=0, atol=1e-7
        )
    assert np.array_equal(stitch.unstitch_label(logits.argmax(1)).numpy(), arrays["unstitched_pred"])
    lost = config["slices_lost_in_round_trip"]
    assert stitch.dropped == len(lost)
    assert int((~stitch.covered()).sum()) == config["voxels_lost_in_round_trip"]
    assert not stitch.covered()[..., lost].any()


def test_published_formula_where_the_script_stops(shared: Path) -> None:
    config, _ = published(shared, FAILING)
    assert "reference_fails" in config
    stitch = Stitch.published(config["volume_shape"], config["input_size"])
    layout = oracle.published_layout(stitch.size, config["input_size"])
    assert layout_of(stitch) == layout and min(layout.origin) < 0
    volume = numbered(1, 1, stitch.size)
    canvas = stitch.stitch(volume)
    assert np.array_equal(canvas[0].numpy(), oracle.stitched(volume[0, 0].numpy(), layout, 0))
    back = oracle.unstitched(canvas[0].numpy(), layout, stitch.size, -1)
    assert np.array_equal(stitch.unstitch(canvas, fill=-1)[0, 0].numpy(), back)
    assert (back == -1).any()  # the rim that the negative origin costs
    assert np.array_equal(stitch.covered().numpy(), back != -1)


@settings(max_examples=40, deadline=None)
@given(size=sizes, side=st.integers(9, 40))
def test_published_layout_is_the_formula(size: tuple[int, int, int], side: int) -> None:
    stitch, layout = Stitch.published(size, side), oracle.published_layout(size, side)
    assert layout_of(stitch) == layout
    volume = numbered(1, 1, size)
    canvas = stitch.stitch(volume)
    assert np.array_equal(canvas[0].numpy(), oracle.stitched(volume[0, 0].numpy(), layout, 0))
    back = oracle.unstitched(canvas[0].numpy(), layout, size, -1)
    assert np.array_equal(stitch.unstitch(canvas, fill=-1)[0, 0].numpy(), back)


@settings(max_examples=60, deadline=None)
@given(stitch=layouts(), batch=st.integers(1, 3), channels=st.integers(1, 3))
def test_round_trip_is_exact(stitch: Stitch, batch: int, channels: int) -> None:
    volume = numbered(batch, channels, stitch.size)
    canvas = stitch.stitch(volume, fill=-1)
    assert canvas.shape == (batch * stitch.canvases, channels, *stitch.canvas)
    assert torch.equal(stitch.unstitch(canvas), volume)
    assert int((canvas != -1).sum()) == volume.numel()  # every voxel on one pixel, and nothing else
    label = volume[:, 0].long() % 251
    ignored = stitch.stitch_label(label)
    assert torch.equal(ignored == 255, canvas[:, 0] == -1)
    assert torch.equal(stitch.unstitch_label(ignored), label)
    assert stitch.covered().all() and stitch.dropped == 0


@settings(max_examples=40, deadline=None)
@given(stitch=layouts())
def test_fitted_mosaics_are_those_of_the_oracle(stitch: Stitch) -> None:
    volume = numbered(2, 1, stitch.size)
    canvas = stitch.stitch(volume).unflatten(0, (2, stitch.canvases))
    for b in range(2):
        expected = oracle.stitched(volume[b, 0].numpy(), layout_of(stitch), 0, stitch.axis)
        assert np.array_equal(canvas[b, :, 0].numpy(), expected)
        back = oracle.unstitched(expected, layout_of(stitch), stitch.size, 0, stitch.axis)
        assert np.array_equal(back, volume[b, 0].numpy())


@settings(max_examples=60, deadline=None)
@given(size=sizes, canvas=st.tuples(st.integers(9, 60), st.integers(9, 60)), axis=axes, resize=st.booleans())
def test_the_grid_is_the_coarsest(size: tuple[int, int, int], canvas: tuple[int, int], axis: int, resize: bool) -> None:
    stitch = Stitch.fit(size, canvas, axis=axis, resize=resize)
    columns, rows = (size[i] for i in range(3) if i != axis)
    room = (canvas[0] // rows) * (canvas[1] // columns)
    assert stitch.canvases == (1 if resize else math.ceil(size[axis] / room))
    assert stitch.grid[0] * stitch.grid[1] >= stitch.run
    best = oracle.largest_scale(stitch.run, (rows, columns), canvas)
    scale = min(canvas[0] / (stitch.grid[0] * rows), canvas[1] / (stitch.grid[1] * columns))
    assert scale == pytest.approx(best)
    assert stitch.cell == (canvas[0] // stitch.grid[0], canvas[1] // stitch.grid[1])
    assert stitch.tile == (stitch.cell if resize else (rows, columns))


@pytest.mark.parametrize(("depth", "d"), [(1, 1), (2, 2), (16, 4), (17, 5), (72, 9), (80, 9), (81, 9)])
def test_square_slices_stand_in_the_grid_of_the_paper(depth: int, d: int) -> None:
    assert Stitch.fit((112, 112, depth), 1024).grid == (d, d)
    assert Stitch.fit((112, 112, depth), 512, resize=True).grid == (d, d)


def test_long_volumes_take_several_canvases_in_order() -> None:
    stitch = Stitch.fit((10, 12, 50), 40)
    assert (stitch.canvases, stitch.run, stitch.grid) == (5, 10, (3, 4))
    volume = torch.arange(50.0).expand(2, 1, 10, 12, 50) + 100 * torch.arange(2.0).reshape(2, 1, 1, 1, 1)
    canvas = stitch.stitch(volume, fill=-1)
    held = [sorted(set(image.unique().tolist()) - {-1}) for image in canvas]
    assert held == [[100 * b + z for z in range(10 * n, 10 * n + 10)] for b in range(2) for n in range(5)]
    assert Stitch.fit((10, 12, 50), 40, resize=True).canvases == 1
    assert Stitch.fit((10, 12, 50), 400, canvases=3).run == 17


@settings(max_examples=60, deadline=None)
@given(stitch=layouts(), seed=seeds)
def test_points_lie_where_their_voxel_is_drawn(stitch: Stitch, seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = torch.from_numpy(rng.integers(0, stitch.size, (4, 3)))
    canvas, xy = stitch.to_canvas(points)
    for k, point in enumerate(points.tolist()):
        volume = torch.zeros(1, 1, *stitch.size)
        volume[0, 0, point[0], point[1], point[2]] = 1
        bright = stitch.stitch(volume)[:, 0].nonzero().tolist()
        assert bright == [[int(canvas[k]), int(xy[k, 1]), int(xy[k, 0])]]
    assert torch.equal(stitch.to_volume(canvas, xy), points.float())


@settings(max_examples=40, deadline=None)
@given(size=sizes, canvas=st.tuples(st.integers(9, 60), st.integers(9, 60)), axis=axes, seed=seeds)
def test_points_come_back_from_resized_mosaics(
    size: tuple[int, int, int], canvas: tuple[int, int], axis: int, seed: int
) -> None:
    stitch = Stitch.fit(size, canvas, axis=axis, resize=True)
    rng = np.random.default_rng(seed)
    points = torch.from_numpy(rng.integers(0, size, (5, 3)).astype(np.float64))
    index, xy = stitch.to_canvas(points)
    torch.testing.assert_close(stitch.to_volume(index, xy), points, rtol=0, atol=1e-9)
    assert ((xy >= -0.5) & (xy < torch.tensor(canvas).flip(0) - 0.5)).all()


def test_an_enlarged_voxel_is_brightest_at_its_point() -> None:
    stitch = Stitch.fit((7, 5, 6), 90, resize=True)
    for point in [(0, 0, 0), (6, 4, 5), (3, 2, 1), (1, 4, 3)]:
        volume = torch.zeros(1, 1, 7, 5, 6)
        volume[0, 0, point[0], point[1], point[2]] = 1
        image = stitch.stitch(volume)[0, 0]
        index, xy = stitch.to_canvas(torch.tensor([point]))
        column, row = xy[0].tolist()
        brightest = image.max()
        # Centre of the brightest pixels, which at the border of a slice reach up to its edge.
        lit = (image >= brightest * (1 - 1e-5)).nonzero().float()
        assert index.tolist() == [0]
        assert lit.amin(0)[0] - 1 <= row <= lit.amax(0)[0] + 1
        assert lit.amin(0)[1] - 1 <= column <= lit.amax(0)[1] + 1
        inside = torch.tensor([[column, row]]).round()
        assert stitch.to_volume(index, inside)[0].round().tolist() == list(point)


def test_places_off_the_slices_are_refused() -> None:
    stitch = Stitch.fit((5, 4, 7), 20)  # a grid of 3x3 cells 6x6
    assert stitch.grid == (3, 3) and stitch.cell == (6, 6) and stitch.origin == (1, 1)
    for point in ([-1.0, 0, 0], [5.0, 0, 0], [0, 0, 7.0], [0, float("nan"), 0]):
        with pytest.raises(DataError, match="outside the volume"):
            stitch.to_canvas(torch.tensor([[0.0, 0, 0], point]))
    zero = torch.tensor([0])
    corner = stitch.to_canvas(torch.zeros(1, 3))[1]
    assert stitch.to_volume(zero, corner).tolist() == [[0, 0, 0]]
    # Beside the grid, in the padding of a cell, in the two empty cells, outside the canvas, on a canvas that is not there.
    for xy in ([0.0, 4.0], [6.0, 3.0], [10.0, 16.0], [16.0, 16.0], [-1.0, 4.0], [4.0, 20.0], [22.0, 4.0]):
        with pytest.raises(DataError, match="on no slice"):
            stitch.to_volume(zero, torch.tensor([xy]))
    with pytest.raises(DataError, match="on no slice"):
        stitch.to_volume(zero + 1, corner)
    with pytest.raises(DataError, match="on no slice"):
        stitch.to_volume(zero - 1, corner)
    for wrong in (torch.zeros(3), torch.zeros(2, 2)):
        with pytest.raises(DataError, match="expected points"):
            stitch.to_canvas(wrong)
    with pytest.raises(DataError, match="expected pixels"):
        stitch.to_volume(torch.zeros(2), torch.zeros(3, 2))


def test_fractions_stay_in_their_slice() -> None:
    stitch = Stitch.fit((5, 4, 7), 20)
    _, xy = stitch.to_canvas(torch.tensor([[1.25, 2.5, 3.0], [1.25, 2.5, 3.4], [4.9, 3.9, 6.9]]))
    _, whole = stitch.to_canvas(torch.tensor([[1, 2, 3], [4, 3, 6]]))
    assert torch.equal(xy[0] - whole[0], torch.tensor([0.25, 0.5]))
    assert torch.equal(xy[1], xy[0])
    assert torch.equal(xy[2], whole[1])


def test_points_cut_off_by_the_published_layout_are_refused() -> None:
    dropping = Stitch.published((32, 32, 20), 128)
    dropping.to_canvas(torch.tensor([[5, 5, 15]]))
    with pytest.raises(DataError, match="cut off by the published layout"):
        dropping.to_canvas(torch.tensor([[5, 5, 15], [5, 5, 16]]))
    clipping = Stitch.published((24, 28, 20), 256)
    lost = (~clipping.covered()).nonzero()
    assert len(lost) > 0
    for point in lost[:: len(lost) // 7]:
        with pytest.raises(DataError, match="cut off by the published layout"):
            clipping.to_canvas(point[None])
    clipping.to_canvas(clipping.covered().nonzero())
    # The same places asked the other way round: the rim beyond the canvas, and a row below the last one of the grid.
    first, zero = clipping.origin[1] + clipping.padding[1], torch.tensor([0])
    assert first < 0
    _, rim = clipping.to_canvas(torch.tensor([[-first, 5, 40 - clipping.first_slot]]))  # in the first column of cells
    assert rim[0, 0] == 0
    clipping.to_volume(zero, rim)
    with pytest.raises(DataError, match="on no slice"):
        clipping.to_volume(zero, rim - torch.tensor([1.0, 0.0]))
    narrow = Stitch.published((2, 2, 150), 21)
    assert narrow.dropped == 50 and narrow.grid[0] * narrow.cell[0] == 20
    with pytest.raises(DataError, match="on no slice"):
        narrow.to_volume(zero, torch.tensor([[0.0, 20.0]]))


@settings(max_examples=30, deadline=None)
@given(size=sizes, axis=axes, more=st.tuples(st.integers(0, 20), st.integers(0, 20)))
def test_enlarged_slices_are_those_of_the_oracle(size: tuple[int, int, int], axis: int, more: tuple[int, int]) -> None:
    columns, rows = (size[i] for i in range(3) if i != axis)
    d = math.ceil(math.sqrt(size[axis]))
    stitch = Stitch.fit(size, (rows * d + more[0], columns * d + more[1]), grid=(d, d), axis=axis, resize=True)
    volume = torch.rand(1, 1, *size, dtype=torch.float64)
    canvas = stitch.stitch(volume)[0, 0].numpy()
    for z in range(size[axis]):
        row, column = (o + k * c for o, k, c in zip(stitch.origin, divmod(z, d), stitch.cell, strict=True))
        tile = canvas[row : row + stitch.cell[0], column : column + stitch.cell[1]]
        expected = oracle.resized(oracle.plane_of(volume[0, 0].numpy(), axis, z), stitch.cell)
        np.testing.assert_allclose(tile, expected, rtol=0, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(stitch=layouts(resize=True), seed=seeds)
def test_resizing_keeps_constants_and_sums(stitch: Stitch, seed: int) -> None:
    volume = torch.full((2, 1, *stitch.size), 3.0)
    canvas = stitch.stitch(volume, fill=-7)
    assert set(canvas.round(decimals=4).unique().tolist()) <= {3.0, -7.0}
    torch.testing.assert_close(stitch.unstitch(canvas), volume)
    generator = torch.Generator().manual_seed(seed)
    probability = torch.randn(stitch.canvases, 3, *stitch.canvas, generator=generator).softmax(1)
    back = stitch.unstitch(probability)
    torch.testing.assert_close(back.sum(1), torch.ones(1, *stitch.size))
    assert back.min() >= -1e-6
    label = stitch.stitch_label(torch.zeros(2, *stitch.size, dtype=torch.uint8))
    assert torch.equal(label == 255, canvas[:, 0] == -7)


def test_resizing_is_smooth_and_labels_stay_whole() -> None:
    x, y, z = torch.meshgrid(torch.arange(36.0), torch.arange(28.0), torch.arange(9.0), indexing="ij")
    volume = (torch.sin(x / 8) + torch.cos(y / 7) + z / 9)[None, None]
    for canvas in (60, 180):  # cells of 20x20 pixels and 60x60
        stitch = Stitch.fit((36, 28, 9), canvas, resize=True)
        error = (stitch.unstitch(stitch.stitch(volume)) - volume)[..., 2:-2, 2:-2, :].abs().max()
        assert error < 0.03
        label = (volume[:, 0] > 0.4).long() * 3
        canvas_label = stitch.stitch_label(label)
        assert set(canvas_label.unique().tolist()) <= {0, 3, 255}
        assert (stitch.unstitch_label(canvas_label) != label).float().mean() < 0.03
    # Shrinking takes every voxel into account: fine stripes become grey instead of vanishing.
    stripes = torch.zeros(1, 1, 64, 64, 4)
    stripes[:, :, ::4] = 1
    small = Stitch.fit((64, 64, 4), 32, resize=True).stitch(stripes)
    grey = small[..., 2:-2, 2:14]
    assert float(grey.min()) > 0.2 and float(grey.max()) < 0.3


@pytest.mark.parametrize("resize", [False, True])
def test_gradients_pass_both_ways(resize: bool) -> None:
    stitch = Stitch.fit((3, 4, 5), 9, resize=resize, axis=1)
    volume = torch.randn(2, 1, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(stitch.stitch, (volume,))
    canvas = torch.randn(2 * stitch.canvases, 2, 9, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(stitch.unstitch, (canvas,))
    if not resize:
        stitch.unstitch(canvas).sum().backward()
        drawn = stitch.stitch(torch.ones(2, 1, 3, 4, 5)) == 1
        assert canvas.grad is not None
        assert torch.equal(canvas.grad != 0, drawn.expand(-1, 2, -1, -1))  # empty places get no gradient


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int16, torch.bool])
def test_types_stay(dtype: torch.dtype) -> None:
    volume = (torch.arange(2 * 5 * 6 * 7).reshape(1, 2, 5, 6, 7) % 2).to(dtype)
    stitch, resized = Stitch.fit((5, 6, 7), 20), Stitch.fit((5, 6, 7), 30, resize=True)
    assert stitch.stitch(volume).dtype == dtype
    assert torch.equal(stitch.unstitch(stitch.stitch(volume)), volume)
    kind = dtype if dtype.is_floating_point else torch.float32
    assert resized.stitch(volume).dtype == kind
    assert resized.unstitch(resized.stitch(volume)).dtype == kind


def test_mixed_precision_around_it_changes_nothing() -> None:
    stitch = Stitch.fit((5, 6, 7), 30, resize=True)
    volume = torch.rand(1, 1, 5, 6, 7)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = stitch.stitch(volume)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, stitch.stitch(volume))


def test_labels_that_cannot_hold_the_ignore_value_change_type() -> None:
    stitch = Stitch.fit((5, 6, 7), 20)
    for dtype in (torch.bool, torch.int8):
        label = stitch.stitch_label(torch.ones(1, 5, 6, 7, dtype=dtype))
        assert label.dtype == torch.uint8
        assert label.unique().tolist() == [1, 255]
    assert stitch.stitch_label(torch.ones(1, 5, 6, 7, dtype=torch.int64)).dtype == torch.int64


def test_a_layout_is_a_value() -> None:
    first, second = Stitch.fit([5, 6, 7], 20), Stitch.fit((5, 6, 7), (20, 20))
    assert first == second and hash(first) == hash(second)
    assert first != Stitch.fit((5, 6, 7), 21)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (30, 5, 5)}, "cut the volume into patches"),
        ({"size": (5, 30, 5)}, "cut the volume into patches"),
        ({"size": (5, 5, 0)}, "positive sides"),
        ({"size": (5, 5)}, "positive sides"),
        ({"canvas": (0, 20)}, "positive sides"),
        ({"grid": (5, 4)}, "1x1 to 4x4"),
        ({"grid": (0, 4)}, "1x1 to 4x4"),
        ({"grid": (2, 2), "canvases": 2}, "expected 3 to 9 canvases, got 2"),
        ({"canvases": 0}, "expected 1 to 9 canvases"),
        ({"canvases": 10}, "expected 1 to 9 canvases"),
        ({"axis": 3}, "axis 0, 1 or 2"),
    ],
)
def test_impossible_layouts_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Stitch.fit(**{"size": (5, 5, 9), "canvas": 20, **options})


def test_slices_larger_than_the_published_canvas_are_refused() -> None:
    with pytest.raises(ConfigError, match="cut patches first"):
        Stitch.published((112, 130, 80), 128)


def test_other_sizes_are_refused() -> None:
    stitch = Stitch.fit((5, 6, 30), 20)  # three canvases
    assert stitch.canvases == 3
    for shape in ((1, 1, 6, 5, 30), (1, 5, 6, 30), (5, 6, 30)):
        with pytest.raises(DataError, match=r"\[B, C, 5, 6, 30\]"):
            stitch.stitch(torch.zeros(shape))
    with pytest.raises(DataError, match=r"\[B, 5, 6, 30\]"):
        stitch.stitch_label(torch.zeros(1, 1, 5, 6, 30))
    for shape in ((3, 1, 20, 21), (4, 1, 20, 20), (3, 20, 20)):
        with pytest.raises(DataError, match=r"\[B\*3, K, 20, 20\]"):
            stitch.unstitch(torch.zeros(shape))
    with pytest.raises(DataError, match=r"\[B\*3, 20, 20\]"):
        stitch.unstitch_label(torch.zeros(3, 1, 20, 20))
