"""Batches of whole volumes and their augmentations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scarceseg.data.augment import bend, contrast, curve_slices, intensity_curve
from scarceseg.data.sampling import PatchSampler, Source
from scarceseg.data.whole import CurvedSlices, SideBySide, WholeVolumes


def source(name: str, size: tuple[int, int, int], seed: int = 0, channels: int = 1) -> Source:
    """A volume whose label is where channel 0 is above zero, smooth enough to be moved."""
    draw = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in size), indexing="ij")
    ball = 0.6 - np.sqrt(sum((a - draw.uniform(-0.2, 0.2)) ** 2 for a in axes))
    image = np.stack([ball * (c + 1) for c in range(channels)]).astype(np.float32)
    return Source(name, image, (ball > 0).astype(np.uint8))


def test_intensity_curves_rise_and_keep_the_range() -> None:
    image = np.sort(np.random.default_rng(0).normal(size=500)).astype(np.float32)
    for seed in range(20):
        bent = intensity_curve(image, np.random.default_rng(seed))
        assert (np.diff(bent) >= 0).all()
        np.testing.assert_allclose([bent[0], bent[-1]], [image[0], image[-1]], rtol=1e-5)
    assert np.abs(bent - image).max() > 0.05
    flat = np.full((3, 3), 7, np.float32)
    np.testing.assert_array_equal(intensity_curve(flat, np.random.default_rng(0)), flat)


def test_every_slice_gets_a_curve_of_its_own() -> None:
    plane = np.random.default_rng(0).normal(size=(1, 6, 5, 1)).astype(np.float32)
    bent = curve_slices(np.repeat(plane, 4, axis=-1), np.random.default_rng(1))
    assert len({bent[..., z].tobytes() for z in range(4)}) == 4


def test_a_bend_of_no_strength_only_resamples() -> None:
    volume = source("a", (12, 11, 9))
    assert volume.label is not None
    image, label = bend(volume.image, volume.label, (12, 11, 9), np.random.default_rng(0), 0.0)
    np.testing.assert_allclose(image, volume.image, atol=1e-5)
    np.testing.assert_array_equal(label, volume.label)
    image, label = bend(volume.image, volume.label, (6, 22, 18), np.random.default_rng(0), 0.0)
    assert image.shape == (1, 6, 22, 18)
    step = np.divide(volume.label.shape, label.shape)
    nearest = np.ix_(
        *(
            np.minimum(np.floor((np.arange(n) + 0.5) * s), m - 1).astype(int)
            for n, s, m in zip(label.shape, step, volume.label.shape, strict=True)
        )
    )
    assert (label == volume.label[nearest])[:, :, [0, -1]].mean() > 0.9  # the outermost planes too
    assert bend(volume.image, np.ones_like(volume.label), (12, 22, 18), np.random.default_rng(0), 0.0)[1].all()


def test_image_and_label_are_bent_alike() -> None:
    volume = source("a", (24, 22, 20), channels=2)
    assert volume.label is not None
    moved = 0
    for seed in range(5):
        image, label = bend(volume.image, volume.label, (24, 22, 20), np.random.default_rng(seed))
        sure = np.abs(image[0]) > 0.1
        assert ((image[0] > 0) == (label > 0))[sure].mean() > 0.99
        moved += int((label != volume.label).sum())
    assert moved > 500


def test_contrast_changes_every_channel_by_itself() -> None:
    image = np.repeat(np.random.default_rng(0).normal(size=(1, 8, 8, 8)), 2, axis=0).astype(np.float32)
    changed = contrast(image, np.random.default_rng(1))
    assert changed.dtype == np.float32 and np.abs(changed[0] - changed[1]).max() > 0.05


def test_whole_volumes_are_a_function_of_seed_and_iteration() -> None:
    volumes = [source("a", (12, 11, 9)), source("b", (10, 13, 8), 1)]
    first, again = (WholeVolumes(volumes, (8, 8, 8), 2, seed=3) for _ in range(2))
    for (one, _), (two, _) in zip(first.batches(0, 4), [again.batch(i) for i in range(4)], strict=True):
        assert torch.equal(one.image, two.image) and torch.equal(one.label, two.label)
        assert one.image.shape == (2, 1, 8, 8, 8) and one.label.dtype == torch.int64
        assert sorted(one.case) == ["a", "b"]  # every case once a round
    assert not torch.equal(first.batch(0)[0].image, WholeVolumes(volumes, (8, 8, 8), 2, seed=4).batch(0)[0].image)


def test_side_by_side_gives_rows_of_each_source() -> None:
    few = WholeVolumes([source("a", (8, 8, 8))], (8, 8, 8), 1, seed=0)
    many = WholeVolumes([source(f"m{i}", (8, 8, 8), i) for i in range(5)], (8, 8, 8), 1, seed=1)
    for labelled, unlabelled in SideBySide([few, many]).batches(0, 5):
        assert labelled.case[0] == "a" and labelled.case[1].startswith("m") and unlabelled is None


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_curves_belong_to_slices_along_the_axis(axis: int) -> None:
    """A slice of one grey value has no range to bend; along another axis the same volume changes."""
    grey = np.arange(8, dtype=np.float32).reshape([-1 if other == axis else 1 for other in range(3)])
    volume = np.ascontiguousarray(np.broadcast_to(grey, (1, 8, 8, 8)))
    plain = PatchSampler(
        [Source("a", volume, np.zeros((8, 8, 8), np.uint8))], [], (8, 8, 8), 1, 0, seed=0, augment="none"
    )
    image = plain.batch(0)[0].image
    for other in range(3):
        assert torch.equal(CurvedSlices(plain, seed=0, axis=other).batch(0)[0].image, image) == (other == axis)


def test_curved_slices_leave_the_labels_alone() -> None:
    plain = PatchSampler([source("a", (16, 16, 16))], [], (8, 8, 8), 2, 0, seed=0)
    curved = CurvedSlices(plain, seed=0)
    one, two = plain.batch(3)[0], curved.batch(3)[0]
    assert torch.equal(one.label, two.label) and not torch.equal(one.image, two.image)
    assert torch.equal(two.image, curved.batch(3)[0].image)
