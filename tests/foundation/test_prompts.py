"""Prompts from predictions: on shapes whose best clicks are known, and in every frame there and back."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.transform import Rotation

from scarceseg.data.geometry import to_sitk
from scarceseg.errors import ConfigError, DataError
from scarceseg.foundation import prompts
from scarceseg.foundation.prompts import (
    add_click,
    box_from_mask,
    check_prompt,
    combine,
    correction_clicks,
    crop_prompt,
    mask_prompt,
    points_from_probability,
    resize_prompt,
    to_voxel,
    to_world,
)
from scarceseg.types import Geometry, Prompt

UNIT = (1.0, 1.0, 1.0)
SIZE = (31, 27, 23)


def ball(
    centre: tuple[float, ...], radius: float, spacing_mm: tuple[float, ...] = UNIT, size: tuple[int, ...] = SIZE
) -> torch.Tensor:
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in size), indexing="ij"), axis=-1)
    return torch.from_numpy(np.linalg.norm((grid - centre) * spacing_mm, axis=-1) <= radius)


def points_of(prompt: Prompt | None) -> list[list[float]]:
    assert prompt is not None and prompt.points_voxel is not None
    return prompt.points_voxel.tolist()


def labels_of(prompt: Prompt | None) -> list[int]:
    assert prompt is not None and prompt.point_labels is not None
    return prompt.point_labels.tolist()


def box_of(prompt: Prompt | None) -> list[list[float]]:
    assert prompt is not None and prompt.box_voxel is not None
    return prompt.box_voxel.tolist()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Clicks from a probability


def test_one_click_is_the_centre() -> None:
    assert points_of(points_from_probability(ball((14, 12, 9), 6).float(), spacing_mm=UNIT)) == [[14, 12, 9]]


def test_distance_is_in_millimetres() -> None:
    plate = torch.zeros(SIZE)
    plate[4:25, 10:17, 9:12] = 1  # 7 voxels along Y, 3 along Z
    (first,) = points_of(points_from_probability(plate, spacing_mm=(1.0, 1.0, 5.0)))
    assert first == [14, 13, 10]  # in the middle of all that are 4 mm from the sides along Y
    depth = ndimage.distance_transform_edt(np.pad(plate.numpy(), 1), sampling=(1, 1, 5))[1:-1, 1:-1, 1:-1]
    assert depth[tuple(int(v) for v in first)] == depth.max() == 4


def test_the_face_of_the_volume_counts_as_a_border() -> None:
    half = torch.zeros(SIZE)
    half[:, :, 10:] = 1
    (first,) = points_of(points_from_probability(half, spacing_mm=UNIT))
    assert first[2] == 16 and 6 <= first[0] <= 24 and 6 <= first[1] <= 20


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), spacing=st.tuples(*[st.sampled_from([0.6, 1.0, 2.5])] * 3))
def test_the_first_click_is_the_deepest_confident_voxel(seed: int, spacing: tuple[float, float, float]) -> None:
    noise = np.random.default_rng(seed).normal(size=(17, 15, 13))
    smooth = ndimage.gaussian_filter(noise, 2)
    probability = torch.from_numpy(1 / (1 + np.exp(-6 * smooth / smooth.std()))).float()
    found = points_from_probability(probability, spacing_mm=spacing, confident=0.8, components="largest")
    pieces, count = ndimage.label(probability.numpy() > 0.5, structure=np.ones((3, 3, 3)))
    assert count > 0
    sizes = np.bincount(pieces.ravel())[1:]
    largest = pieces == 1 + sizes.argmax()
    sure = largest & (probability.numpy() >= np.float32(0.8))
    depth = ndimage.distance_transform_edt(np.pad(largest, 1), sampling=spacing)[1:-1, 1:-1, 1:-1]
    (first,) = points_of(found)
    index = tuple(int(v) for v in first)
    if not sure.any():
        return
    assert sure[index]
    assert depth[index] == pytest.approx(depth[sure].max(), rel=1e-5)


def test_only_confident_voxels_are_clicked() -> None:
    probability = 0.7 * ball((14, 12, 9), 8).float()
    side = ball((19, 12, 9), 2)
    probability[side] = 0.95
    for count in (1, 4):
        for x, y, z in points_of(points_from_probability(probability, count, spacing_mm=UNIT)):
            assert side[int(x), int(y), int(z)]


def test_without_a_confident_voxel_the_best_ones_count() -> None:
    probability = 0.6 * ball((14, 12, 9), 8).float()
    probability[ball((11, 12, 9), 2)] = 0.8  # half-way between 0.5 and 0.8 is 0.65
    (first,) = points_of(points_from_probability(probability, spacing_mm=UNIT))
    assert ball((11, 12, 9), 2)[tuple(int(v) for v in first)]


def test_each_piece_gets_a_click_the_largest_first() -> None:
    centres = {(6, 6, 6): 4, (22, 8, 12): 6, (8, 20, 15): 3}
    probability = torch.zeros(SIZE)
    for centre, radius in centres.items():
        probability[ball(centre, radius)] = 1
    expected = [[22, 8, 12], [6, 6, 6], [8, 20, 15]]
    for count in (1, 2, 3):
        assert points_of(points_from_probability(probability, count, spacing_mm=UNIT)) == expected[:count]
    more = points_of(points_from_probability(probability, 6, spacing_mm=UNIT))
    assert more[:3] == expected and len({tuple(p) for p in more}) == 6
    largest = points_of(points_from_probability(probability, 6, spacing_mm=UNIT, components="largest"))
    assert all(ball((22, 8, 12), 6)[tuple(int(v) for v in p)] for p in largest)


def test_of_places_equally_deep_the_middle_is_clicked() -> None:
    tubes = torch.zeros(SIZE)
    tubes[2:29, 3:8, 4:9] = 1
    tubes[4:29, 15:18, 10:13] = 1
    found = points_from_probability(tubes, 2, spacing_mm=UNIT)
    assert points_of(found) == [[15, 5, 6], [16, 16, 11]]


def test_further_clicks_keep_away_from_the_first_and_from_the_border() -> None:
    probability = ball((15, 13, 11), 8).float()
    points = np.array(points_of(points_from_probability(probability, 5, spacing_mm=UNIT)))
    gaps = np.linalg.norm(points[:, None] - points[None], axis=-1)[~np.eye(5, dtype=bool)]
    borders = 8 - np.linalg.norm(points - (15, 13, 11), axis=1)
    assert gaps.min() >= 3 and borders.min() >= 2


def test_there_are_no_more_clicks_than_voxels() -> None:
    probability = torch.zeros(SIZE)
    probability[3:5, 7, 9] = 1
    found = points_from_probability(probability, 10, spacing_mm=UNIT)
    assert sorted(points_of(found)) == [[3, 7, 9], [4, 7, 9]]
    assert labels_of(found) == [1, 1]


def test_an_empty_prediction_gives_no_prompt() -> None:
    assert points_from_probability(torch.full(SIZE, 0.5), spacing_mm=UNIT) is None
    assert points_from_probability(torch.full(SIZE, 0.5), spacing_mm=UNIT, negative=3) is None
    assert points_from_probability(torch.full(SIZE, 0.5), spacing_mm=UNIT, threshold=0.4) is not None
    assert box_from_mask(torch.zeros(SIZE)) is None
    mask = ball((9, 9, 9), 3)
    assert correction_clicks(mask, mask, spacing_mm=UNIT) is None


def test_clicks_outside_lie_in_sure_background_around_the_object() -> None:
    spacing = (1.0, 1.0, 2.0)
    probability = ball((15, 13, 11), 7, spacing).float()
    rim = ball((15, 13, 11), 9, spacing) & (probability == 0)
    probability[rim] = 0.3
    found = points_from_probability(probability, 2, spacing_mm=spacing, negative=4, ring_mm=5.0)
    assert labels_of(found) == [1, 1, 0, 0, 0, 0]
    distance = ndimage.distance_transform_edt(probability.numpy() <= 0.5, sampling=spacing)
    outside = [tuple(int(v) for v in p) for p in points_of(found)[2:]]
    for index in outside:
        assert probability[index] == 0 and 2 < distance[index] < 5
    positions = np.array(outside) * spacing
    gaps = np.linalg.norm(positions[:, None] - positions[None], axis=-1)[~np.eye(4, dtype=bool)]
    assert gaps.min() > 5


def test_without_sure_background_there_is_no_click_outside() -> None:
    probability = torch.full(SIZE, 0.3)
    probability[ball((15, 13, 11), 5)] = 1
    assert labels_of(points_from_probability(probability, spacing_mm=UNIT, negative=3)) == [1]


def test_chance_comes_from_the_generator_alone() -> None:
    probability = ball((15, 13, 11), 8).float()

    def draw(seed: int) -> list[list[float]]:
        return points_of(
            points_from_probability(probability, 3, spacing_mm=UNIT, negative=2, generator=generator(seed))
        )

    torch.manual_seed(0)
    first = draw(1)
    torch.manual_seed(1)
    assert draw(1) == first
    assert any(draw(seed) != first for seed in range(2, 6))
    depth = ndimage.distance_transform_edt(probability.numpy())
    assert all(depth[tuple(int(v) for v in draw(seed)[0])] >= depth.max() / 2 for seed in range(5))


# Corrections


def test_corrections_go_to_the_deepest_difference_with_its_side() -> None:
    body = ball((15, 13, 11), 6)
    missing = ball((15, 13, 11), 3)  # a hole in the other mask
    surplus = ball((4, 4, 4), 2)
    other = (body & ~missing) | surplus
    found = correction_clicks(body, other, 2, spacing_mm=UNIT)
    assert points_of(found) == [[15, 13, 11], [4, 4, 4]]
    assert labels_of(found) == [1, 0]
    swapped = correction_clicks(other, body, 2, spacing_mm=UNIT)
    assert points_of(swapped) == points_of(found) and labels_of(swapped) == [0, 1]


def test_a_thin_rim_comes_after_a_small_ball() -> None:
    body = ball((15, 13, 11), 9)
    other = ball((15, 13, 11), 10) & ~ball((15, 13, 11), 2)
    rim, core = int((other & ~body).sum()), int((body & ~other).sum())
    assert rim > 10 * core
    found = correction_clicks(body, other, 2, spacing_mm=UNIT)
    assert points_of(found)[0] == [15, 13, 11] and labels_of(found) == [1, 0]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), count=st.integers(1, 6), chance=st.booleans())
def test_every_correction_has_the_right_side(seed: int, count: int, chance: bool) -> None:
    rng = np.random.default_rng(seed)
    wished, other = (torch.from_numpy(ndimage.gaussian_filter(rng.normal(size=(9, 8, 7)), 1) > 0) for _ in range(2))
    found = correction_clicks(
        wished, other, count, spacing_mm=(1.0, 1.5, 0.7), generator=generator(seed) if chance else None
    )
    points = [tuple(int(v) for v in point) for point in points_of(found)]
    assert len(points) == count == len(set(points))
    for point, label in zip(points, labels_of(found), strict=True):
        assert wished[point] != other[point] and int(wished[point]) == label


# Boxes and masks


def test_the_box_is_exact() -> None:
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[4:9, 7, 2:23] = True
    assert box_of(box_from_mask(mask)) == [[4, 7, 2], [8, 7, 22]]
    assert box_of(box_from_mask(mask, 3)) == [[1, 4, 0], [11, 10, 22]]
    assert box_of(box_from_mask(mask, (1, 0, 2))) == [[3, 7, 0], [9, 7, 22]]
    assert box_of(box_from_mask(mask.float() * 0.6)) == [[4, 7, 2], [8, 7, 22]]
    mask[30, 26, 0] = True
    assert box_of(box_from_mask(mask)) == [[4, 7, 0], [30, 26, 22]]
    assert box_of(box_from_mask(mask, largest_component=True)) == [[4, 7, 2], [8, 7, 22]]


def test_a_mask_prompt_is_the_map_without_gradient() -> None:
    probability = torch.rand(SIZE, requires_grad=True)
    found = mask_prompt(probability)
    assert found.mask is not None and not found.mask.requires_grad
    assert torch.equal(found.mask, probability)
    assert mask_prompt(ball((9, 9, 9), 3)).mask is not None
    assert found.points_voxel is None and found.box_voxel is None


# Several prompts


def test_prompts_add_up() -> None:
    clicks = points_from_probability(ball((9, 9, 9), 3).float(), spacing_mm=UNIT)
    box, mask = box_from_mask(ball((9, 9, 9), 3)), mask_prompt(torch.zeros(SIZE))
    more = Prompt(torch.tensor([[1.0, 2, 3]]), torch.tensor([0]), box_voxel=torch.tensor([[0.0, 0, 0], [1, 1, 1]]))
    all_of_them = combine(clicks, None, box, mask, more)
    assert points_of(all_of_them) == [[9, 9, 9], [1, 2, 3]] and labels_of(all_of_them) == [1, 0]
    assert box_of(all_of_them) == [[0, 0, 0], [1, 1, 1]]
    assert all_of_them.mask is mask.mask
    assert combine() == combine(None) == Prompt()
    with pytest.raises(DataError, match="one label"):
        combine(clicks, Prompt(torch.zeros(2, 3)))


def test_clicks_are_added_at_the_end() -> None:
    first = add_click(Prompt(), (3, 4, 5), True)
    second = add_click(first, (6, 7, 8), False, size=SIZE)
    assert points_of(first) == [[3, 4, 5]] and labels_of(first) == [1]
    assert points_of(second) == [[3, 4, 5], [6, 7, 8]] and labels_of(second) == [1, 0]
    for prompt, options in [(first, {"size": SIZE}), (mask_prompt(torch.zeros(SIZE)), {})]:
        with pytest.raises(DataError, match="outside the volume"):
            add_click(prompt, (3, 27, 5), True, **options)
    with pytest.raises(DataError, match="outside the volume"):
        add_click(first, (3, -1, 5), True)


# Frames


def oblique() -> Geometry:
    turn = Rotation.from_euler("xyz", (20, -35, 70), degrees=True).as_matrix()
    return Geometry(SIZE, (0.7, 1.3, 2.9), (-31.5, 12.25, 88.0), tuple(turn.ravel().tolist()))


def test_world_positions_are_those_of_the_image_library() -> None:
    geometry = oblique()
    image = to_sitk(np.zeros(SIZE, dtype=np.uint8), geometry)
    points = torch.from_numpy(np.random.default_rng(0).uniform(-5, 40, (20, 3)))
    world = to_world(points, geometry)
    for point, place in zip(points.tolist(), world.tolist(), strict=True):
        assert image.TransformContinuousIndexToPhysicalPoint(point) == pytest.approx(place, abs=1e-9)
        assert image.TransformPhysicalPointToContinuousIndex(place) == pytest.approx(point, abs=1e-9)
    torch.testing.assert_close(to_voxel(world, geometry), points, rtol=0, atol=1e-9)
    assert isinstance(image, sitk.Image)
    assert to_voxel(world.float(), geometry).dtype == torch.float64


def sample_prompt() -> Prompt:
    mask = torch.zeros(SIZE)
    mask[10:16, 8:14, 6:12] = 1
    return Prompt(
        torch.tensor([[12.0, 9, 7], [15, 13, 11]]),
        torch.tensor([1, 0]),
        torch.tensor([[10.0, 8, 6], [15, 13, 11]]),
        mask,
    )


def test_a_window_sees_the_same_places() -> None:
    prompt = sample_prompt()
    inner = crop_prompt(prompt, (8, 5, 4), (11, 12, 13))
    assert points_of(inner) == [[4, 4, 3], [7, 8, 7]] and labels_of(inner) == [1, 0]
    assert box_of(inner) == [[2, 3, 2], [7, 8, 7]] == box_of(box_from_mask(inner.mask))  # type: ignore[arg-type]
    wide = crop_prompt(prompt, (-3, -2, -1), (40, 40, 40))
    assert points_of(wide) == [[15, 11, 8], [18, 15, 12]]
    assert wide.mask is not None and wide.mask.shape == (40, 40, 40)
    assert box_of(wide) == box_of(box_from_mask(wide.mask))
    back = crop_prompt(wide, (3, 2, 1), SIZE)
    assert points_of(back) == points_of(prompt) and box_of(back) == box_of(prompt)
    assert prompt.mask is not None and back.mask is not None and torch.equal(back.mask, prompt.mask)


def test_places_outside_a_window() -> None:
    prompt = sample_prompt()
    with pytest.raises(DataError, match="window"):
        crop_prompt(prompt, (8, 5, 4), (7, 12, 13))
    kept = crop_prompt(prompt, (8, 5, 4), (7, 12, 13), outside="drop")
    assert points_of(kept) == [[4, 4, 3]] and labels_of(kept) == [1]
    assert box_of(kept) == [[2, 3, 2], [6, 8, 7]]
    box_alone = Prompt(box_voxel=prompt.box_voxel)
    with pytest.raises(DataError, match="box lies outside the window"):
        crop_prompt(box_alone, (17, 0, 0), (5, 5, 5))
    assert (
        crop_prompt(Prompt(prompt.points_voxel, prompt.point_labels), (20, 0, 0), (5, 5, 5), outside="drop") == Prompt()
    )
    assert crop_prompt(box_alone, (17, 0, 0), (5, 5, 5), outside="drop") == Prompt()


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(*[st.integers(1, 12)] * 3),
    factor=st.tuples(*[st.integers(1, 4)] * 3),
    seed=st.integers(0, 2**31 - 1),
)
def test_resizing_and_back(size: tuple[int, int, int], factor: tuple[int, int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = torch.from_numpy(rng.integers(0, size, (4, 3))).float()
    corners = rng.integers(0, size, (2, 3))
    box = torch.from_numpy(np.sort(corners, axis=0)).float()
    prompt = Prompt(points, torch.tensor([1, 0, 1, 0]), box)
    larger = (size[0] * factor[0], size[1] * factor[1], size[2] * factor[2])
    there = resize_prompt(prompt, size, larger)
    # On a grid of blocks, a box holds the blocks of its voxels and a point lies in the middle of its block.
    mask = torch.zeros(size)
    low, high = box.long().tolist()
    mask[low[0] : high[0] + 1, low[1] : high[1] + 1, low[2] : high[2] + 1] = 1
    blocks = mask
    for axis in range(3):
        blocks = blocks.repeat_interleave(factor[axis], dim=axis)
    assert box_of(there) == box_of(box_from_mask(blocks))
    middle = points * torch.tensor(factor) + (torch.tensor(factor) - 1) / 2
    torch.testing.assert_close(there.points_voxel, middle)
    back = resize_prompt(there, larger, size)
    torch.testing.assert_close(back.points_voxel, points, rtol=0, atol=1e-4)
    torch.testing.assert_close(back.box_voxel, box, rtol=0, atol=1e-4)
    assert labels_of(back) == [1, 0, 1, 0]


def test_resizing_keeps_prompts_inside_and_in_order() -> None:
    prompt = Prompt(
        torch.tensor([[0.0, 0, 0], [30, 26, 22]]), torch.tensor([1, 1]), torch.tensor([[7.0, 7, 7], [7, 8, 22]])
    )
    small = resize_prompt(prompt, SIZE, (5, 4, 3))
    check_prompt(small, (5, 4, 3))
    assert points_of(small) == [[0, 0, 0], [4, 3, 2]]
    masked = resize_prompt(sample_prompt(), SIZE, (62, 54, 46))
    assert masked.mask is not None
    assert box_of(masked) == box_of(box_from_mask(masked.mask))
    assert resize_prompt(sample_prompt(), SIZE, SIZE).mask is not None


# What is refused


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt(torch.tensor([[31.0, 0, 0]]), torch.tensor([1])), "outside the volume"),
        (Prompt(torch.tensor([[0.0, -1, 0]]), torch.tensor([1])), "outside the volume"),
        (Prompt(torch.tensor([[0.0, float("nan"), 0]]), torch.tensor([1])), "finite"),
        (Prompt(torch.zeros(2, 3), torch.tensor([1])), "one label"),
        (Prompt(torch.zeros(2, 3)), "one label"),
        (Prompt(point_labels=torch.tensor([1])), "one label"),
        (Prompt(torch.zeros(2, 2), torch.tensor([1, 1])), r"\[N, 3\]"),
        (Prompt(box_voxel=torch.zeros(3, 3)), r"\[2, 3\]"),
        (Prompt(box_voxel=torch.tensor([[0.0, 0, 0], [3, 3, 23]])), "outside the volume"),
        (Prompt(box_voxel=torch.tensor([[4.0, 0, 0], [3, 3, 3]])), "lowest corner first"),
        (Prompt(mask=torch.zeros(31, 27, 22)), "size"),
    ],
)
def test_prompts_that_are_none_are_refused(prompt: Prompt, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_prompt(prompt, SIZE)
    with pytest.raises(DataError):
        resize_prompt(prompt, SIZE, (10, 10, 10))


@pytest.mark.parametrize(
    "values", [torch.full(SIZE, 1.5), torch.full(SIZE, -0.5), torch.zeros(1, *SIZE), torch.ones(0, 2, 2)]
)
def test_maps_that_are_no_probabilities_are_refused(values: torch.Tensor) -> None:
    calls: list[Callable[[], object]] = [
        lambda: points_from_probability(values, spacing_mm=UNIT),
        lambda: box_from_mask(values),
        lambda: mask_prompt(values),
        lambda: correction_clicks(values, torch.zeros(SIZE), spacing_mm=UNIT),
    ]
    for call in calls:
        with pytest.raises(DataError, match="expected probabilities"):
            call()


def test_nan_is_refused() -> None:
    with pytest.raises(DataError, match="expected probabilities"):
        mask_prompt(torch.full(SIZE, float("nan")))


def test_masks_of_two_sizes_are_refused() -> None:
    with pytest.raises(DataError, match="one size"):
        correction_clicks(torch.zeros(SIZE), torch.zeros(31, 27, 22), spacing_mm=UNIT)


@pytest.mark.parametrize(
    "options",
    [
        {"count": 0},
        {"negative": -1},
        {"threshold": 1.0},
        {"threshold": 0.7, "confident": 0.6},
        {"confident": 1.1},
        {"components": "some"},
    ],
)
def test_impossible_settings_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        points_from_probability(torch.ones(SIZE), **{"spacing_mm": UNIT, **options})  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        correction_clicks(torch.ones(SIZE), torch.zeros(SIZE), 0, spacing_mm=UNIT)
    with pytest.raises(ConfigError):
        box_from_mask(torch.ones(SIZE), -1)
    with pytest.raises(DataError, match="three positive numbers"):
        resize_prompt(Prompt(), SIZE, (0, 1, 1))


def test_nothing_takes_a_reference() -> None:
    functions = [f for name, f in inspect.getmembers(prompts, inspect.isfunction) if f.__module__ == prompts.__name__]
    public = [f for f in functions if not f.__name__.startswith("_")]
    assert len(public) >= 11
    for function in public:
        for argument in inspect.signature(function).parameters:
            assert not any(word in argument for word in ("label", "reference", "truth", "target", "ground"))
