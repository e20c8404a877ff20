"""Blocks of volumes; a volume with a side shorter than the patch counts as padded with zeros, which only the block is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def padded_size(size: Sequence[int], patch: Sequence[int]) -> tuple[int, int, int]:
    """Sides of a volume of `size` that is padded to at least `patch`."""
    x, y, z = (max(side, least) for side, least in zip(size, patch, strict=True))
    return x, y, z


def crop_padded(array: Array, start: Sequence[int], size: Sequence[int], patch: Sequence[int]) -> Array:
    """The block of `size` at voxel `start` of the last three axes, after padding with zeros to at least `patch`.

    Half of the padding lies before (rounded down), the rest after. Without padding the block is a view.

    Args:
        array: ``[..., X, Y, Z]``.
        start: in the padded volume.
        size: of the block; it lies within the padded volume.
        patch: smallest sides of the padded volume.
    """
    inside, widths = [], []
    for first, length, side, least in zip(start, size, array.shape[-3:], patch, strict=True):
        begin = first - max(least - side, 0) // 2
        low, high = min(max(begin, 0), side), min(max(begin + length, 0), side)
        inside.append(slice(low, high))
        before = min(max(-begin, 0), length)
        widths.append((before, length - before - (high - low)))
    index: Any = (..., *inside)
    block: Array = array[index]
    return np.pad(block, [(0, 0)] * (array.ndim - 3) + widths) if any(map(any, widths)) else block
