"""Images and label maps carried from one grid to another by a transform, and the copy that needs none."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from scarceseg.atlas.affine import scaled
from scarceseg.atlas.frame import between_worlds, box_size_mm
from scarceseg.data.geometry import to_sitk
from scarceseg.errors import DataError
from scarceseg.types import Geometry, LabelMap, Volume


def warp_label(
    label: LabelMap, moving_geometry: Geometry, transform: sitk.Transform, fixed_geometry: Geometry, classes: int
) -> NDArray[np.float32]:
    """A label map carried onto another grid, as probabilities.

    Each class is interpolated linearly as a share; beyond the moving volume its border goes on.

    Args:
        label: ``[X', Y', Z']`` uint8.
        moving_geometry: its grid.
        transform: of fixed to moving world points.
        fixed_geometry: grid wanted.
        classes: K, background included.

    Returns:
        ``[K, X, Y, Z]`` float32, sums to one over K.

    Raises:
        DataError: the label holds a value of K or more.
    """
    present = np.unique(label)
    if present.max(initial=0) >= classes:
        raise DataError(f"expected label values 0 to {classes - 1}, got {present.max()}; check the number of classes")
    shares = np.zeros((classes, *fixed_geometry.size), dtype=np.float32)
    for value in present[present > 0]:
        inside = (label == value).astype(np.float32)
        shares[value] = on_grid(to_sitk(inside, moving_geometry), fixed_geometry, transform)
    shares[0] = np.clip(1 - shares[1:].sum(0), 0, 1)
    return shares / shares.sum(0, keepdims=True)


def warp_image(image: Volume, moving_geometry: Geometry, transform: sitk.Transform, fixed_geometry: Geometry) -> Volume:
    """An image ``[C, X', Y', Z']`` carried onto another grid, linear; ``[C, X, Y, Z]`` float32."""
    return np.stack([on_grid(to_sitk(channel, moving_geometry), fixed_geometry, transform) for channel in image])


def copy_label(
    label: LabelMap, source_geometry: Geometry, target_geometry: Geometry, classes: int
) -> NDArray[np.float32]:
    """A label map stretched so that its volume's box fills the other volume's box, axes in anatomical order.

    No image is looked at: this is what position alone tells.

    Returns:
        ``[K, X, Y, Z]`` float32 on the target grid, sums to one over K.
    """
    stretch = scaled(box_size_mm(source_geometry) / box_size_mm(target_geometry))
    transform = between_worlds(stretch, target_geometry, source_geometry)
    return warp_label(label, source_geometry, transform, target_geometry, classes)


def on_grid(image: sitk.Image, grid: Geometry, transform: sitk.Transform) -> NDArray[np.float32]:
    """An image read at the transformed points of a grid, linear, its border going on: ``[X, Y, Z]`` float32.

    Beyond the border voxels' centres the nearest voxel is taken.
    """
    place = (grid.origin, grid.spacing_mm, grid.direction)
    kind = sitk.sitkFloat32
    return to_array(sitk.Resample(image, grid.size, transform, sitk.sitkLinear, *place, 0.0, kind, True))


def to_array(image: sitk.Image) -> NDArray[np.float32]:
    """Values of an image in index order ``[X, Y, Z]``."""
    return np.ascontiguousarray(sitk.GetArrayFromImage(image).T)
