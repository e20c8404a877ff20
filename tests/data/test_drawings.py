"""Labelled patches with a drawing: of one class each, blind to nothing but what has no label, and the same every time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scarceseg.data.drawings import Drawings
from scarceseg.data.sampling import PatchSampler, Source

SIZE = (20, 18, 16)


def source(name: str, classes: int = 2, ignored: bool = False) -> Source:
    label = np.zeros(SIZE, np.uint8)
    for value in range(1, classes + 1):
        label[4 * value - 2 : 4 * value + 2, 4:14, 4:12] = value
    if ignored:
        label[:, :, 12:] = 255
    image = np.random.default_rng(0).normal(size=(1, *SIZE)).astype(np.float32)
    return Source(name, image, label)


def drawings(*sources: Source, seed: int = 0) -> Drawings:
    return Drawings(PatchSampler(list(sources), [], SIZE, 4, 0, 0, augment="none"), seed)


def test_a_row_is_about_one_of_its_classes() -> None:
    case = source("a")
    seen = set()
    for iteration in range(4):
        labelled, unlabelled = drawings(case).batch(iteration)
        assert unlabelled is None and labelled.image.shape == (4, 2, *SIZE)
        assert torch.equal(labelled.image[:, :1], torch.from_numpy(case.image)[None].expand(4, -1, -1, -1, -1))
        for row in range(4):
            (value,) = (v for v in (1, 2) if np.array_equal(labelled.label[row].numpy() == 1, case.label == v))
            assert set(labelled.label[row].unique().tolist()) == {0, 1}
            seen.add(value)
            drawn, wanted = labelled.image[row, 1] > 0.5, labelled.label[row] == 1
            assert (drawn & wanted).any() and not torch.equal(drawn, wanted)
    assert seen == {1, 2}


def test_voxels_without_a_label_stay_so_and_rows_without_foreground_say_nothing() -> None:
    labelled, _ = drawings(source("a", ignored=True)).batch(0)
    assert (labelled.label[..., 12:] == 255).all() and (labelled.label[..., :12] != 255).all()
    labelled, _ = drawings(source("empty", classes=0)).batch(0)
    assert (labelled.label == 255).all() and not labelled.image[:, 1].any()


def test_there_is_always_something_to_ask_about() -> None:
    """Small structures vanish when they are spoilt; then the reference itself is shown."""
    case = source("a", classes=0)
    assert case.label is not None
    case.label[9, 9, 9] = 1
    labelled, _ = drawings(case).batch(0)
    assert (labelled.image[:, 1] > 0.5).flatten(1).any(1).all()


def test_batches_are_functions_of_seed_and_iteration() -> None:
    one = drawings(source("a"))
    ahead = [batch.image for batch, _ in one.batches(0, 3)]
    assert torch.equal(ahead[2], drawings(source("a")).batch(2)[0].image)
    assert not torch.equal(ahead[2], drawings(source("a"), seed=1).batch(2)[0].image)
    assert not torch.equal(ahead[1], ahead[2])


@pytest.mark.parametrize("channels", [1, 3])
def test_the_drawing_is_the_last_channel(channels: int) -> None:
    case = source("a")
    several = Source("a", np.repeat(case.image, channels, axis=0), case.label)
    labelled, _ = drawings(several).batch(0)
    assert labelled.image.shape[1] == channels + 1
    assert ((labelled.image[:, -1] >= 0) & (labelled.image[:, -1] <= 1)).all()
