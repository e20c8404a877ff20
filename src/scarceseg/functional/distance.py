"""Signed distance maps of label maps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, find_objects

from scarceseg.types import LabelBatch


def signed_distance(label: LabelBatch, classes: int) -> torch.Tensor:
    """One signed distance map a foreground class, scaled to [-1, 1] in each patch (Luo et al. 2021).

    Outside: distance to the nearest voxel of the class over the largest such distance. Inside: minus the distance to the
    nearest voxel of anything else over the largest such distance; voxels with a face on the outside are 0. Distances are
    in voxels. A class the patch does not hold is 1 everywhere, one that fills it -1 (ours).

    Args:
        label: ``[B, X, Y, Z]``; 255 counts as outside of every class.
        classes: K, background included.

    Returns:
        ``[B, K - 1, X, Y, Z]`` float32 on the device of `label`.
    """
    array = label.cpu().numpy()
    maps = np.empty((len(array), classes - 1, *array.shape[1:]), np.float32)
    for row, of_row in zip(array, maps, strict=True):
        for number, one in enumerate(of_row, 1):
            one[...] = _signed_distance(row == number)
    return torch.from_numpy(maps).to(label.device)


def _signed_distance(mask: NDArray[np.bool_]) -> NDArray[Any] | float:
    if not mask.any():
        return 1.0
    if mask.all():
        return -1.0
    outside = distance_transform_edt(~mask)
    # The nearest voxel outside lies in the bounding box or on its rim, which saves most of the second transform.
    box = tuple(slice(max(side.start - 1, 0), side.stop + 1) for side in find_objects(mask.view(np.int8))[0])
    inside = np.zeros(mask.shape)
    inside[box] = distance_transform_edt(mask[box])
    inside[inside == 1.0] = 0.0  # a voxel at distance 1 has a face on the outside: the boundary
    return outside / outside.max() - inside / max(inside.max(), 1.0)
