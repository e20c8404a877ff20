"""Which classes lie beside which: what a mask of one of them may cover of another."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from scarceseg.types import IGNORE_LABEL, LabelMap

REACH = 2
"""Voxels around a structure that count as its surroundings."""


def surroundings(labels: Iterable[LabelMap], classes: int, reach: int = REACH) -> torch.Tensor:
    """Share of each foreground class in the surroundings of each other one (ours).

    The surroundings of class k are the voxels of other classes, background included, that lie within `reach` voxels of it
    along every axis.

    Args:
        labels: reference labels ``[X, Y, Z]``, all counted together; voxels of 255 take no part.
        classes: K.
        reach: in voxels.

    Returns:
        ``[K-1, K-1]`` in [0, 1], float32: row k, column c is the share of class c around class k; 0 on the diagonal and in the
        row of a class that no label has.
    """
    counts = np.zeros((classes - 1, classes))
    for label in labels:
        array = np.asarray(label)
        for k, box in enumerate(ndimage.find_objects(np.where(array == IGNORE_LABEL, 0, array), classes - 1)):
            if box is not None:
                counts[k] += _around(array[_wider(box, reach)], k + 1, classes, reach)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return torch.from_numpy(share[:, 1:].astype(np.float32))


def _around(part: LabelMap, value: int, classes: int, reach: int) -> NDArray[np.int64]:
    """Voxels of each class around one, in a part of a volume that holds it whole."""
    inside = part == value
    near = ndimage.maximum_filter(inside, 2 * reach + 1, mode="constant") & ~inside & (part != IGNORE_LABEL)
    return np.bincount(part[near].astype(np.int64), minlength=classes)


def _wider(box: tuple[slice, ...], reach: int) -> tuple[slice, ...]:
    return tuple(slice(max(s.start - reach, 0), s.stop + reach) for s in box)
