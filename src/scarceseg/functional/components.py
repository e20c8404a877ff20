"""Keeping the largest connected piece of a structure."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from scipy import ndimage

from scarceseg.types import LabelMap

_TOUCHING = np.ones((3, 3, 3), dtype=bool)


def largest_component(label: LabelMap, classes: Collection[int] | None = None) -> LabelMap:
    """Keep, class by class, the largest connected component; what is dropped becomes background (0).

    Voxels are connected across faces, edges and corners (26 neighbours). Of pieces of equal size the first in
    index order stays.

    Args:
        label: class indices ``[X, Y, Z]``; not changed.
        classes: classes to clean; None is every class but the background.

    Returns:
        A new label map.
    """
    cleaned = label.copy()
    for index, box in enumerate(ndimage.find_objects(label), start=1):
        if box is None or (classes is not None and index not in classes):
            continue
        pieces, count = ndimage.label(label[box] == index, structure=_TOUCHING)
        if count > 1:
            sizes = np.bincount(pieces.ravel())
            sizes[0] = 0
            cleaned[box][(pieces > 0) & (pieces != sizes.argmax())] = 0
    return cleaned
