"""Small volumes and datasets for the tests of this folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from scarceseg.config import Config
from scarceseg.data.dataset import Split, load_dataset, make_split
from scarceseg.data.images import write_image
from scarceseg.data.plan import Plan, fingerprint, make_plan
from scarceseg.types import Geometry

Array = NDArray[Any]

RAS = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)
OBLIQUE = tuple(Rotation.from_euler("xyz", [12, -17, 25], degrees=True).as_matrix().ravel().tolist())
SAGITTAL = (0.0, 0.0, -1.0, 1.0, 0.0, 0.0, 0.0, -1.0, 0.0)
"""Slices along the patient's left-right axis: axes permuted and partly reversed."""
TILTED = tuple(
    (Rotation.from_euler("xyz", [5, 8, -11], degrees=True).as_matrix() @ np.array(SAGITTAL).reshape(3, 3))
    .ravel()
    .tolist()
)


def grid(
    size: tuple[int, int, int] = (12, 11, 9),
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0),
    direction: tuple[float, ...] = RAS,
) -> Geometry:
    return Geometry(size, spacing_mm, origin, direction)


def smooth(size: tuple[int, ...], seed: int = 0, sigma: float = 1.5) -> NDArray[np.float32]:
    """Smooth noise of mean about 100."""
    noise = np.random.default_rng(seed).normal(size=size)
    return (100 + 200 * ndimage.gaussian_filter(noise, sigma, mode="nearest")).astype(np.float32)


def ball(size: tuple[int, int, int], radius: float) -> NDArray[np.uint8]:
    centre = (np.array(size) - 1) / 2
    distance = np.sqrt(sum((axis - c) ** 2 for axis, c in zip(np.indices(size), centre, strict=True)))
    return (distance <= radius).astype(np.uint8)


def write_facts(folder: Path, **changes: Any) -> None:
    facts: dict[str, Any] = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "organ": 1},
        "file_ending": ".nii.gz",
        "name": "Made",
    }
    (folder / "dataset.json").write_text(json.dumps({k: v for k, v in (facts | changes).items() if v is not None}))


def write_dataset(
    folder: Path,
    labelled: Sequence[str] = ("a", "b", "c"),
    unlabelled: Sequence[str] = ("d", "e"),
    geometry: Geometry | None = None,
    channels: int = 1,
    ending: str = ".nii.gz",
    labels: Mapping[str, int] | None = None,
) -> Path:
    """Write smooth noise as images and a ball as label of the labelled cases."""
    geometry = geometry or grid()
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    write_facts(
        folder,
        channel_names={str(c): f"channel {c}" for c in range(channels)},
        file_ending=ending,
        labels=dict(labels or {"background": 0, "organ": 1}),
    )
    for number, name in enumerate([*labelled, *unlabelled]):
        for channel in range(channels):
            image = smooth(geometry.size, seed=10 * number + channel)
            write_image(image, geometry, folder / "imagesTr" / f"{name}_{channel:04d}{ending}")
        if name in labelled:
            write_image(ball(geometry.size, 3.5), geometry, folder / "labelsTr" / f"{name}{ending}")
    return folder


def planned(folder: Path, labeled: int | list[str] | None = None, **plan: Any) -> tuple[Split, Plan]:
    """Split and plan of a dataset, for a network that divides by 4."""
    dataset = load_dataset(folder)
    split = make_split(dataset, labeled, [])
    config = Config.build({"method": "mean-teacher", "plan": plan})
    return split, make_plan(fingerprint(dataset, split), dataset, split, config, 4)


def write_dicom(folder: Path, array: Array, geometry: Geometry, uid: str = "1.2.3.4", skip: Sequence[int] = ()) -> None:
    """Write ``array [X, Y, Z]`` of int16 as one DICOM series, optionally without some slices."""
    folder.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T.astype(np.int16)))
    image.SetSpacing(geometry.spacing_mm)
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    direction = np.array(geometry.direction).reshape(3, 3)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for z in range(array.shape[2]):
        if z in skip:
            continue
        part = image[:, :, z]
        tags = {
            "0008|0060": "MR",
            "0020|000e": uid,
            "0020|000d": "1.2.3",
            "0008|0018": f"{uid}.{z}",
            "0020|0032": "\\".join(f"{v:.6f}" for v in image.TransformIndexToPhysicalPoint((0, 0, z))),
            "0020|0037": "\\".join(f"{v:.8f}" for v in direction[:, :2].T.ravel()),
            "0020|0013": str(z),
            "0018|0050": f"{geometry.spacing_mm[2]}",
        }
        for key, value in tags.items():
            part.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{uid.replace('.', '')}_{z:03d}.dcm"))
        writer.Execute(part)
