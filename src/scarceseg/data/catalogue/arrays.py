"""Shared by the benchmarks that are published as arrays (HDF5 or NumPy): reading, checking, renaming, writing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from numpy.typing import NDArray
from pydantic import field_validator

from scarceseg.config import Section
from scarceseg.data.catalogue.base import PublicDataset
from scarceseg.data.geometry import CANONICAL_DIRECTION
from scarceseg.data.images import write_image
from scarceseg.errors import DataError
from scarceseg.types import Geometry

Array = NDArray[Any]
Spacing = tuple[float, float, float]
Role = Literal["train", "val", "test"]


class SpacingOptions(Section):
    """`spacing_mm`: voxel spacing to write, one number or three, since the published arrays do not hold it."""

    spacing_mm: Spacing = (1.0, 1.0, 1.0)

    @field_validator("spacing_mm", mode="before")
    @classmethod
    def _isotropic(cls, value: Any) -> Any:
        return (value, value, value) if isinstance(value, int | float) else value

    @field_validator("spacing_mm")
    @classmethod
    def _in_range(cls, value: Spacing) -> Spacing:
        if not all(0.01 <= v <= 100 for v in value):
            raise ValueError("expected 0.01 to 100 mm on each axis")
        return value


@dataclass(frozen=True)
class ArrayCase:
    """One case of the published files: its name there, the files it is in, and how to read image and label."""

    name: str
    role: Role
    files: tuple[Path, ...]
    read: Callable[[], tuple[Array, Array]]


def h5_case(name: str, role: Role, path: Path) -> ArrayCase:
    """A case in one HDF5 file with the keys ``image`` and ``label``, axes as stored."""
    return ArrayCase(name, role, (path,), lambda: _read_h5(path))


def npy_case(name: str, role: Role, image: Path, label: Path) -> ArrayCase:
    """A case in two NumPy files of axes ``[Z, Y, X]``."""
    return ArrayCase(name, role, (image, label), lambda: (_read_npy(image).T, _read_npy(label).T))


def read_list(path: Path) -> list[str]:
    """Names in a list file, one a line (up to a comma), in its order.

    Raises:
        DataError: unreadable, empty, or with a name twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the list {path}: {error}") from None
    names = [name for line in lines if (name := line.split(",")[0].strip())]
    if not names or len(set(names)) != len(names):
        raise DataError(
            f"{path}: expected one different case name a line, got {len(names)} of which {len(set(names))} differ"
        )
    return names


def first_folder(candidates: Iterable[Path], *needed: str) -> Path | None:
    """The first folder that holds every one of the needed files or folders."""
    return next((folder for folder in candidates if all((folder / name).exists() for name in needed)), None)


def write_cases(
    dataset: PublicDataset, src: Path, out: Path, cases: Sequence[ArrayCase], prefix: str, spacing_mm: Spacing
) -> None:
    """Write all cases and the JSON files.

    Training cases become ``PREFIX_000`` ... in the given order. Validation cases, ``PREFIX_val_000`` ..., lie beside
    them and come after them by name; test cases, ``PREFIX_test_000`` ..., go to ``imagesTs`` and ``labelsTs``.
    Intensities are kept as float32. Axes are taken as those of the volume's own index, running to the patient's right,
    front and head, since the published arrays do not tell.

    Raises:
        DataError: files are missing or are not arrays of a case.
    """
    absent = [path for case in cases for path in case.files if not path.is_file()]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise dataset.missing(src, f"there is no {absent[0]}{more}")
    counts: dict[Role, int] = {"train": 0, "val": 0, "test": 0}
    names = {}
    for case in cases:
        infix = "" if case.role == "train" else f"{case.role}_"
        name = f"{prefix}_{infix}{counts[case.role]:03d}"
        counts[case.role] += 1
        names[name] = case.name
        image, label = _checked(case, dataset.classes)
        geometry = Geometry(
            (image.shape[0], image.shape[1], image.shape[2]), spacing_mm, (0, 0, 0), CANONICAL_DIRECTION
        )
        part = "Ts" if case.role == "test" else "Tr"
        for folder, array, file in ((f"images{part}", image, f"{name}_0000"), (f"labels{part}", label, name)):
            (out / folder).mkdir(exist_ok=True)
            write_image(array, geometry, out / folder / f"{file}.nii.gz")
    dataset.write_json(out, counts["train"] + counts["val"], names)


def _checked(case: ArrayCase, classes: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    image, label = case.read()
    where = case.files[0]
    if image.ndim != 3 or image.shape != label.shape:
        raise DataError(f"{where}: expected image and label of one 3D shape, got {image.shape} and {label.shape}")
    if not np.issubdtype(image.dtype, np.number) or not np.isfinite(image).all():
        raise DataError(f"{where}: expected finite numbers in the image, got {image.dtype} with NaN or infinite values")
    unknown = [value for value in np.unique(label).tolist() if value not in range(len(classes))]
    if unknown:
        raise DataError(
            f"{where}: expected the labels 0 to {len(classes) - 1} ({', '.join(classes)}), found also {unknown[:5]}; "
            "these are not the files of this benchmark"
        )
    return image.astype(np.float32), label.astype(np.uint8)


def _read_h5(path: Path) -> tuple[Array, Array]:
    try:
        with h5py.File(path, "r") as file:
            missing = {"image", "label"} - set(file.keys())
            if missing:
                raise DataError(
                    f"{path}: expected the keys image and label, got {', '.join(sorted(file.keys())) or 'none'}"
                )
            return np.asarray(file["image"]), np.asarray(file["label"])
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise DataError(f"cannot read {path}: it is damaged or no HDF5 file ({error}); fetch it again") from None


def _read_npy(path: Path) -> Array:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot read {path}: it is damaged or no NumPy file ({error}); fetch it again") from None
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: expected one array, got an archive of several")
    return array
