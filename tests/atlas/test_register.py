"""One pair: known deformations are undone, whatever the grids; nothing fails on hopeless images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.spatial.transform import Rotation

from scarceseg.atlas.affine import scaled
from scarceseg.atlas.register import Registration, align, register, working_spacing
from scarceseg.atlas.warp import copy_label, warp_image, warp_label
from scarceseg.errors import ConfigError, DataError
from scarceseg.types import Geometry
from tests.atlas.bodies import FEET_FIRST, bend, body, body_points, dice, grid, world_of

TURN = Rotation.from_euler("xyz", [9, -7, 11], degrees=True).as_matrix() * 1.12
SHIFT = (3.0, -4.0, 2.0)
OBLIQUE = tuple(
    (Rotation.from_euler("xyz", [6, -9, 12], degrees=True).as_matrix() @ np.diag([-1, -1, 1])).ravel().tolist()
)
GRIDS = {
    "same": grid(origin=(40.0, -310.0, 1000.0)),
    "anisotropic": grid((34, 29, 17), (2.0, 2.1, 3.3), (-80.0, 12.0, 900.0)),
    "turned": grid((27, 33, 31), (2.0, 2.0, 1.9), (5.0, 600.0, -70.0), FEET_FIRST),
    "oblique": grid((35, 31, 25), (1.9, 2.0, 2.2), (500.0, 0.0, 33.0), OBLIQUE),
}


def carried(fixed: Geometry, moving: Geometry, how: Registration, **deformation: Any) -> list[float]:
    """Dice of both organs when the undeformed body on `moving` is brought onto the deformed one on `fixed`."""
    image, reference = body(fixed, seed=1, **deformation)
    atlas, label = body(moving, seed=2)
    probability = warp_label(label, moving, register(image, fixed, atlas, moving, how), fixed, 3)
    np.testing.assert_allclose(probability.sum(0), 1, atol=1e-5)
    assert probability.dtype == np.float32
    assert probability.min() >= 0
    return [dice(probability.argmax(0), reference, value) for value in (1, 2)]


@pytest.mark.parametrize("moving", GRIDS.values(), ids=list(GRIDS))
def test_an_affine_deformation_is_undone_on_any_grid(moving: Geometry) -> None:
    fixed = grid((33, 31, 28), (2.0, 1.9, 2.1), (-200.0, 90.0, 10.0))
    before = carried(fixed, moving, Registration(stage="copy"), matrix=TURN, shift=SHIFT)
    after = carried(fixed, moving, Registration(stage="affine"), matrix=TURN, shift=SHIFT)
    assert max(before) < 0.75
    assert min(after) > 0.88


def test_the_affine_transform_takes_world_points_to_world_points() -> None:
    fixed, moving = GRIDS["anisotropic"], GRIDS["turned"]
    image, _ = body(fixed, matrix=TURN, shift=SHIFT, seed=1)
    transform = register(image, fixed, body(moving, seed=2)[0], moving, Registration(stage="affine"))
    for point in ([0, 0, 0], [10, -6, 4], [-9, 8, -7]):
        found = transform.TransformPoint(world_of(fixed, np.array(point)))
        expected = world_of(moving, TURN @ point + SHIFT)
        assert np.linalg.norm(np.subtract(found, expected)) < 1.5  # mm, of voxels of 2 mm


@pytest.mark.parametrize("moving", [GRIDS["same"], GRIDS["turned"]], ids=["same", "turned"])
@pytest.mark.parametrize("contrast", [1.0, -1.4])
def test_a_bend_is_undone_whatever_the_contrast(moving: Geometry, contrast: float) -> None:
    fixed = grid()
    affine = carried(fixed, moving, Registration(stage="affine"), bent=5.0, contrast=contrast)
    after = carried(fixed, moving, Registration(), bent=5.0, contrast=contrast)
    assert np.mean(after) > np.mean(affine) + 0.05
    assert min(after) > 0.8


def test_the_displacement_is_the_bend_itself() -> None:
    fixed, moving = grid(), GRIDS["turned"]
    image, reference = body(fixed, bent=4.0, seed=1)
    transform = register(image, fixed, body(moving, seed=2)[0], moving, Registration())
    points = body_points(fixed)
    errors = []
    for index in np.argwhere(reference > 0)[::40]:
        point = points[:, index[0], index[1], index[2]]
        found = transform.TransformPoint(world_of(fixed, point))
        errors.append(np.linalg.norm(np.subtract(found, world_of(moving, bend(point, 4.0)))))
    assert np.median(errors) < 1.6  # mm, of voxels of 2 mm and displacements of 4


def test_a_coarser_registration_still_labels_the_full_grid() -> None:
    fixed = grid((45, 41, 37), (1.4, 1.5, 1.5))
    assert min(carried(fixed, GRIDS["same"], Registration(spacing_mm=2.0), bent=4.0)) > 0.85
    image, _ = body(fixed)
    found = align(image, fixed, image, fixed, Registration(spacing_mm=2.0, control=2))
    assert found.grid is not None
    assert found.grid.spacing_mm == (4.0, 4.0, 4.0)


def test_working_resolution() -> None:
    fine, thick = grid((100, 100, 50), (0.5, 0.5, 1.0)), grid((100, 100, 8), (1.0, 1.0, 5.0))
    assert working_spacing(fine, fine, Registration(spacing_mm=3.0)) == 3.0
    assert working_spacing(thick, thick, Registration()) == 1.0  # not finer than the finest axis
    assert working_spacing(thick, thick, Registration(voxels=400_000 // 64)) == pytest.approx(4.0)


def test_only_the_chosen_channel_is_looked_at() -> None:
    fixed, moving = grid(), GRIDS["same"]
    image, _ = body(fixed, bent=4.0, seed=1)
    atlas, _ = body(moving, seed=2)
    junk = np.random.default_rng(0).normal(size=(2, *fixed.size)).astype(np.float32)
    how = Registration(channel=1)
    alone = align(image, fixed, atlas, moving, Registration())
    beside = align(np.stack([junk[0], image[0]]), fixed, np.stack([junk[1], atlas[0]]), moving, how)
    np.testing.assert_array_equal(alone.affine, beside.affine)
    np.testing.assert_array_equal(alone.field, beside.field)


@pytest.mark.parametrize("how", [Registration(), Registration(affine_sampling=0.3, seed=3)], ids=["all", "sampled"])
def test_the_same_twice_and_no_threads_left_behind(how: Registration) -> None:
    fixed, moving = grid(), GRIDS["anisotropic"]
    image, atlas = body(fixed, matrix=TURN, bent=3.0, seed=1)[0], body(moving, seed=2)[0]
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads(), torch.get_num_threads()
    copies = image.copy(), atlas.copy()
    first = align(image, fixed, atlas, moving, how)
    second = align(image, fixed, atlas, moving, how)
    np.testing.assert_array_equal(first.affine, second.affine)
    np.testing.assert_array_equal(first.field, second.field)
    assert first.similarity == second.similarity
    assert threads == (sitk.ProcessObject.GetGlobalDefaultNumberOfThreads(), torch.get_num_threads())
    np.testing.assert_array_equal(image, copies[0])
    np.testing.assert_array_equal(atlas, copies[1])


def test_similarity_tells_a_good_atlas_from_a_bad_one() -> None:
    fixed = grid()
    image, _ = body(fixed, shift=SHIFT, seed=1)
    good, _ = body(fixed, seed=2)
    how = Registration(stage="affine")
    unlike = good[:, ::-1, :, ::-1].copy()
    values = [align(image, fixed, atlas, fixed, how).similarity for atlas in (good, unlike)]
    assert 1 >= values[0] > values[1] + 0.1 >= 0.1


def test_an_image_of_ones_falls_back_to_the_copy() -> None:
    fixed, moving = grid(), GRIDS["turned"]
    image, _ = body(fixed)
    flat = np.ones((1, *moving.size), dtype=np.float32)
    found = align(image, fixed, flat, moving, Registration())
    assert (found.stage, found.field) == ("copy", None)
    assert "atlas's image is constant" in found.note
    copied = align(image, fixed, flat, moving, Registration(stage="copy"))
    np.testing.assert_array_equal(found.affine, copied.affine)
    assert copied.note == ""


def test_a_failing_affine_step_falls_back_to_the_copy() -> None:
    thin = grid((2, 2, 2))
    image = np.arange(8, dtype=np.float32).reshape(1, 2, 2, 2)
    found = align(image, thin, image[:, ::-1].copy(), thin, Registration())
    assert found.stage == "copy"
    assert "affine registration failed" in found.note
    assert "\n" not in found.note


def test_an_affine_step_gone_astray_falls_back_to_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scarceseg.atlas.register.affine_register", lambda *_: scaled(np.array([2.0, 2.0, 2.0])))
    image, _ = body(grid())
    found = align(image, grid(), image, grid(), Registration())
    assert found.stage == "copy"
    assert "a factor of 8" in found.note
    np.testing.assert_array_equal(found.affine, np.eye(3, 4))


def test_a_deformation_that_is_not_finite_falls_back_to_the_affine_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scarceseg.atlas.register.deformable", lambda *_: torch.full((3, 4, 4, 4), torch.nan))
    image, _ = body(grid())
    found = align(image, grid(), image, grid(), Registration())
    assert (found.stage, found.field) == ("affine", None)
    assert "finite" in found.note


def test_what_is_not_a_volume_on_its_grid_is_refused() -> None:
    image, label = body(grid())
    with pytest.raises(DataError, match="fixed volume"):
        align(image[:, 1:], grid(), image, grid(), Registration())
    with pytest.raises(DataError, match="same channels"):
        align(image, grid(), np.concatenate([image, image]), grid(), Registration())
    with pytest.raises(ConfigError, match="channel"):
        align(image, grid(), image, grid(), Registration(channel=1))
    with pytest.raises(DataError, match="0 to 1"):
        copy_label(label, grid(), grid(), 2)


@pytest.mark.parametrize("source", GRIDS.values(), ids=list(GRIDS))
def test_copy_onto_its_own_grid_changes_nothing(source: Geometry) -> None:
    _, label = body(source)
    copied = copy_label(label, source, source, 4)
    assert copied.shape == (4, *source.size)
    np.testing.assert_array_equal(copied.argmax(0), label)
    assert not copied[3].any()


def test_copy_stretches_box_onto_box_in_anatomical_order() -> None:
    source = grid((12, 9, 6), (1.0, 2.0, 3.0), (7.0, 8.0, 9.0))
    label = np.zeros(source.size, dtype=np.uint8)
    label[3:6, 6:9, 0:2] = 1
    coarse = replace(source, size=(4, 3, 3), spacing_mm=(10.0, 0.5, 4.0), origin=(-99.0, 0.0, 1.0))
    expected = np.zeros(coarse.size)
    expected[1, 2, 0] = 1
    np.testing.assert_allclose(copy_label(label, source, coarse, 2)[1], expected, atol=1e-5)
    # The same target box; its index axes are now the canonical y reversed, z, and x reversed.
    turned = replace(coarse, size=(3, 3, 4), spacing_mm=(0.5, 4.0, 10.0), direction=FEET_FIRST)
    straight = expected.transpose(1, 2, 0)[::-1, :, ::-1]
    np.testing.assert_allclose(copy_label(label, source, turned, 2)[1], straight, atol=1e-5)


def test_warped_image_goes_with_the_label() -> None:
    fixed, moving = grid(), GRIDS["turned"]
    image, _ = body(fixed, shift=SHIFT, seed=1)
    atlas, label = body(moving, seed=2)
    transform = register(image, fixed, atlas, moving, Registration(stage="affine"))
    marked = np.stack([atlas[0], label == 1]).astype(np.float32)
    warped = warp_image(marked, moving, transform, fixed)
    assert warped.shape == (2, *fixed.size)
    np.testing.assert_allclose(warped[1], warp_label(label, moving, transform, fixed, 3)[1], atol=1e-5)
    inside = (slice(4, -4),) * 3
    assert np.corrcoef(warped[0][inside].ravel(), image[0][inside].ravel())[0, 1] > 0.9
