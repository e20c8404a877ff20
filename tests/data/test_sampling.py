"""Patches: where they come from, that maps stay together, and that every batch can be made again."""

from __future__ import annotations

import threading
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch

from scarceseg.data import sampling as sampling_module
from scarceseg.data.augment import _near_identity, deform
from scarceseg.data.crop import crop_padded, padded_size
from scarceseg.data.sampling import PatchSampler, Source, made_ahead, numpys_blas, turn, workers_here


def source(name: str, size: tuple[int, int, int], seed: int, labelled: bool = True) -> Source:
    """The image holds each voxel's own index, so that a patch tells where it was cut; the label is made from it."""
    index = np.arange(np.prod(size), dtype=np.float32).reshape(size) + 1 + 1e6 * seed
    label = (index % 3).astype(np.uint8)
    return Source(
        name, np.stack([index, -index]), label if labelled else None, {"pseudo": (index % 5).astype(np.uint8)}
    )


def sampler(**changes: object) -> PatchSampler:
    settings: dict[str, object] = {
        "labelled": [source("a", (13, 11, 9), 0), source("b", (8, 15, 7), 1), source("c", (5, 9, 12), 2)],
        "unlabelled": [source(f"u{i}", (9 + i, 12, 10), 3 + i, labelled=False) for i in range(4)],
        "patch": (8, 8, 6),
        "batch_labelled": 2,
        "batch_unlabelled": 3,
        "seed": 7,
        "augment": "all",
    }
    return PatchSampler(**(settings | changes))  # type: ignore[arg-type]


def test_shapes_and_kinds() -> None:
    labelled, unlabelled = sampler().batch(0)
    assert labelled.image.shape == (2, 2, 8, 8, 6) and labelled.image.dtype == torch.float32
    assert labelled.label.shape == (2, 8, 8, 6) and labelled.label.dtype == torch.int64
    assert unlabelled is not None and unlabelled.image.shape == (3, 2, 8, 8, 6)
    assert not hasattr(unlabelled, "label")


def test_image_label_and_fields_stay_together() -> None:
    made = sampler()
    for t in range(12):
        labelled, unlabelled = made.batch(t)
        inside = labelled.image[:, 0] > 0  # padding is 0
        index = labelled.image[:, 0].double()
        assert torch.equal(labelled.label[inside], (index % 3).long()[inside])
        assert torch.equal(labelled.image[:, 1], -labelled.image[:, 0])
        assert unlabelled is not None
        pseudo, index = unlabelled.fields["pseudo"], unlabelled.image[:, 0].double()
        assert torch.equal(pseudo[index > 0].long(), (index % 5).long()[index > 0])


def test_any_iteration_can_be_made_again() -> None:
    streamed = list(sampler().batches(0, 9))
    for t in (8, 3, 0):
        again = sampler().batch(t)
        assert torch.equal(again[0].image, streamed[t][0].image)
        assert again[1] is not None and streamed[t][1] is not None
        assert torch.equal(again[1].image, streamed[t][1].image)  # type: ignore[union-attr]
    resumed = list(sampler().batches(5, 9))
    assert torch.equal(resumed[0][0].label, streamed[5][0].label)
    assert not torch.equal(sampler(seed=8).batch(0)[0].image, streamed[0][0].image)


def test_several_threads_make_the_same_batches_in_the_same_order() -> None:
    made = list(sampler(foreground=0.5).batches(0, 9, workers=4))
    for (labelled, unlabelled), t in zip(made, range(9), strict=True):
        again = sampler(foreground=0.5).batch(t)
        assert torch.equal(again[0].image, labelled.image) and torch.equal(again[0].label, labelled.label)
        assert again[1] is not None and unlabelled is not None and torch.equal(again[1].image, unlabelled.image)


def test_threads_work_at_the_same_time_and_not_far_ahead() -> None:
    together, begun = threading.Barrier(3), []

    def make(iteration: int) -> Any:
        begun.append(iteration)
        if iteration < 3:
            together.wait(10)  # breaks where one thread makes one after the other
        return iteration

    with closing(made_ahead(make, 0, 100, workers=3)) as stream:
        assert [next(stream), next(stream)] == [0, 1]
    assert max(begun) < 10


@pytest.mark.parametrize(
    ("gpu", "cores", "processes", "count"), [(0, 16, 1, 1), (1, 16, 1, 4), (1, 16, 8, 1), (1, 1, 1, 1)]
)
def test_one_thread_beside_a_training_on_the_processor(
    monkeypatch: pytest.MonkeyPatch, gpu: int, cores: int, processes: int, count: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpu))
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert workers_here() == count


def test_blas_has_one_thread_while_batches_are_made() -> None:
    blas = numpys_blas()
    if not blas.lib_controllers:
        pytest.skip("NumPy has no OpenBLAS here")

    def threads() -> set[int]:
        return {library["num_threads"] for library in blas.info()}

    with blas.limit(limits=2):
        stream = sampler().batches(0, 3)
        next(stream)
        assert threads() == {1}
        list(stream)
        assert threads() == {2}
        with closing(sampler().batches(0, 3)) as stream:
            next(stream)
        assert threads() == {2}


def test_every_case_is_visited_once_a_round() -> None:
    made = sampler(batch_unlabelled=2)
    for first in (0, 2, 4):
        names = [name for t in (first, first + 1) for name in made.batch(t)[1].case]  # type: ignore[union-attr]
        assert sorted(names) == ["u0", "u1", "u2", "u3"]


def test_crops_cover_the_volume_and_stay_inside() -> None:
    size, patch = (13, 12, 9), (8, 8, 6)
    made = sampler(labelled=[source("a", size, 0)], augment="none", batch_labelled=1)
    starts = set()
    for t in range(300):
        first = int(made.batch(t)[0].image[0, 0, 0, 0, 0]) - 1
        starts.add(np.unravel_index(first, size))
    for axis in range(3):
        assert {int(s[axis]) for s in starts} == set(range(size[axis] - patch[axis] + 1))


def test_foreground_share() -> None:
    label = np.zeros((20, 20, 20), np.uint8)
    label[2, 3, 4] = 1
    only = Source("a", np.zeros((1, 20, 20, 20), np.float32), label)
    hits = {
        share: sum(
            int(sampler(labelled=[only], foreground=share, batch_labelled=1).batch(t)[0].label.sum()) for t in range(60)
        )
        for share in (0.0, 1.0)
    }
    assert hits[1.0] == 60
    assert hits[0.0] < 40


def test_foreground_patches_show_small_classes_as_often_as_large_ones() -> None:
    label = np.zeros((40, 20, 20), np.uint8)
    label[20:] = 1
    label[2, 3, 4] = 3
    label[0, 0] = 255
    image = np.zeros((1, *label.shape), np.float32)
    made = sampler(labelled=[Source("a", image, label)], foreground=1.0, batch_labelled=1, augment="none")
    shown = [made.batch(t)[0].label for t in range(80)]
    small = sum(bool((x == 3).any()) for x in shown)
    assert 25 < small < 55 and all(bool(((x == 1) | (x == 3)).any()) for x in shown)


def test_deformations_are_drawn_in_mm() -> None:
    spacing = np.diag([0.7, 0.8, 5.0])
    for seed in range(3):
        alike = _near_identity(np.random.default_rng(seed), 1.0, (2.0, 2.0, 2.0))
        voxels = _near_identity(np.random.default_rng(seed), 1.0, np.diag(spacing))
        np.testing.assert_allclose(spacing @ voxels @ np.linalg.inv(spacing), alike, atol=1e-12)
    place = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in (60, 60, 40)), indexing="ij")
    maps = {"image": np.zeros((1, 60, 60, 40), np.float32), "z": place[2]}
    tilts = {}
    for mm in ((1.0, 1.0, 1.0), (1.0, 1.0, 4.0)):
        moved = deform(maps, (14, 14, 12), (32, 32, 16), np.random.default_rng(1), spacing_mm=mm)["z"]
        tilts[mm] = np.polyfit(np.arange(32), moved[:, :, 8].mean(1), 1)[0]
    assert abs(tilts[1.0, 1.0, 4.0]) < 0.6 * abs(tilts[1.0, 1.0, 1.0])


def test_the_sampler_deforms_in_the_spacing_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(*_: object, spacing_mm: object) -> dict[str, np.ndarray]:
        seen.append(spacing_mm)
        return {"image": np.zeros((1, 8, 8, 6))}

    monkeypatch.setattr(sampling_module, "deform", spy)
    sampler(spacing_mm=(0.7, 0.7, 5.0), augment="deform").unlabelled(0)
    assert set(seen) == {(0.7, 0.7, 5.0)}


@pytest.mark.parametrize("patch", [(8, 8, 6), (8, 6, 6)])
def test_turns_keep_the_patch_shape(patch: tuple[int, int, int]) -> None:
    made = sampler(patch=patch)
    assert all(tuple(made.batch(t)[0].image.shape[2:]) == patch for t in range(20))


def test_turn_is_in_the_slice_plane_and_flips_one_axis() -> None:
    x = np.arange(24).reshape(2, 3, 4)
    assert turn(x, 1, None).shape == (3, 2, 4)
    assert np.array_equal(turn(x, 0, 0), x[::-1])
    assert np.array_equal(turn(x, 0, 1), x[:, ::-1])
    assert np.array_equal(turn(turn(x, 1, None), 3, None), x)


def test_padding_is_centred_and_crop_is_a_view() -> None:
    x = np.ones((2, 3, 4, 5))
    padded = crop_padded(x, (0, 0, 0), (6, 4, 8), (6, 4, 8))
    assert padded.shape == (2, 6, 4, 8) == (2, *padded_size(x.shape[1:], (6, 2, 8)))
    assert np.array_equal(padded[:, 1:4, :, 1:6], x)
    assert padded.sum() == x.sum()
    assert crop_padded(x, (1, 0, 1), (2, 4, 3), (2, 3, 3)).base is x


def test_a_block_is_that_of_the_padded_volume() -> None:
    draw = np.random.default_rng(0)
    for _ in range(300):
        sides, patch = draw.integers(1, 9, 3), draw.integers(1, 12, 3)
        x = draw.random((2, *sides))
        missing = np.maximum(patch - sides, 0)
        whole = np.pad(x, [(0, 0), *((m // 2, m - m // 2) for m in missing)])
        assert whole.shape[1:] == padded_size(sides, patch)
        start = [int(draw.integers(0, side)) for side in whole.shape[1:]]
        size = [int(draw.integers(1, side - first + 1)) for first, side in zip(start, whole.shape[1:], strict=True)]
        box = tuple(slice(first, first + length) for first, length in zip(start, size, strict=True))
        assert np.array_equal(crop_padded(x, start, size, patch), whole[(slice(None), *box)])


def test_a_deformed_patch_of_a_small_volume_is_that_of_the_padded_one() -> None:
    small, patch = source("a", (6, 20, 5), 0), (12, 12, 12)
    assert small.label is not None
    maps = {"image": small.image, "label": small.label}
    padded = {key: crop_padded(value, (0, 0, 0), (12, 20, 12), patch) for key, value in maps.items()}
    for seed in range(4):
        one, other = (deform(m, (0, 5, 0), patch, np.random.default_rng(seed)) for m in (maps, padded))
        assert all(np.array_equal(one[key], other[key]) for key in maps)


@pytest.mark.parametrize("patch", [(6, 6, 4), (6, 4, 4)])
def test_orientations_that_are_drawn(patch: tuple[int, int, int]) -> None:
    """ "reflections", the published way, never shows a patch as it lies; "all" shows every orientation alike."""
    seen: dict[str, set[tuple[int, ...]]] = {}
    for augment in ("all", "reflections", "none"):
        index = np.arange(np.prod(patch), dtype=np.float32).reshape(patch)
        only = Source("a", index[None], np.zeros(patch, np.uint8))
        made = sampler(labelled=[only], patch=patch, augment=augment, batch_labelled=4)
        corners = {
            (int(image[0, 0, 0, 0]), int(image[0, -1, 0, 0])) for t in range(30) for image in made.batch(t)[0].image
        }
        seen[augment] = corners
    turns = 4 if patch[0] == patch[1] else 2
    as_it_lies = {(0, int((patch[0] - 1) * patch[1] * patch[2]))}
    assert len(seen["all"]) == 2 * turns and len(seen["reflections"]) == turns
    assert seen["none"] == as_it_lies
    assert as_it_lies <= seen["all"] and not as_it_lies & seen["reflections"]
    assert seen["reflections"] < seen["all"]


def test_a_deformed_patch_of_no_strength_is_the_crop() -> None:
    size, patch, start = (13, 12, 9), (8, 7, 6), (3, 2, 1)
    volume = source("a", size, 0)
    assert volume.label is not None and volume.fields is not None
    maps = {"image": volume.image, "label": volume.label, "soft": np.stack([volume.label, volume.label + 1])}
    moved = deform(maps, start, patch, np.random.default_rng(0), 0.0)
    for key, value in maps.items():
        assert moved[key].dtype == value.dtype
        np.testing.assert_allclose(moved[key], crop_padded(value, start, patch, patch), rtol=1e-5)


def test_a_deformed_patch_stays_in_its_place_and_its_maps_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scarceseg.data.augment.contrast", lambda image, draw: image)
    size, patch, start = (40, 36, 30), (20, 18, 12), (12, 10, 9)
    x, y, z = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in size), indexing="ij")
    ball = 9 - np.sqrt((x - 21) ** 2 + (y - 19) ** 2 + (z - 15) ** 2)
    maps = {"image": np.stack([ball, x, y, z]).astype(np.float32), "label": (ball > 0).astype(np.uint8)}
    own = crop_padded(maps["image"], start, patch, patch)
    distances, changed = [], 0
    for seed in range(8):
        moved = deform(maps, start, patch, np.random.default_rng(seed))
        sure = np.abs(moved["image"][0]) > 1
        assert ((moved["image"][0] > 0) == (moved["label"] > 0))[sure].all()
        shift = np.linalg.norm(moved["image"][1:] - own[1:], axis=0)
        distances.append(float(shift.mean()))
        changed += int((moved["label"] != crop_padded(maps["label"], start, patch, patch)).sum())
    assert changed > 100
    assert 0.5 < np.mean(distances) < 4.0  # voxels


def test_a_deformed_patch_sees_what_lies_around_it() -> None:
    """No border appears at the edge of a patch that lies inside its volume."""
    size, patch, start = (40, 40, 40), (16, 16, 16), (12, 12, 12)
    x = np.broadcast_to(np.arange(40, dtype=np.float32)[:, None, None], size)
    for seed in range(6):
        moved = deform({"image": x[None].copy(), "x": x}, start, patch, np.random.default_rng(seed))["x"]
        assert (np.diff(moved, axis=0).mean(axis=(1, 2)) > 0.3).all()


def test_deformed_batches_can_be_made_again_and_differ_in_contrast() -> None:
    made = sampler(augment="deform")
    first, again = made.batch(4), sampler(augment="deform").batch(4)
    assert torch.equal(first[0].image, again[0].image) and torch.equal(first[0].label, again[0].label)
    assert first[1] is not None and again[1] is not None
    assert torch.equal(first[1].fields["pseudo"], again[1].fields["pseudo"])
    assert first[1].fields["pseudo"].dtype == torch.uint8
    assert not torch.equal(first[0].image, made.batch(5)[0].image)
