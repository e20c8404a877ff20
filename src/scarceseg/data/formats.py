"""Files and DICOM folders -> SimpleITK images, with the checks that the library does not make."""

from __future__ import annotations

import glob
import gzip
import math
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import nibabel
import numpy as np
import SimpleITK as sitk

from scarceseg.errors import DataError

SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
"""File endings that are read. A folder is read as a DICOM series."""

SPACING_RANGE_MM = (0.01, 100.0)

# The library prints its doubts about a file on stderr; every one that matters is raised here as an error.
sitk.ProcessObject.SetGlobalWarningDisplay(False)


def image_suffix(path: Path) -> str | None:
    """The ending of `path` among `SUFFIXES` (``.nii.gz`` as one), or None when it is not an image we read."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix) and len(name) > len(suffix)), None)


def detached(path: Path) -> list[Path]:
    """The files a header of its own (``.mhd``, ``.nhdr``) names for the voxels, as far as they are there; else none."""
    if image_suffix(path) not in {".mhd", ".nhdr"}:
        return []
    try:
        with path.open(encoding="latin-1") as file:
            lines = file.read(1 << 16).splitlines()
    except OSError:
        return []
    for number, line in enumerate(lines):
        if named := re.match(r"\s*(?:ElementDataFile\s*=|data ?file:)\s*(.*)", line):
            word = named[1].split()[0] if named[1].split() else ""
            names = lines[number + 1 :] if word == "LIST" else [named[1]]
            # "slice%03d.raw 1 80 1" stands for a row of files
            row = path.parent / word
            parts = [glob.escape(part) for part in re.split(r"%\d*d", row.name)]
            found = sorted(row.parent.glob("*".join(parts))) if len(parts) > 1 else []
            return found + [one for name in names if name.strip() and (one := path.parent / name.strip()).is_file()]
    return []


def read_file(path: Path) -> sitk.Image:
    """Read one file of any size and pixel type.

    Raises:
        DataError: truncated, damaged, not an image, or a NIfTI header without a usable spacing.
    """
    if image_suffix(path) in {".nii", ".nii.gz"}:
        check_nifti(path)
    try:
        return sitk.ReadImage(str(path))
    except RuntimeError as error:
        if "orthonormal" in str(error):
            raise skewed(path) from None
        raise DataError(
            f"cannot read {path}: it is truncated, damaged or not an image of its file ending "
            f"({reason(error)}); restore or export it again"
        ) from None


def skewed(path: Path) -> DataError:
    """The error for a grid whose axes are not at right angles."""
    return DataError(f"{path}: expected axes at right angles, got a skewed grid; resample it to a regular grid")


def check_nifti(path: Path) -> None:
    """Look at header, length and values ourselves.

    ITK reads a cut file as zeros, replaces a spacing of zero by one, and NaN or infinite voxels by zero.

    Raises:
        DataError: fewer bytes than the header promises, no NIfTI header, a spacing that is not above zero, or voxels
            that are not finite.
    """
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            block = file.read(540)
            header = _nifti_header(block)
            length, bad = _scan(file, block, header)
        voxels = math.prod(int(n) for n in header["dim"][1 : 1 + int(header["dim"][0])])
        expected = int(header["vox_offset"]) + voxels * int(header["bitpix"]) // 8
    except (EOFError, zlib.error, OSError, ValueError, OverflowError, KeyError) as error:
        raise DataError(
            f"cannot read {path}: it is truncated, damaged or not a NIfTI file ({reason(error)}); "
            "restore or export it again"
        ) from None
    if bad and length >= expected:
        raise not_finite(path, bad, voxels)
    if length < expected:
        raise DataError(
            f"cannot read {path}: it is truncated, expected {expected} bytes and got {length}; "
            "restore or export it again"
        )
    spacing = [float(value) for value in header["pixdim"][1:4]]
    if not all(math.isfinite(value) and value > 0 for value in spacing):
        raise _spacing_error(path, spacing)


def not_finite(path: Path, bad: int, voxels: int) -> DataError:
    """The error for voxels that hold no number."""
    return DataError(
        f"{path}: expected finite values, got {bad} NaN or infinite voxels of {voxels}; "
        "replace them, for instance by the background value"
    )


def _scan(file: IO[bytes] | gzip.GzipFile, block: bytes, header: Any) -> tuple[int, int]:
    """Bytes of a NIfTI file, and how many of its voxels are not finite; `block` is what has been read of it."""
    kind = header.get_data_dtype()
    length, bad = len(block), 0
    rest = block[max(int(header["vox_offset"]), 0) :]
    while chunk := file.read(1 << 20):
        skipped = max(int(header["vox_offset"]) - length, 0)
        length += len(chunk)
        if np.issubdtype(kind, np.floating):
            rest += chunk[skipped:]
            whole = len(rest) - len(rest) % kind.itemsize
            bad += whole // kind.itemsize - int(np.count_nonzero(np.isfinite(np.frombuffer(rest[:whole], kind))))
            rest = rest[whole:]
    if np.issubdtype(kind, np.floating) and len(rest) >= kind.itemsize:  # a file no longer than the first block
        values = np.frombuffer(rest[: len(rest) - len(rest) % kind.itemsize], kind)
        bad += values.size - int(np.count_nonzero(np.isfinite(values)))
    return length, bad


def _nifti_header(block: bytes) -> Any:
    for kind in (nibabel.Nifti1Header, nibabel.Nifti2Header):
        size = kind.sizeof_hdr
        if len(block) >= size and size in (int.from_bytes(block[:4], "little"), int.from_bytes(block[:4], "big")):
            return kind(block[:size], check=False)  # a check would mend the header in silence
    raise ValueError("no NIfTI header")


def check_spacing(path: Path, spacing_mm: Sequence[float]) -> None:
    """Refuse spacings outside `SPACING_RANGE_MM`.

    Raises:
        DataError: one axis is.
    """
    low, high = SPACING_RANGE_MM
    if not all(low <= value <= high for value in spacing_mm):
        raise _spacing_error(path, spacing_mm)


def _spacing_error(path: Path, spacing_mm: Sequence[float]) -> DataError:
    low, high = SPACING_RANGE_MM
    shown = ", ".join(f"{value:g}" for value in spacing_mm)
    return DataError(
        f"{path}: expected a voxel spacing of {low:g} to {high:g} mm on each axis, got ({shown}); "
        "correct the spacing in the file's header"
    )


def series_in(folder: Path) -> tuple[str, ...]:
    """Identifiers of the DICOM series in a folder, without its subfolders."""
    return tuple(sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)))


def read_series(folder: Path, series: str | None) -> sitk.Image:
    """Read the DICOM series of a folder, or the one chosen by its identifier.

    Raises:
        DataError: no series, several and none chosen, unreadable, or slices that do not fill a regular grid.
    """
    found = series_in(folder)
    if not found:
        raise DataError(f"{folder}: expected a folder with one DICOM series, found no DICOM image; check the path")
    if series is None and len(found) > 1:
        raise DataError(
            f"{folder}: expected one DICOM series, found {len(found)}: {', '.join(found)}; "
            "keep one series a folder, or choose one by its identifier"
        )
    if series is not None and series not in found:
        raise DataError(f"{folder}: there is no series {series!r}; found {', '.join(found)}")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series or found[0]))
    reader.MetaDataDictionaryArrayUpdateOn()
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise DataError(f"cannot read the DICOM series in {folder} ({reason(error)}); export it again") from None
    _check_slices(reader, image, folder)
    return image


def _check_slices(reader: sitk.ImageSeriesReader, image: sitk.Image, folder: Path) -> None:
    """Refuse slices that do not fill a regular grid: the reader would place them as if they did."""
    count = len(reader.GetFileNames())
    key = "0020|0032"  # Image Position (Patient)
    if image.GetDimension() != 3 or count < 2 or not all(reader.HasMetaDataKey(i, key) for i in range(count)):
        return
    position = np.array([[float(v) for v in reader.GetMetaData(i, key).split("\\")] for i in range(count)])
    step = np.array(image.GetDirection()).reshape(3, 3)[:, 2] * image.GetSpacing()[2]
    error_mm = np.abs(np.diff(position, axis=0) - step).max()
    if error_mm > 0.1 * image.GetSpacing()[2]:
        raise DataError(
            f"{folder}: expected evenly spaced slices at right angles to the stack, but slices are missing, doubled, "
            f"uneven or tilted (up to {error_mm:.2f} mm off); complete the series or resample it to a regular grid"
        )


def reason(error: Exception) -> str:
    """The one line of a library's error that says what is wrong."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = next((line for line in lines if "ERROR:" in line), lines[-1] if lines else "no reason given")
    return re.sub(r"^.*?ERROR:\s*|\w+\(0x[0-9a-f]+\):\s*", "", text).rstrip(":. ")
