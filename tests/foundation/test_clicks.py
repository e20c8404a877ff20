"""Click samplers against the published implementation's regions, a slow oracle, and their promises."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from scarceseg.errors import ConfigError, DataError
from scarceseg.foundation.clicks import Style, error_distances, next_click, random_region, ritm_region

STYLES: tuple[Style, ...] = ("ritm", "random", "largest")


def load(shared: Path, case: str) -> dict[str, torch.Tensor]:
    with np.load(shared / "conformance" / "sammed3d" / f"{case}.npz") as arrays:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def masks(seed: int, size: tuple[int, int, int] = (7, 6, 5)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(size, generator=generator) > 0.4 for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("case", ["click_a", "click_empty"])
def test_distances_and_regions_are_the_published_ones(shared: Path, case: str) -> None:
    data = load(shared, case)
    target = data["gt"]
    for threshold in (0.0, 0.5):
        prediction = data["prev_logits"] > threshold
        for found, name in zip(error_distances(prediction, target), ("dist_fn", "dist_fp"), strict=True):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, data[name], rtol=1e-6, atol=1e-6)
        region, positive = ritm_region(prediction, target)
        assert torch.equal(region, data["ritm_region"] != 0)
        assert positive  # config.positive_click of both cases
        assert torch.equal(random_region(prediction, target), data["random_region"] != 0)


@pytest.mark.parametrize("spacing", [None, (0.7, 1.0, 2.5)])
def test_distances_equal_the_slow_ones(spacing: tuple[float, float, float] | None) -> None:
    prediction, target = masks(4)
    step = np.array(spacing or (1, 1, 1))
    for found, region in zip(
        error_distances(prediction, target, spacing), (target & ~prediction, prediction & ~target), strict=True
    ):
        wide = np.pad(region.numpy(), 1)
        outside = np.argwhere(~wide)
        for voxel in product(*map(range, region.shape)):
            expected = 0.0
            if region[voxel]:
                expected = np.sqrt((((np.array(voxel) + 1 - outside) * step) ** 2).sum(1)).min()
            assert float(found[voxel]) == pytest.approx(expected, abs=1e-5)


def test_ties_go_to_false_positives_and_the_heart_is_above_half() -> None:
    prediction, target = torch.zeros(2, 20, 9, 9, dtype=torch.bool)
    prediction[1:6, 2:7, 2:7] = True
    target[9:14, 2:7, 2:7] = True
    region, positive = ritm_region(prediction, target)
    assert not positive
    assert region.nonzero().amin(0).tolist() == [2, 3, 3]  # depth 3 in the centre: what is above 1.5
    assert region.nonzero().amax(0).tolist() == [4, 5, 5]
    target[9:16, 1:8, 1:8] = True
    region, positive = ritm_region(prediction, target)
    assert positive
    assert region[12, 4, 4]


@pytest.mark.parametrize("style", STYLES)
def test_clicks_lie_in_errors_and_carry_the_targets_value(style: Style) -> None:
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        prediction, target = masks(seed)
        found = next_click(prediction, target, generator, style)
        assert found is not None
        voxel, label = found
        assert bool(prediction[voxel]) != bool(target[voxel])
        assert label == int(target[voxel])


@pytest.mark.parametrize("style", STYLES)
def test_equal_masks_need_no_click(style: Style) -> None:
    prediction, _ = masks(1)
    assert next_click(prediction, prediction.clone(), style=style) is None
    nothing = torch.zeros(4, 4, 4)
    assert next_click(nothing, nothing, style=style) is None
    region, _ = ritm_region(nothing, nothing)
    assert not region.any()


@pytest.mark.parametrize("style", ["ritm", "random"])
def test_chance_comes_from_the_generator_and_reaches_every_voxel(style: Style) -> None:
    prediction, target = masks(2, (4, 4, 3))
    clicks = [next_click(prediction, target, torch.Generator().manual_seed(5), style) for _ in range(2)]
    assert clicks[0] == clicks[1]
    region = random_region(prediction, target) if style == "random" else ritm_region(prediction, target)[0]
    generator = torch.Generator().manual_seed(6)
    drawn = {found[0] for _ in range(600) if (found := next_click(prediction, target, generator, style))}
    assert drawn == {tuple(place) for place in region.nonzero().tolist()}


def test_largest_is_the_centre_of_the_largest_ball() -> None:
    prediction, target = torch.zeros(2, 31, 17, 17, dtype=torch.uint8)
    target[2:9, 3:10, 4:11] = 1  # centre (5, 6, 7)
    prediction[20:23, 2:15, 2:15] = 1  # more voxels, but thinner
    assert next_click(prediction, target, style="largest") == ((5, 6, 7), 1)
    prediction[13:30, 0:17, 0:17] = 1
    assert next_click(prediction, target, style="largest") == ((21, 8, 8), 0)
    assert next_click(1 - prediction, 1 - target, style="largest") == ((21, 8, 8), 1)


def test_spacing_changes_what_is_deepest() -> None:
    prediction, target = torch.zeros(2, 20, 20, 20, dtype=torch.bool)
    target[1:6, 1:10, 1:10] = True  # thin along x
    prediction[10:17, 11:18, 11:18] = True
    assert next_click(prediction, target, style="largest") == ((13, 14, 14), 0)
    found = next_click(prediction, target, style="largest", spacing_mm=(4.0, 1.0, 1.0))
    assert found is not None
    assert found[1] == 1


def test_other_masks_are_refused() -> None:
    with pytest.raises(DataError, match=r"one size, got \[3, 3, 3\] and \[3, 3, 4\]"):
        next_click(torch.zeros(3, 3, 3), torch.zeros(3, 3, 4))
    with pytest.raises(DataError, match=r"\[X, Y, Z\]"):
        error_distances(torch.zeros(1, 3, 3, 3), torch.zeros(1, 3, 3, 3))
    with pytest.raises(ConfigError, match="ritm, random, largest"):
        next_click(torch.zeros(3, 3, 3), torch.zeros(3, 3, 3), style="centre")  # type: ignore[arg-type]
