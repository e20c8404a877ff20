"""The box frame: where registration works, and the way between it and the patient's world.

Two scans of two patients share no world origin, and crops of them not even a body position. The box frame of a volume
has its origin in the middle of the volume's box, axes in the canonical order and sense (`data.geometry`), and
millimetres as units. The middles of two volumes are therefore the natural start of a registration.
"""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from scarceseg.data.geometry import matrix, orient, orient_geometry, smooth_for, to_sitk, to_world
from scarceseg.types import Geometry

IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


def box_geometry(geometry: Geometry) -> Geometry:
    """The grid of `boxed`: canonical axes along the coordinate axes, the middle of the box at the origin."""
    turned = orient_geometry(geometry)
    x, y, z = (-(n - 1) / 2 * s for n, s in zip(turned.size, turned.spacing_mm, strict=True))
    return Geometry(turned.size, turned.spacing_mm, (x, y, z), IDENTITY)


def box_size_mm(geometry: Geometry) -> NDArray[np.float64]:
    """Lengths of the box along the canonical axes, outer face to outer face, mm ``[3]``."""
    turned = orient_geometry(geometry)
    return np.asarray(turned.size, dtype=np.float64) * turned.spacing_mm


def boxed(array: NDArray[np.float32], geometry: Geometry, spacing_mm: float) -> sitk.Image:
    """One channel ``[X, Y, Z]`` as an image in its box frame, its own voxels.

    Args:
        array: values.
        geometry: their grid in the world.
        spacing_mm: resolution the image is going to be read at; a strong reduction is smoothed for.
    """
    grid = box_geometry(geometry)
    return to_sitk(smooth_for(orient(array, geometry), grid, (spacing_mm,) * 3), grid)


def box_to_world(geometry: Geometry) -> sitk.AffineTransform:
    """Transform of points in the box frame of a volume to its world."""
    turned = orient_geometry(geometry)
    middle = to_world(turned, [(n - 1) / 2 for n in turned.size])
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(matrix(turned).ravel().tolist())
    transform.SetTranslation(middle)
    return transform


def between_worlds(transform: sitk.Transform, fixed: Geometry, moving: Geometry) -> sitk.Transform:
    """A transform of fixed to moving points in box frames, as one of fixed to moving world points."""
    return sitk.CompositeTransform([box_to_world(moving), transform, box_to_world(fixed).GetInverse()])
