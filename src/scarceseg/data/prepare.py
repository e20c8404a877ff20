"""Files -> prepared volumes (canonical axes, planned spacing, normalised), cached on disk; and the way back.

`prepare_volume` and `restore` are a pair: what lies on the prepared grid goes back to the grid the file had.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scarceseg.data.cache import allow_many_files, cache_folder, entry_path, load, store
from scarceseg.data.dataset import Case, UnlabelledCase
from scarceseg.data.geometry import orient, orient_geometry, resample, respace, smooth_for
from scarceseg.data.images import read_label, read_volume
from scarceseg.data.plan import MOST_VOXELS, Normalisation, Plan
from scarceseg.errors import DataError
from scarceseg.types import Geometry, LabelMap, Volume

PREPARE_VERSION = 1
"""Part of every cache key; raised when prepared values change."""

WORKERS = 2
"""Volumes prepared at once: enough to overlap reading with computing, few enough to hold in memory."""

TIE = 1e-4
"""Class shares closer than this are taken as equal."""


@dataclass(frozen=True)
class PreparedCase:
    """One case as training reads it.

    Attributes:
        name: case.
        image: ``[C, X, Y, Z]`` float32, memory-mapped and read-only.
        label: ``[X, Y, Z]`` uint8, or None for a case that is not labelled in this run.
        geometry: grid of `image`.
        original: grid of the files.
    """

    name: str
    image: Volume
    label: LabelMap | None
    geometry: Geometry
    original: Geometry


def prepared_geometry(original: Geometry, plan: Plan) -> Geometry:
    """The grid a volume is prepared on: nearest canonical axes, planned spacing, the same outer corner."""
    return respace(orient_geometry(original), plan.spacing_mm)


def prepare_volume(volume: Volume, geometry: Geometry, plan: Plan) -> tuple[Volume, Geometry]:
    """Turn, normalise and resample one volume.

    Normalisation comes first: its statistics then do not depend on the spacing, and clipped CT values do not smear.
    Interpolation is linear both ways; strong reductions are smoothed first (`geometry.smooth_for`). Halving the
    resolution gives exactly the mean over 2x2x2 blocks.

    Args:
        volume: ``[C, X, Y, Z]``, left unchanged.
        geometry: its grid.
        plan: spacing and one normalisation per channel.

    Returns:
        ``[C, X', Y', Z']`` float32, and its grid.

    Raises:
        DataError: another number of channels than the plan has, or far too many voxels at its spacing.
    """
    if len(volume) != len(plan.normalisation):
        raise DataError(
            f"expected {len(plan.normalisation)} channels ({', '.join(plan.channels)}), got {len(volume)}; "
            "give one file per channel"
        )
    turned = orient_geometry(geometry)
    target = respace(turned, plan.spacing_mm)
    if (voxels := math.prod(target.size)) > MOST_VOXELS:
        size, spacing = (" x ".join(f"{v:g}" for v in values) for values in (turned.size, turned.spacing_mm))
        raise DataError(
            f"{size} voxels of {spacing} mm would become {voxels:.3g} voxels at the planned spacing, expected at most "
            f"{MOST_VOXELS:.0e}: check the spacing in its header"
        )
    prepared = np.empty((len(volume), *target.size), dtype=np.float32)
    for row, channel, how in zip(prepared, volume, plan.normalisation, strict=True):
        values = orient(normalise(channel, how), geometry)
        if target != turned:
            values = resample(smooth_for(values, turned, target.spacing_mm), turned, target)
        row[...] = values
    return prepared, target


def normalise(channel: NDArray[np.float32], how: Normalisation) -> NDArray[np.float32]:
    """Scaled copy of one channel ``[X, Y, Z]``; see `plan.Normalisation`.

    A z-score leaves exact zeros one common value, whichever voxels its statistics come from. A constant channel
    becomes 0.
    """
    if how.kind == "none":
        return channel.astype(np.float32)
    if how.kind == "ct":
        return ((np.clip(channel, how.low, how.high) - np.float32(how.mean)) / np.float32(how.std)).astype(np.float32)
    inside = channel[channel != 0] if 0 < np.count_nonzero(channel) < channel.size / 2 else channel
    mean, std = inside.mean(dtype=np.float64), inside.std(dtype=np.float64)
    scaled = channel - np.float32(mean)
    scaled /= np.float32(std if std > 0 else 1.0)
    return scaled


def prepare_label(label: LabelMap, geometry: Geometry, plan: Plan) -> LabelMap:
    """A label map on the grid of `prepare_volume`.

    Each class is resampled as a share in [0, 1] in the same way as an image, and the largest share wins. Shares within
    1e-4 of each other are a tie, which goes to the class of the voxel nearest to the new voxel's centre when that is
    among them, else to the lowest class. (Always choosing the lowest would shave structures by up to half a voxel.)

    Args:
        label: ``[X, Y, Z]``.
        geometry: its grid.

    Returns:
        ``[X', Y', Z']`` uint8.
    """
    turned = orient_geometry(geometry)
    target = respace(turned, plan.spacing_mm)
    label = orient(label, geometry)
    if target == turned:
        return np.ascontiguousarray(label)
    nearest = resample(label, turned, target, nearest=True)
    winner = np.zeros(target.size, dtype=np.uint8)
    best = np.full(target.size, -1.0, dtype=np.float32)
    for value in np.unique(label):
        share = resample(smooth_for(label == value, turned, target.spacing_mm), turned, target)
        share += np.float32(TIE) * (nearest == value)
        ahead = share > best + np.float32(TIE / 2)  # equal shares carry rounding noise
        winner[ahead] = value
        best[ahead] = share[ahead]
    return winner


def restore(probability: NDArray[np.float32], prepared: Geometry, original: Geometry) -> NDArray[np.float32]:
    """Class probabilities on the grid of the input file: the inverse of `prepare_volume`.

    Linear interpolation in world coordinates. Beyond the border of the prepared grid the border's values go on, so
    that every voxel has probabilities that sum to what they did.

    Args:
        probability: ``[K, X', Y', Z']``, any per-voxel maps.
        prepared: their grid.
        original: grid wanted.

    Returns:
        ``[K, X, Y, Z]`` float32.
    """
    restored = np.empty((len(probability), *original.size), dtype=np.float32)
    for row, values in zip(restored, probability, strict=True):
        row[...] = _restore_one(values, prepared, original)
    return restored


def restore_label(probability: NDArray[np.float32], prepared: Geometry, original: Geometry) -> LabelMap:
    """The most probable class per voxel of the input file's grid, ``[X, Y, Z]`` uint8; ties go to the lowest class.

    The same as ``restore(...).argmax(0)`` with the memory of two maps instead of K.
    """
    return most_probable(_restore_one(values, prepared, original) for values in probability)


def most_probable(maps: Iterable[NDArray[np.float32]]) -> LabelMap:
    """The class of each voxel from one map a class, in their order; ties go to the lowest class."""
    rest = iter(maps)
    best = next(rest)
    winner = np.zeros(best.shape, dtype=np.uint8)
    for value, share in enumerate(rest, start=1):
        ahead = share > best
        winner[ahead] = value
        best = np.maximum(best, share)
    return winner


def _restore_one(values: NDArray[np.float32], prepared: Geometry, original: Geometry) -> NDArray[np.float32]:
    if orient_geometry(original) == prepared:
        # `orient` gives a view, so writing through it puts every value at its place without interpolation.
        back = np.empty(original.size, dtype=np.float32)
        orient(back, original)[...] = values
        return back
    return resample(values.astype(np.float32, copy=False), prepared, original)


def prepare_cases(
    labelled: Sequence[Case],
    unlabelled: Sequence[UnlabelledCase],
    plan: Plan,
    cache: Path | None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, PreparedCase]:
    """Prepare cases once and memory-map them from then on.

    An entry is found by what made it: source files (path, size, time of change), the plan's spacing and normalisation,
    and the version of this code. Images and labels are separate entries, so that one image serves runs in which its
    case is labelled and runs in which it is not. Several processes may prepare at once. A damaged entry is made again.

    Args:
        labelled: their label files are read.
        unlabelled: only their images are.
        plan: how.
        cache: folder; None is `cache_folder`.
        on_progress: called with (done, total, case name), from the calling thread.

    Returns:
        By case name, in the order given.

    Raises:
        DataError: a file cannot be used.
        RunError: the cache cannot be written.
    """
    allow_many_files()
    folder = cache or cache_folder()
    cases: list[Case | UnlabelledCase] = [*labelled, *unlabelled]
    done: dict[str, PreparedCase] = {}
    with ThreadPoolExecutor(WORKERS, thread_name_prefix="prepare") as pool:
        waiting = [pool.submit(_prepare_case, case, plan, folder) for case in cases]
        try:
            for number, future in enumerate(as_completed(waiting), start=1):
                case = future.result()
                done[case.name] = case
                if on_progress:
                    on_progress(number, len(cases), case.name)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {case.name: done[case.name] for case in cases}


def _prepare_case(case: Case | UnlabelledCase, plan: Plan, folder: Path) -> PreparedCase:
    how = {
        "version": PREPARE_VERSION,
        "spacing_mm": plan.spacing_mm,
        "normalisation": [n.model_dump() for n in plan.normalisation],
    }
    entry = entry_path(folder, f"{case.name}-image", case.images, how)
    found = load(entry)
    if found is None:
        volume, original = read_volume(case.images)
        prepared, geometry = prepare_volume(volume, original, plan)
        del volume
        found = store(entry, prepared, {"geometry": asdict(geometry), "original": asdict(original)})
    image, notes = found
    geometry, original = _geometry(notes["geometry"]), _geometry(notes["original"])
    label = None
    if isinstance(case, Case) and case.label is not None:
        label = _prepared_label(case.name, case.label, original, plan, folder)
    return PreparedCase(case.name, image, label, geometry, original)


def _prepared_label(name: str, path: Path, original: Geometry, plan: Plan, folder: Path) -> LabelMap:
    # The image's grid is part of the key: a label that no longer lies on its image must be refused, not served.
    how = {
        "version": PREPARE_VERSION,
        "spacing_mm": plan.spacing_mm,
        "classes": len(plan.classes),
        "original": asdict(original),
    }
    entry = entry_path(folder, f"{name}-label", [path], how)
    found = load(entry)
    if found is None:
        label = read_label(path, range(len(plan.classes)), original)
        found = store(entry, prepare_label(label, original, plan), {})
    return found[0]


def _geometry(values: Mapping[str, Any]) -> Geometry:
    return Geometry(
        tuple(values["size"]), tuple(values["spacing_mm"]), tuple(values["origin"]), tuple(values["direction"])
    )
