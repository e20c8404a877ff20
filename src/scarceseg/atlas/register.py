"""One atlas to one volume: copy, affine, deformable.

In: two prepared volumes with their grids. Out: an `Alignment`, whose transform takes world points of the fixed volume
to world points of the moving one (as ITK's resampling wants it).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import SimpleITK as sitk
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from scarceseg.atlas.affine import affine_register, scaled
from scarceseg.atlas.deform import deformable
from scarceseg.atlas.frame import IDENTITY, between_worlds, box_geometry, box_size_mm, boxed
from scarceseg.atlas.fuse import local_correlation
from scarceseg.atlas.warp import on_grid, to_array
from scarceseg.data.geometry import respace, to_sitk, to_world
from scarceseg.errors import ConfigError, DataError
from scarceseg.types import Geometry, Volume

Stage = Literal["copy", "affine", "deformable"]
STAGES = get_args(Stage)

AFFINE_COARSER = 2.0
"""The affine step works at this multiple of the deformation's resolution."""

RANK_WINDOW = (5, 5, 5)
"""Sides of the cube of `Alignment.similarity`, voxels of the affine step."""

GROWTH = 5.0
"""An affine step that changes the volume by more than this factor has gone astray."""

AFFINE_UNUSED = {"levels", "control", "iterations", "smoothness"}
COPY_UNUSED = AFFINE_UNUSED | {"affine_iterations", "affine_sampling", "seed"}


class Registration(BaseModel):
    """How an atlas is brought onto a volume.

    Attributes:
        stage: the last step taken: "copy" maps box onto box, "affine" goes on from there by mutual information,
            "deformable" goes on with self-similarity features.
        channel: image channel the registration looks at, or "mean" over channels.
        spacing_mm: isotropic resolution it works at; None takes the volume's own, coarsened to about `voxels`.
        voxels: of the fixed volume at most, when `spacing_mm` is None.
        affine_iterations: at most, per level.
        affine_sampling: share of voxels the mutual information reads.
        levels: of the discrete search of the deformation, coarse to fine: (voxels between nodes, radius in nodes).
        control: voxels between nodes of the deformation.
        iterations: of the descent that refines it.
        smoothness: of the deformation.
        seed: of the choice of voxels, where not all are read.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: Stage = "deformable"
    channel: int | Literal["mean"] = "mean"
    spacing_mm: float | None = Field(None, gt=0)
    voxels: int = Field(400_000, ge=1000)
    affine_iterations: int = Field(60, ge=1)
    affine_sampling: float = Field(1.0, gt=0, le=1)
    levels: tuple[tuple[PositiveInt, PositiveInt], ...] = ((4, 4), (3, 2))
    control: int = Field(3, ge=1)
    iterations: int = Field(30, ge=0)
    smoothness: float = Field(0.3, ge=0)
    seed: int = 0

    def up_to(self, stage: Stage) -> Registration:
        """The same options, stopping after `stage` at the latest."""
        earlier = STAGES.index(stage) < STAGES.index(self.stage)
        return self.model_copy(update={"stage": stage}) if earlier else self

    def relevant(self) -> dict[str, Any]:
        """The options that have a say in the result of `stage`."""
        unused = {"copy": COPY_UNUSED, "affine": AFFINE_UNUSED, "deformable": set()}[self.stage]
        return self.model_dump(exclude=unused)


@dataclass(frozen=True)
class Alignment:
    """Where the points of a fixed volume are in a moving one, in the box frames of both (`frame`).

    Attributes:
        affine: ``[3, 4]``, matrix and translation in mm, of (displaced) fixed to moving points.
        field: ``[3, x, y, z]`` float32, displacement of fixed points in mm before `affine`, or None.
        grid: of `field`, in the fixed volume's box frame.
        stage: the last step that was taken.
        similarity: mean local correlation of the two images after the affine step, [0, 1]; it ranks atlases.
        note: why `stage` is not the one asked for; empty when it is.
    """

    affine: NDArray[np.float64]
    field: NDArray[np.float32] | None
    grid: Geometry | None
    stage: Stage
    similarity: float = 0.0
    note: str = ""

    def transform(self, fixed: Geometry, moving: Geometry) -> sitk.Transform:
        """World points of the fixed volume to world points of the moving volume."""
        inner: sitk.Transform = _affine_transform(self.affine)
        if self.field is not None and self.grid is not None:
            inner = sitk.CompositeTransform([inner, _field_transform(self.field, self.grid)])
        return between_worlds(inner, fixed, moving)


def register(
    fixed: Volume, fixed_geometry: Geometry, moving: Volume, moving_geometry: Geometry, how: Registration
) -> sitk.Transform:
    """Transform of world points of the fixed volume to world points of the moving one; see `align`."""
    return align(fixed, fixed_geometry, moving, moving_geometry, how).transform(fixed_geometry, moving_geometry)


def align(
    fixed: Volume, fixed_geometry: Geometry, moving: Volume, moving_geometry: Geometry, how: Registration
) -> Alignment:
    """Bring a moving volume onto a fixed one: `align_affine`, then `align_deformable` where that is asked for.

    A step that cannot be done (a constant image, volumes that do not overlap) is left out, and noted.

    Args:
        fixed: ``[C, X, Y, Z]``.
        fixed_geometry: its grid.
        moving: ``[C, X', Y', Z']``.
        moving_geometry: its grid.
        how: options.

    Raises:
        ConfigError: `how.channel` is not there.
        DataError: the volumes have different channels, or do not fit their grids.
    """
    start = align_affine(fixed, fixed_geometry, moving, moving_geometry, how.up_to("affine"))
    if how.stage != "deformable":
        return start
    return align_deformable(fixed, fixed_geometry, moving, moving_geometry, start, how)


def align_affine(
    fixed: Volume, fixed_geometry: Geometry, moving: Volume, moving_geometry: Geometry, how: Registration
) -> Alignment:
    """The steps up to the affine one; arguments and errors as of `align`."""
    _check(fixed, fixed_geometry, moving, moving_geometry)
    a, b = _channel(fixed, how.channel), _channel(moving, how.channel)
    start = scaled(box_size_mm(moving_geometry) / box_size_mm(fixed_geometry))
    copied = Alignment(_affine_array(start), None, None, "copy")
    for name, values in (("target's", a), ("atlas's", b)):
        if how.stage != "copy" and (not np.isfinite(values).all() or np.ptp(values) == 0):
            return replace(copied, note=f"the {name} image is constant or not finite")
    spacing = AFFINE_COARSER * working_spacing(fixed_geometry, moving_geometry, how)
    with one_thread():
        target, atlas = _reduced(a, fixed_geometry, spacing), _reduced(b, moving_geometry, spacing)
        found, note = start, ""
        if how.stage != "copy":
            try:
                found = affine_register(target, atlas, start, how.affine_iterations, how.affine_sampling, how.seed)
                growth = abs(np.linalg.det(_affine_array(found)[:, :3]) / np.linalg.det(copied.affine[:, :3]))
                if not 1 / GROWTH < growth < GROWTH:
                    found, note = start, f"affine registration changed the volume by a factor of {growth:.2g}"
            except RuntimeError as error:
                note = f"affine registration failed ({_last_line(error)})"
        moved = sitk.Resample(atlas, target, found, sitk.sitkLinear, 0.0, sitk.sitkFloat32, True)
    similarity = float(local_correlation(to_array(moved)[None], to_array(target)[None], RANK_WINDOW).mean())
    return Alignment(_affine_array(found), None, None, "copy" if note else how.stage, similarity, note)


def align_deformable(
    fixed: Volume,
    fixed_geometry: Geometry,
    moving: Volume,
    moving_geometry: Geometry,
    start: Alignment,
    how: Registration,
) -> Alignment:
    """The deformable step after `start`, an alignment of the same two volumes; arguments and errors as of `align`."""
    _check(fixed, fixed_geometry, moving, moving_geometry)
    a, b = _channel(fixed, how.channel), _channel(moving, how.channel)
    if start.note:
        return start
    spacing = working_spacing(fixed_geometry, moving_geometry, how)
    grid = _padded_grid(
        box_geometry(fixed_geometry), spacing, math.lcm(how.control, *(stride for stride, _ in how.levels))
    )
    with one_thread():
        target = on_grid(boxed(a, fixed_geometry, spacing), grid, sitk.AffineTransform(3))
        atlas = on_grid(boxed(b, moving_geometry, spacing), grid, _affine_transform(start.affine))
        volumes = torch.from_numpy(target), torch.from_numpy(atlas)
        field = deformable(*volumes, how.levels, how.control, how.iterations, how.smoothness)
    if not torch.isfinite(field).all():
        return replace(start, note="the deformation did not stay finite")
    nodes = respace(grid, (how.control * spacing,) * 3)
    return replace(start, field=field.numpy() * np.float32(spacing), grid=nodes, stage="deformable")


def working_spacing(fixed: Geometry, moving: Geometry, how: Registration) -> float:
    """Isotropic resolution of a registration, mm: `how.spacing_mm`, else the finest that gives at most `how.voxels`
    and is not finer than the finest axis of the two volumes."""
    if how.spacing_mm is not None:
        return how.spacing_mm
    finest = min(*fixed.spacing_mm, *moving.spacing_mm)
    return max(finest, float(box_size_mm(fixed).prod() / how.voxels) ** (1 / 3))


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for ITK and PyTorch in here: several processes then share the cores, and sums keep their order."""
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads(), torch.get_num_threads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before[0])
        torch.set_num_threads(before[1])


def _reduced(channel: NDArray[np.float32], geometry: Geometry, spacing: float) -> sitk.Image:
    grid = respace(box_geometry(geometry), (spacing,) * 3)
    return to_sitk(on_grid(boxed(channel, geometry, spacing), grid, sitk.AffineTransform(3)), grid)


def _padded_grid(box: Geometry, spacing: float, step: int) -> Geometry:
    """Covers the box, around the same middle, with sides that are multiples of `step`."""
    lengths = np.asarray(box.size) * box.spacing_mm
    size = [max(int(np.ceil(length / spacing / step - 1e-6)), 2) * step for length in lengths]
    x, y, z = (-(n - 1) / 2 * spacing for n in size)
    return Geometry((size[0], size[1], size[2]), (spacing,) * 3, (x, y, z), IDENTITY)


def _field_transform(field: NDArray[np.float32], grid: Geometry) -> sitk.Transform:
    # Outside of its nodes a field is zero: a rim of copied nodes lets it go on there.
    rimmed = np.pad(field, ((0, 0), (1, 1), (1, 1), (1, 1)), mode="edge").astype(np.float64)
    image = sitk.GetImageFromArray(np.ascontiguousarray(rimmed.transpose(3, 2, 1, 0)), isVector=True)
    image.SetSpacing(grid.spacing_mm)
    image.SetOrigin(to_world(grid, (-1, -1, -1)))
    return sitk.DisplacementFieldTransform(image)


def _affine_transform(values: NDArray[np.float64]) -> sitk.AffineTransform:
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(values[:, :3].ravel().tolist())
    transform.SetTranslation(values[:, 3].tolist())
    return transform


def _affine_array(transform: sitk.AffineTransform) -> NDArray[np.float64]:
    shift = np.asarray(transform.TransformPoint((0.0, 0.0, 0.0)))
    return np.column_stack([np.asarray(transform.GetMatrix()).reshape(3, 3), shift])


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip() if str(error).strip() else type(error).__name__


def _channel(volume: Volume, channel: int | str) -> NDArray[np.float32]:
    if channel == "mean":
        return volume.mean(0, dtype=np.float32) if len(volume) > 1 else np.asarray(volume[0])
    number = int(channel)
    if not 0 <= number < len(volume):
        raise ConfigError(f"channel: expected 0 to {len(volume) - 1} or 'mean', got {number}")
    return np.asarray(volume[number])


def _check(fixed: Volume, fixed_geometry: Geometry, moving: Volume, moving_geometry: Geometry) -> None:
    for name, volume, geometry in (("fixed", fixed, fixed_geometry), ("moving", moving, moving_geometry)):
        if volume.ndim != 4 or volume.shape[1:] != geometry.size:
            raise DataError(
                f"the {name} volume: expected [C, {', '.join(map(str, geometry.size))}], got {volume.shape}"
            )
    if len(fixed) != len(moving):
        raise DataError(f"expected volumes with the same channels, got {len(fixed)} and {len(moving)}")
