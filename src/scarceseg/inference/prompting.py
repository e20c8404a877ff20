"""What the user points at -> a `Prompt` in voxel indices, and from there into the frame a model sees, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from scarceseg.data.geometry import canonical_axes, describe, orient
from scarceseg.errors import DataError
from scarceseg.types import Geometry, Prompt

Frame = Literal["voxel", "lps", "ras"]
"""How places are given: voxel indices from 0, or world positions in mm that grow to the patient's left, back and head
(LPS: ITK, DICOM), or right, front and head (RAS: NIfTI, 3D Slicer)."""
Points = Sequence[Sequence[float]]


def make_prompt(
    geometry: Geometry,
    points: Points = (),
    negative: Points = (),
    box: Sequence[float] | None = None,
    mask: NDArray[np.float32] | None = None,
    frame: Frame = "voxel",
) -> Prompt:
    """A prompt in voxel indices of a grid; the model checks whether its places lie inside.

    Args:
        geometry: the grid.
        points, negative, box: as in `segment`, in `frame`. A world box becomes the smallest voxel box around its eight
            corners, cut at the border of the volume.
        mask: ``[X, Y, Z]`` probability, or None.
        frame: of the places.

    Raises:
        DataError: a point that is not three numbers, a box that is not six, or a world box beside the volume.
    """
    clicks = [*points, *negative]
    for click in clicks:
        _expect(click, 3, "a point", "x, y, z")
    labels = torch.tensor([1] * len(points) + [0] * len(negative))
    return Prompt(
        points_voxel=torch.from_numpy(_to_voxel(clicks, geometry, frame)) if clicks else None,
        point_labels=labels if clicks else None,
        box_voxel=None if box is None else torch.from_numpy(_voxel_box(box, geometry, frame)),
        mask=None if mask is None else torch.from_numpy(np.ascontiguousarray(mask, dtype=np.float32)),
    )


def numbers(text: str, what: str = "a point", form: str = "X,Y,Z") -> tuple[float, ...]:
    """Numbers between commas, as typed on the command line.

    Raises:
        DataError: something else, or another count than `form` has.
    """
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise DataError(f"{what}: expected {form}, got {text!r}") from None
    _expect(values, form.count(",") + 1, what, form)
    return values


def _expect(values: Sequence[float], count: int, what: str, form: str) -> None:
    if len(values) != count or not np.isfinite(np.asarray(values, dtype=np.float64)).all():
        raise DataError(f"{what}: expected {count} numbers ({form}), got {', '.join(f'{v:g}' for v in values)}")


def _to_voxel(places: Points, geometry: Geometry, frame: Frame) -> NDArray[np.float32]:
    """Nearest voxel of each place ``[N, 3]``."""
    array = np.asarray(places, dtype=np.float64).reshape(-1, 3)
    if frame != "voxel":
        from scarceseg.foundation.prompts import to_voxel

        lps = array * (-1, -1, 1) if frame == "ras" else array
        array = np.asarray(to_voxel(torch.from_numpy(lps), geometry), dtype=np.float64)
    return np.rint(array).astype(np.float32) + 0.0  # no negative zero


def _voxel_box(box: Sequence[float], geometry: Geometry, frame: Frame) -> NDArray[np.float32]:
    _expect(box, 6, "a box", "x0, y0, z0, x1, y1, z1")
    ends = np.asarray(box, dtype=np.float64).reshape(2, 3)
    corners = np.stack(np.meshgrid(*ends.T, indexing="ij"), axis=-1).reshape(8, 3)
    voxels = _to_voxel(corners.tolist(), geometry, frame)
    around = np.stack([voxels.min(axis=0), voxels.max(axis=0)])
    if frame == "voxel":
        return around
    last = np.asarray(geometry.size, dtype=np.float32) - 1
    if (around[1] < 0).any() or (around[0] > last).any():
        raise DataError(
            f"the box lies outside the image, which has {describe(geometry)}; the box was read as {frame.upper()} mm"
        )
    return np.clip(around, 0, last)


def turn_prompt(prompt: Prompt, geometry: Geometry, device: torch.device) -> Prompt:
    """The prompt in the frame of ``orient(volume, geometry)``."""
    order, flip = canonical_axes(geometry)

    def turn(places: torch.Tensor) -> torch.Tensor:
        moved = places[:, list(order)].clone()
        for axis, reverse in enumerate(flip):
            if reverse:
                moved[:, axis] = geometry.size[order[axis]] - 1 - moved[:, axis]
        return moved.to(device)

    box, mask = prompt.box_voxel, prompt.mask
    if box is not None:
        corners = turn(box)
        box = torch.stack([corners.amin(dim=0), corners.amax(dim=0)])
    if mask is not None:
        mask = torch.from_numpy(np.ascontiguousarray(orient(mask.numpy(), geometry))).to(device)
    return Prompt(
        points_voxel=None if prompt.points_voxel is None else turn(prompt.points_voxel),
        point_labels=None if prompt.point_labels is None else prompt.point_labels.to(device),
        box_voxel=box,
        mask=mask,
    )


def turn_back(array: NDArray[np.float32], geometry: Geometry) -> NDArray[np.float32]:
    """Undo ``orient(..., geometry)``."""
    order, flip = canonical_axes(geometry)
    unflipped = array[tuple(slice(None, None, -1) if reverse else slice(None) for reverse in flip)]
    return np.ascontiguousarray(unflipped.transpose(np.argsort(order)))
