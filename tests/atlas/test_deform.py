"""The parts of the deformable step against slow, obvious versions, and what they find."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import ndimage

from scarceseg.atlas import deform

SIZE = (9, 8, 7)


def noise(*size: int, seed: int = 0, sigma: float = 0.0) -> torch.Tensor:
    values = np.random.default_rng(seed).normal(size=size)
    if sigma:
        values = ndimage.gaussian_filter(values, [0] * (len(size) - 3) + [sigma] * 3, mode="nearest")
        values /= values.std()
    return torch.from_numpy(values.astype(np.float32))


@pytest.mark.parametrize("dilation", [1, 2])
def test_self_similarity(dilation: int) -> None:
    volume = noise(*SIZE, sigma=1)
    padded = np.pad(volume.numpy().astype(float), dilation, mode="edge")

    def at(offset: tuple[int, ...]) -> np.ndarray:
        return padded[
            tuple(slice(dilation * (1 + o), dilation * (1 + o) + n) for o, n in zip(offset, SIZE, strict=True))
        ]

    faces = [tuple(sign * (axis == k) for k in range(3)) for axis in range(3) for sign in (-1, 1)]
    distances = [
        ndimage.uniform_filter((at(a) - at(b)) ** 2, 3, mode="nearest")
        for a, b in itertools.combinations(faces, 2)
        if np.dot(a, b) == 0
    ]
    assert len(distances) == 12
    distance = np.array(distances) - np.min(distances, axis=0)
    expected = np.exp(-distance / distance.mean(0))
    found = deform.self_similarity(volume, dilation)[0].numpy()
    assert sorted(map(str, found.sum((1, 2, 3)).round(2))) == sorted(map(str, expected.sum((1, 2, 3)).round(2)))
    np.testing.assert_allclose(np.sort(found, axis=0), np.sort(expected, axis=0), atol=1e-4)


def test_self_similarity_ignores_gain_and_offset_and_survives_a_flat_volume() -> None:
    volume = noise(*SIZE, sigma=1)
    np.testing.assert_allclose(deform.self_similarity(volume), deform.self_similarity(-3 * volume + 5), atol=1e-3)
    assert torch.isfinite(deform.self_similarity(torch.zeros(SIZE))).all()


def test_smoothing_along_the_axes_is_smoothing_three_times() -> None:
    values = noise(1, 3, *SIZE)
    slow = values.numpy()
    for _ in range(3):
        slow = ndimage.uniform_filter(slow, (1, 1, 3, 3, 3), mode="nearest")
    fast = values
    for _ in range(3):
        fast = deform.smooth(fast)
    np.testing.assert_allclose(fast, slow, atol=1e-5)
    matrices = [deform.smoothing(n) for n in SIZE]
    np.testing.assert_allclose(torch.einsum("bcxyz,ix,jy,kz->bcijk", values, *matrices), slow, atol=1e-5)


def test_warp_reads_at_displaced_places() -> None:
    values, displacement = noise(1, 2, *SIZE), 1.5 * noise(1, 3, *SIZE, seed=1)
    place = np.indices(SIZE) + displacement[0].numpy()
    expected = [ndimage.map_coordinates(channel, place, order=1, mode="nearest") for channel in values[0].numpy()]
    np.testing.assert_allclose(deform.warp(values, displacement)[0], expected, atol=1e-4)


def test_cost_table() -> None:
    fixed, moving = noise(1, 4, 5, 4, 3), noise(1, 4, 5, 4, 3, seed=1)
    table, steps = deform.cost_table(fixed, moving, 2)
    assert table.shape == (5, 4, 3, 125)
    for place in itertools.product(range(5), range(4), range(3)):
        for number in range(0, 125, 7):
            there = [min(max(p + int(s), 0), n - 1) for p, s, n in zip(place, steps[number], (5, 4, 3), strict=True)]
            here = fixed[0, :, place[0], place[1], place[2]] - moving[0, :, there[0], there[1], there[2]]
            assert float(table[place[0], place[1], place[2], number]) == pytest.approx(
                float(here.square().sum()), rel=1e-4
            )


def test_convex_search_finds_a_shift() -> None:
    fixed = noise(1, 6, 10, 10, 10)
    moving = torch.roll(fixed, (2, -1, 1), (2, 3, 4))
    found = deform.convex_search(*deform.cost_table(fixed, moving, 3))
    inside = found[0, :, 4:6, 4:6, 4:6].flatten(1)
    np.testing.assert_allclose(inside, torch.tensor([[2.0], [-1.0], [1.0]]).expand_as(inside), atol=0.1)


def test_convex_search_stays_where_nothing_tells() -> None:
    flat = torch.zeros(1, 6, 8, 8, 8)
    np.testing.assert_array_equal(deform.convex_search(*deform.cost_table(flat, flat, 3)), np.zeros((1, 3, 8, 8, 8)))
    # Around a shifted body, empty space neither moves further than the body nor the other way.
    body = noise(1, 6, 4, 4, 4)
    fixed, moving = torch.zeros(1, 6, 14, 14, 14), torch.zeros(1, 6, 14, 14, 14)
    fixed[:, :, 5:9, 5:9, 5:9] = moving[:, :, 7:11, 5:9, 5:9] = body
    found = deform.convex_search(*deform.cost_table(fixed, moving, 3))[0]
    np.testing.assert_allclose(found[:, 6:8, 6:8, 6:8].mean((1, 2, 3)), [2, 0, 0], atol=0.3)
    assert found[:, :2].abs().max() < 2


def test_consistent_fields_are_each_others_inverse() -> None:
    forward, backward = noise(1, 3, 12, 12, 12, sigma=3), noise(1, 3, 12, 12, 12, seed=1, sigma=3)
    found = deform.consistent(forward, backward)
    other = deform.consistent(backward, forward)
    loop = (found + deform.warp(other, found))[..., 3:-3, 3:-3, 3:-3]
    before = (forward + deform.warp(backward, forward))[..., 3:-3, 3:-3, 3:-3]
    assert loop.abs().mean() < 0.1 * before.abs().mean()


@pytest.mark.parametrize("levels", [(), ((3, 2),), ((4, 2), (3, 2))])
def test_levels_and_descent_find_a_shift_in_voxels(levels: tuple[tuple[int, int], ...]) -> None:
    whole = noise(44, 44, 44, seed=2, sigma=1.5)
    shift = (4, -3, 2) if levels else (1, -1, 1)
    x, y, z = (slice(4 - s, 40 - s) for s in shift)
    fixed, moving = whole[4:40, 4:40, 4:40].contiguous(), whole[x, y, z].contiguous()
    field = deform.deformable(fixed, moving, levels=levels, control=3, iterations=40, smoothness=0.5)
    assert field.shape == (3, 12, 12, 12)
    np.testing.assert_allclose(field[:, 4:8, 4:8, 4:8].mean((1, 2, 3)), shift, atol=0.6)


def test_a_smoother_field_when_asked_for() -> None:
    fixed, moving = noise(24, 24, 24, sigma=1.5), noise(24, 24, 24, seed=1, sigma=1.5)
    rough, smooth = (
        deform.deformable(fixed, moving, smoothness=weight).diff(dim=1).square().mean() for weight in (0.1, 5)
    )
    assert smooth < 0.5 * rough
