"""Image files (NIfTI, NRRD, MetaImage, DICOM series) -> arrays in index order ``[X, Y, Z]`` and geometry, and back."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from scarceseg.data.formats import (
    SUFFIXES,
    check_nifti,
    check_spacing,
    image_suffix,
    not_finite,
    read_file,
    read_series,
    reason,
    series_in,
    skewed,
)
from scarceseg.data.geometry import describe, matrix, same_geometry, to_sitk
from scarceseg.errors import DataError, RunError
from scarceseg.types import Geometry, LabelMap, Volume

__all__ = [
    "SUFFIXES",
    "SeveralChannels",
    "image_suffix",
    "list_images",
    "output_suffix",
    "read_image",
    "read_label",
    "read_volume",
    "series_in",
    "write_image",
]


class SeveralChannels(DataError):
    """A file holds several volumes, or several numbers a voxel, and none was chosen.

    Args:
        message: what is told.
        count: how many.
    """

    def __init__(self, message: str, count: int) -> None:
        super().__init__(message)
        self.count = count


def output_suffix(path: Path) -> str:
    """The ending a result for the input `path` gets: its own format in one file; ``.nii.gz`` for a DICOM folder."""
    suffix = image_suffix(path) or ".nii.gz"
    return {".mhd": ".mha", ".nhdr": ".nrrd"}.get(suffix, suffix)


def read_image(path: Path, series: str | None = None, channel: int | None = None) -> tuple[NDArray[Any], Geometry]:
    """Read one 3D single-channel image, or one channel of a file with several.

    Args:
        path: a file with an ending of `SUFFIXES`, or a folder with DICOM files.
        series: identifier (Series Instance UID) when the folder holds more than one series.
        channel: which volume of a 4D file, or which value of a voxel that holds several, counted from 0.

    Returns:
        Array ``[X, Y, Z]`` in the stored type, all values finite, and its geometry.

    Raises:
        DataError: missing, not an image, truncated, not 3D, several values per voxel and none chosen (`SeveralChannels`), no
            such channel, a spacing outside 0.01 .. 100 mm, axes not at right angles, NaN or infinite voxels, several
            series, uneven slices.
    """
    if path.is_dir():
        image = read_series(path, series)
    elif not path.exists():
        raise DataError(f"there is no image {path}: check the path")
    elif image_suffix(path) is None:
        raise DataError(
            f"{path}: expected a file that ends in {', '.join(SUFFIXES)} or a folder with a DICOM series; "
            "convert the file, or give the folder of its series"
        )
    else:
        image = read_file(path)
    image = _three_axes(image if channel is None else _channel(image, channel, path), path)
    geometry = Geometry(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())
    check_spacing(path, geometry.spacing_mm)
    if not np.allclose(matrix(geometry).T @ matrix(geometry), np.eye(3), atol=1e-2):
        raise skewed(path)
    array = sitk.GetArrayFromImage(image).transpose(2, 1, 0)
    _check_finite(array, path)
    return array, geometry


def _check_finite(array: NDArray[Any], path: Path) -> None:
    if np.issubdtype(array.dtype, np.floating):
        bad = array.size - int(np.count_nonzero(np.isfinite(array)))
        if bad:
            raise not_finite(path, bad, array.size)


def _channel(image: sitk.Image, channel: int, path: Path) -> sitk.Image:
    count = _channels(image)
    if not 0 <= channel < count:
        raise DataError(f"{path} holds {count} channel{'s' if count > 1 else ''}, counted from 0: got {channel}")
    if image.GetDimension() == 4:
        return image[:, :, :, channel]
    return image if count == 1 else sitk.VectorIndexSelectionCast(image, channel)


def _channels(image: sitk.Image) -> int:
    return int(image.GetSize()[3] if image.GetDimension() == 4 else image.GetNumberOfComponentsPerPixel())


def _three_axes(image: sitk.Image, path: Path) -> sitk.Image:
    if image.GetDimension() == 4 and image.GetSize()[3] == 1:
        image = image[:, :, :, 0]
    if image.GetDimension() != 3:
        hint = "split it into one file per channel or time point" if image.GetDimension() > 3 else "a volume is needed"
        size = "x".join(str(n) for n in image.GetSize())
        raise _refused(image, f"{path}: expected a 3D image, got {image.GetDimension()}D of size {size}; {hint}")
    if image.GetNumberOfComponentsPerPixel() != 1 or "complex" in image.GetPixelIDTypeAsString():
        raise _refused(
            image,
            f"{path}: expected one real number per voxel, got {image.GetPixelIDTypeAsString()} with "
            f"{image.GetNumberOfComponentsPerPixel()} components; split it into one file per channel",
        )
    return image


def _refused(image: sitk.Image, message: str) -> DataError:
    count = _channels(image)
    return SeveralChannels(message, count) if image.GetDimension() <= 4 and count > 1 else DataError(message)


def read_volume(paths: Sequence[Path]) -> tuple[Volume, Geometry]:
    """Read the channels of one case, one file each.

    Returns:
        ``[C, X, Y, Z]`` float32 and the common geometry.

    Raises:
        DataError: a channel is unreadable (see `read_image`) or lies on another grid than the first.
    """
    channels: list[NDArray[np.float32]] = []
    first: Geometry | None = None
    for path in paths:
        array, geometry = read_image(path)
        first = first or geometry
        if not same_geometry(first, geometry):
            raise DataError(
                f"the channels of one case must share one grid: {paths[0]} has {describe(first)}, "
                f"{path} has {describe(geometry)}; register and resample one to the other"
            )
        with np.errstate(over="ignore"):
            channels.append(array.astype(np.float32, copy=False))
        _check_finite(channels[-1], path)  # float64 values may lie beyond float32
    if first is None:
        raise ValueError("a volume needs at least one channel")
    return np.stack(channels), first


def read_label(path: Path, classes: Collection[int], expected: Geometry) -> LabelMap:
    """Read the label map of an image.

    Float files are accepted when every value is a whole number.

    Args:
        path: label file.
        classes: values that may occur.
        expected: geometry of the image.

    Returns:
        ``[X, Y, Z]`` uint8.

    Raises:
        DataError: unreadable (see `read_image`), another grid than the image, fractions, or values outside `classes`.
    """
    array, geometry = read_image(path)
    if geometry.size != expected.size or not same_geometry(geometry, expected):
        raise DataError(
            f"label {path} does not lie on its image: the label has {describe(geometry)}, the image has "
            f"{describe(expected)}; resample the label to the image (nearest neighbour)"
        )
    values, counts = _count(array)
    if np.issubdtype(array.dtype, np.floating):
        broken = values != np.rint(values)
        if broken.any():
            examples = ", ".join(f"{value:g}" for value in values[broken][:3])
            raise DataError(
                f"label {path}: expected whole class numbers, got floats as labels such as {examples} "
                f"({int(counts[broken].sum())} voxels); a probability map must be thresholded first"
            )
    unknown = [(int(v), int(n)) for v, n in zip(values, counts, strict=True) if int(v) not in classes]
    if unknown:
        listing = ", ".join(f"{value} ({count} voxels)" for value, count in unknown[:8])
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        raise DataError(
            f"label {path}: expected the values {sorted(classes)} of dataset.json, found also {listing}{more}; "
            "correct the file, or add the classes to dataset.json"
        )
    return array.astype(np.uint8)


def _count(array: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Distinct values and how often each occurs; small whole numbers without sorting the volume."""
    if np.issubdtype(array.dtype, np.integer) and array.min() >= 0 and array.max() < 1 << 16:
        counts = np.bincount(array.ravel(order="K"))
        values = np.flatnonzero(counts)
        return values, counts[values]
    return np.unique(array, return_counts=True)


def write_image(array: NDArray[Any], geometry: Geometry, path: Path) -> None:
    """Write an image, compressed, so that `path` is either whole or as it was before.

    Args:
        array: ``[X, Y, Z]``, or ``[K, X, Y, Z]`` which becomes a 4D file with K last; booleans are written as uint8.
        geometry: grid of the array.
        path: ends in ``.nii.gz``, ``.nii``, ``.nrrd`` or ``.mha``; the folder must exist.

    Raises:
        RunError: an ending that cannot be written as one file, no folder, no permission, or a full disk.
    """
    suffix = image_suffix(path)
    if suffix is None or suffix in {".mhd", ".nhdr"}:
        raise RunError(f"cannot write {path}: expected a name that ends in .nii.gz, .nii, .nrrd or .mha")
    if array.shape[-3:] != geometry.size:
        raise ValueError(f"array of shape {array.shape} does not fit a grid of {geometry.size}")
    volumes = [to_sitk(part, geometry) for part in array] if array.ndim == 4 else []
    image = sitk.JoinSeries(volumes) if volumes else to_sitk(array, geometry)
    scratch = path.with_name(f".{path.name[: -len(suffix)]}.{os.getpid()}{suffix}")
    try:
        sitk.WriteImage(image, str(scratch), useCompression=True)
        if suffix in {".nii", ".nii.gz"}:
            check_nifti(scratch)  # the NIfTI writer does not report a full disk
        os.replace(scratch, path)
    except (RuntimeError, OSError, DataError) as error:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        why = "the disk may be full" if isinstance(error, DataError) else reason(error)
        raise RunError(
            f"cannot write {path} ({why}); check that the folder exists, may be written to and has room"
        ) from None


def list_images(inputs: Sequence[Path], channels: int) -> list[tuple[str, tuple[Path, ...]]]:
    """Find the cases in what the user names for prediction.

    An input is an image file, a folder with image files, a folder with one DICOM series (one case, named like the
    folder), or a folder whose subfolders are such DICOM folders. Files named ``case_0000``, ``case_0001`` ... are the
    channels of ``case`` when the network has several, or when every file ends in ``_0000``.

    Args:
        inputs: files and folders.
        channels: of the network.

    Returns:
        ``(case name, one path a channel)`` in the order of the inputs, by name within a folder.

    Raises:
        DataError: nothing there, not an image, a channel missing or too many, two cases of one name.
    """
    paths = [found for entry in inputs for found in _expand(entry)]
    stems = [path.name if path.is_dir() else path.name[: -len(image_suffix(path) or "")] for path in paths]
    if channels == 1:
        # "scan_0001, scan_0002" of a one-channel network are two cases, so only an unbroken row of _0000 is a suffix.
        strip = bool(stems) and all(stem.endswith("_0000") and len(stem) > 5 for stem in stems)
        return _distinct([(stem[:-5] if strip else stem, (path,)) for stem, path in zip(stems, paths, strict=True)])
    groups: dict[tuple[Path, str], dict[int, Path]] = {}
    for stem, path in zip(stems, paths, strict=True):
        parts = re.fullmatch(r"(.+)_(\d{4})", stem)
        if parts is None or path.is_dir():
            raise DataError(
                f"{path}: the network reads {channels} channels, so files must be named like case_0000.nii.gz ... "
                f"case_{channels - 1:04d}.nii.gz; rename the file"
            )
        channel = groups.setdefault((path.parent, parts[1]), {})
        if channel.setdefault(int(parts[2]), path) is not path:
            raise DataError(f"{path} and {channel[int(parts[2])]} are the same channel of one case; remove one")
    for (_, name), found in groups.items():
        if sorted(found) != list(range(channels)):
            have = ", ".join(f"_{number:04d}" for number in sorted(found))
            raise DataError(f"case {name!r}: expected the channels _0000 to _{channels - 1:04d}, found {have}")
    return _distinct([(name, tuple(found[c] for c in range(channels))) for (_, name), found in groups.items()])


def _expand(entry: Path) -> list[Path]:
    if not entry.exists():
        raise DataError(f"there is no file or folder {entry}: check the path")
    if not entry.is_dir():
        if image_suffix(entry) is None:
            raise DataError(f"{entry}: expected a file that ends in {', '.join(SUFFIXES)}, or a folder")
        return [entry]
    visible = sorted(item for item in entry.iterdir() if not item.name.startswith("."))
    if files := [item for item in visible if item.is_file() and image_suffix(item)]:
        return files
    if series_in(entry):
        return [entry.resolve() if entry.name in {"", ".."} else entry]
    if folders := [item for item in visible if item.is_dir() and series_in(item)]:
        return folders
    raise DataError(f"{entry}: expected image files ({', '.join(SUFFIXES)}) or a DICOM series in it, found neither")


def _distinct(cases: list[tuple[str, tuple[Path, ...]]]) -> list[tuple[str, tuple[Path, ...]]]:
    seen: dict[str, Path] = {}
    for name, paths in cases:
        other = seen.setdefault(name.lower(), paths[0])
        if other is not paths[0]:
            raise DataError(f"two inputs give the case name {name!r}: {other} and {paths[0]}; rename one of them")
    return cases
