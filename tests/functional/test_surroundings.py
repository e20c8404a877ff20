"""Which classes lie beside which."""

from __future__ import annotations

import numpy as np
import torch

from scarceseg.functional.surroundings import surroundings


def by_hand(label: np.ndarray, classes: int, reach: int) -> np.ndarray:
    """Voxel by voxel."""
    counts = np.zeros((classes - 1, classes))
    for place in np.argwhere(label != 255):
        value = label[tuple(place)]
        near = label[tuple(slice(max(p - reach, 0), p + reach + 1) for p in place)]
        for k in range(1, classes):
            if value != k and (near == k).any():
                counts[k - 1, value] += 1
    return counts


def test_it_counts_what_is_near() -> None:
    rng = np.random.default_rng(0)
    label = rng.choice(np.array([0, 1, 2, 3, 255], dtype=np.uint8), (9, 7, 6), p=[0.8, 0.06, 0.05, 0.04, 0.05])
    for reach in (1, 2):
        counts = by_hand(label, 5, reach)
        expected = counts[:, 1:] / np.maximum(counts.sum(1, keepdims=True), 1)
        torch.testing.assert_close(surroundings([label], 5, reach), torch.from_numpy(expected).float())
    counts = by_hand(label, 5, 2) + by_hand(label[::-1, 1:], 5, 2)
    expected = counts[:, 1:] / np.maximum(counts.sum(1, keepdims=True), 1)
    torch.testing.assert_close(surroundings([label, label[::-1, 1:]], 5), torch.from_numpy(expected).float())


def test_a_shell_is_all_that_is_around_its_core() -> None:
    label = np.zeros((12, 12, 12), dtype=np.uint8)
    label[2:10, 2:10, 2:10] = 1
    label[5:7, 5:7, 5:7] = 2
    share = surroundings([label], 4)
    assert share[1].tolist() == [1.0, 0.0, 0.0] and share[2].tolist() == [0.0, 0.0, 0.0]
    assert 0 < share[0, 1] < 0.02
