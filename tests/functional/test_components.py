"""Largest component."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from scarceseg.functional.components import largest_component


def scene() -> np.ndarray:
    label = np.zeros((12, 11, 9), np.uint8)
    label[1:4, 1:4, 1:4] = 1
    label[8:10, 8:10, 5:7] = 1
    label[1:3, 7:9, 1:3] = 2
    label[6:11, 1:5, 2:6] = 2
    return label


def test_each_class_keeps_its_largest_piece() -> None:
    cleaned = largest_component(scene())
    expected = np.zeros_like(cleaned)
    expected[1:4, 1:4, 1:4] = 1
    expected[6:11, 1:5, 2:6] = 2
    np.testing.assert_array_equal(cleaned, expected)


def test_only_the_classes_asked_for_and_not_in_place() -> None:
    label = scene()
    cleaned = largest_component(label, classes=[2])
    assert (cleaned == 1).sum() == (label == 1).sum()
    assert (cleaned == 2).sum() == 5 * 4 * 4
    np.testing.assert_array_equal(label, scene())


def test_pieces_that_touch_at_a_corner_are_one() -> None:
    label = np.zeros((6, 6, 6), np.uint8)
    label[0:2, 0:2, 0:2] = 1
    label[2:4, 2:4, 2:4] = 1
    np.testing.assert_array_equal(largest_component(label), label)


def test_nothing_and_background_stay() -> None:
    empty = np.zeros((4, 4, 4), np.uint8)
    np.testing.assert_array_equal(largest_component(empty), empty)
    np.testing.assert_array_equal(largest_component(scene(), classes=[0]), scene())


def test_every_class_is_cleaned_as_if_it_were_alone() -> None:
    draw = np.random.default_rng(0)
    label = (draw.integers(0, 6, (17, 15, 13)) * (draw.random((17, 15, 13)) > 0.7)).astype(np.uint8)
    expected = label.copy()
    for value in range(1, 6):
        pieces, count = ndimage.label(label == value, structure=np.ones((3, 3, 3)))
        sizes = [int((pieces == piece).sum()) for piece in range(1, count + 1)]
        expected[(label == value) & (pieces != 1 + int(np.argmax(sizes)))] = 0
    np.testing.assert_array_equal(largest_component(label), expected)
    assert (expected != label).sum() > 50
