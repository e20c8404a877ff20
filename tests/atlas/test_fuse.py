"""Fusion against slow, obvious versions of its equations."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from scarceseg.atlas.fuse import FLAT, Fusion, agreement, fuse, fusion_weights, local_correlation, odd_side
from scarceseg.errors import ConfigError

Array = NDArray[np.float32]
KINDS = ["mean", "majority", "local", "joint"]
SIZE = (7, 6, 5)
UNIT = (1.0, 1.0, 1.0)


def made(atlases: int = 3, classes: int = 3, channels: int = 2, seed: int = 0) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.ones(classes), size=(atlases, *SIZE)).astype(np.float32)
    image = rng.normal(size=(channels, *SIZE)).astype(np.float32)
    noise = rng.normal(size=(atlases, channels, *SIZE)) * np.arange(1, atlases + 1).reshape(-1, 1, 1, 1, 1)
    return np.moveaxis(probabilities, -1, 1).copy(), (image + 0.5 * noise).astype(np.float32), image


def cubes(values: NDArray, window: int) -> NDArray:
    """The cube around every voxel, flat: ``[X, Y, Z, window^3]``."""
    reach = window // 2
    padded = np.pad(values, reach, mode="edge")
    return np.lib.stride_tricks.sliding_window_view(padded, (window,) * 3).reshape(*values.shape, -1)


def slow_correlation(a: Array, b: Array, window: int) -> NDArray:
    total = np.zeros(SIZE)
    for x, y in zip(a.astype(float), b.astype(float), strict=True):
        x, y = cubes((x - x.mean()) / x.std(), window), cubes((y - y.mean()) / y.std(), window)
        dx, dy = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
        spread = np.sqrt(((dx**2).mean(-1) + FLAT) * ((dy**2).mean(-1) + FLAT))
        total += ((dx * dy).mean(-1) + FLAT) / spread
    return np.clip(total / len(a), 0, 1)


def slow_joint(warped: Array, image: Array, how: Fusion) -> NDArray:
    def local(channel: Array) -> NDArray:
        values = (channel.astype(float) - channel.mean(dtype=float)) / channel.astype(float).std()
        around = cubes(values, round(how.window_mm))
        return (values - around.mean(-1)) / np.sqrt(around.var(-1) + FLAT)

    errors = [[np.abs(local(a) - local(b)) for a, b in zip(w, image, strict=True)] for w in warped]
    weights = np.empty((len(warped), *SIZE))
    for place in np.ndindex(SIZE):
        together = np.zeros((len(warped), len(warped)))
        for i, first in enumerate(errors):
            for j, second in enumerate(errors):
                products = [
                    cubes(a * b, round(how.window_mm))[place].mean() for a, b in zip(first, second, strict=True)
                ]
                together[i, j] = np.mean(products) ** how.power
        together = together / (np.trace(together) / len(warped)) + how.ridge * np.eye(len(warped))
        weights[:, place[0], place[1], place[2]] = np.maximum(np.linalg.inv(together).sum(1), 0) + 1e-6
    return weights / weights.sum(0)


@pytest.mark.parametrize("window", [3, 5])
def test_local_correlation(window: int) -> None:
    _, warped, image = made()
    np.testing.assert_allclose(
        local_correlation(warped[1], image, (window,) * 3), slow_correlation(warped[1], image, window), atol=1e-5
    )


def test_local_correlation_knows_gain_and_offset_and_flat_places() -> None:
    _, _, image = made()
    np.testing.assert_allclose(local_correlation(image, 3 * image + 7, (3, 3, 3)), 1, atol=1e-4)
    assert local_correlation(image, -image, (3, 3, 3)).max() < 0.01
    flat = np.ones_like(image)
    np.testing.assert_allclose(local_correlation(flat, flat, (3, 3, 3)), 1)
    assert local_correlation(flat, image, (3, 3, 3)).max() < 0.1


@pytest.mark.parametrize("power", [1.0, 4.0])
def test_local_weights(power: float) -> None:
    probabilities, warped, image = made()
    weights = np.stack([slow_correlation(w, image, 3) for w in warped]) ** power + 1e-6
    weights /= weights.sum(0)
    fused, _ = fuse(probabilities, warped, image, Fusion(kind="local", window_mm=3, power=power))
    expected = sum(w * p for w, p in zip(weights[:, None], probabilities, strict=True))
    np.testing.assert_allclose(fused, expected, atol=1e-5)


def test_windows_are_millimetres() -> None:
    assert [odd_side(11, step) for step in (1.25, 1, 2, 5, 30)] == [9, 11, 5, 3, 1]
    _, warped, image = made()
    how = Fusion(kind="local", window_mm=3)
    for spacing, window in ((UNIT, (3, 3, 3)), ((1.0, 3.0, 0.6), (3, 1, 5))):
        weights = np.stack([local_correlation(w, image, window) for w in warped]) + 1e-6
        np.testing.assert_allclose(fusion_weights(warped, image, how, spacing), weights / weights.sum(0), atol=1e-5)


def test_joint_weights() -> None:
    probabilities, warped, image = made()
    how = Fusion(kind="joint", window_mm=3, power=1.5, ridge=0.2)
    weights = slow_joint(warped, image, how)
    np.testing.assert_allclose(fusion_weights(warped, image, how, UNIT), weights, atol=1e-4)
    fused, _ = fuse(probabilities, warped, image, how)
    np.testing.assert_allclose(fused, (weights[:, None] * probabilities).sum(0), atol=1e-4)


def test_mean_and_majority() -> None:
    probabilities, warped, image = made(atlases=4, classes=2)
    fused, _ = fuse(probabilities, warped, image, Fusion(kind="mean"))
    np.testing.assert_allclose(fused, probabilities.mean(0), atol=1e-6)
    fused, share = fuse(probabilities, warped, image, Fusion(kind="majority", doubt_mm=0))
    votes = probabilities.argmax(1)
    np.testing.assert_allclose(fused[1], (votes == 1).mean(0), atol=1e-6)
    np.testing.assert_allclose(share, np.maximum((votes == 1).mean(0), (votes == 0).mean(0)), atol=1e-6)


def test_agreement_is_the_smoothed_probability_of_the_winner() -> None:
    fused = made(atlases=1)[0][0]
    spacing = (1.0, 2.0, 0.5)
    smoothed = np.stack([ndimage.gaussian_filter(p, (1.5, 0.75, 3.0), mode="nearest") for p in fused])
    winner = fused.argmax(0)
    found = agreement(fused, 1.5, spacing)
    for place in np.ndindex(SIZE):
        assert found[place] == pytest.approx(smoothed[winner[place]][place], abs=1e-6)
    np.testing.assert_array_equal(agreement(fused, 0, spacing), fused.max(0))


def test_a_single_atlas_is_less_sure_near_its_outline() -> None:
    inside = np.zeros((21, 9, 9), dtype=np.float32)
    inside[7:14] = 1
    image = np.random.default_rng(0).normal(size=(1, 21, 9, 9)).astype(np.float32)
    _, sure = fuse(np.stack([1 - inside, inside])[None], image[None], image, Fusion(doubt_mm=2))
    line = sure[:, 4, 4]
    assert line[10] > line[8] > line[7]
    assert line[0] > line[4] > line[6]
    assert 0.5 < line[7] < 0.7 < 0.98 < line[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("atlases", [1, 2, 5])
@pytest.mark.parametrize("classes", [2, 4])
def test_ranges(kind: str, atlases: int, classes: int) -> None:
    probabilities, warped, image = made(atlases, classes, channels=1, seed=atlases)
    fused, sure = fuse(probabilities, warped, image, Fusion.model_validate({"kind": kind, "window_mm": 3}))
    assert fused.shape == (classes, *SIZE)
    assert fused.dtype == sure.dtype == np.float32
    np.testing.assert_allclose(fused.sum(0), 1, atol=1e-5)
    assert fused.min() >= 0
    assert sure.shape == SIZE
    assert 0 <= sure.min() <= sure.max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_atlases_that_say_the_same_agree_wholly(kind: str) -> None:
    probabilities, warped, image = made(atlases=3)
    probabilities[:] = probabilities[0] > 0.99
    probabilities[:, 1] = 1 - probabilities[:, 0] - probabilities[:, 2]
    fused, sure = fuse(probabilities, warped, image, Fusion.model_validate({"kind": kind, "doubt_mm": 0}))
    np.testing.assert_allclose(sure, 1, atol=1e-5)
    np.testing.assert_array_equal(fused.argmax(0), probabilities[0].argmax(0))


@pytest.mark.parametrize("kind", ["local", "joint"])
def test_each_atlas_counts_where_it_fits(kind: str) -> None:
    rng = np.random.default_rng(3)
    size = (20, 8, 8)
    image = ndimage.gaussian_filter(rng.normal(size=size), 1)[None].astype(np.float32)
    junk = ndimage.gaussian_filter(rng.normal(size=size), 1).astype(np.float32)
    left = (np.arange(20) < 10)[:, None, None]
    warped = np.stack([np.where(left, image, junk), np.where(left, junk, image), np.where(left, junk, image)])
    how = Fusion.model_validate({"kind": kind, "window_mm": 3, "ridge": 0.1})
    weights = fusion_weights(warped, image, how, UNIT)
    assert weights[0, :7].mean() > 0.7
    assert weights[0, 13:].mean() < 0.1


def test_two_copies_of_one_atlas_count_once_in_joint_fusion() -> None:
    rng = np.random.default_rng(4)
    image = rng.normal(size=(1, 12, 12, 12)).astype(np.float32)
    errors = rng.normal(size=(2, 12, 12, 12)).astype(np.float32)
    warped = (image + errors[[0, 0, 1]])[:, None].reshape(3, 1, 12, 12, 12)
    how = Fusion(kind="joint", window_mm=5, power=1, ridge=0.01)
    assert fusion_weights(warped, image, how, UNIT)[2].mean() > 0.4
    assert fusion_weights(warped, image, Fusion(kind="local", window_mm=5), UNIT)[2].mean() == pytest.approx(
        1 / 3, abs=0.05
    )


def test_shapes_that_do_not_fit_are_refused() -> None:
    probabilities, warped, image = made()
    with pytest.raises(ConfigError, match="expected probabilities"):
        fuse(probabilities[:, :, 1:], warped, image, Fusion())
    with pytest.raises(ConfigError, match="of 3 atlases, got 2"):
        fuse(probabilities[:2], warped, image, Fusion())
    with pytest.raises(ConfigError, match="number 3"):
        fuse(probabilities, warped[:2], image, Fusion())
    with pytest.raises(ConfigError, match="expected warped images"):
        fuse(probabilities, warped[:, :1], image, Fusion())
