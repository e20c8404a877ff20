"""Scans with a ball at a known place of the world, and a network that finds it by its brightness."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from torch import nn

from scarceseg.config import NetworkConfig
from scarceseg.data.plan import Normalisation, Plan
from scarceseg.inference.model import save_model
from scarceseg.networks import SegmentationNetwork

BRIGHT = 1000.0
THRESHOLD = 500.0


class Threshold(SegmentationNetwork):
    """Class 1 where the last channel is bright; the logits are graded, so that resampling has something to do."""

    def __init__(self, channels: int = 1, classes: int = 2) -> None:
        super().__init__()
        self.classes = classes
        self.slope = nn.Parameter(torch.tensor(0.01))

    @property
    def divisor(self) -> tuple[int, int, int]:
        return (1, 1, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        signal = self.slope * (image[:, -1:] - THRESHOLD)
        rest = [torch.full_like(signal, -30.0)] * (self.classes - 2)
        return torch.cat([torch.zeros_like(signal), signal, *rest], dim=1)


def plan(channels: int = 1, classes: int = 2, spacing: float = 1.0) -> Plan:
    names = ("background", "ball", "left/right part", "left right part")
    return Plan(
        dataset="scans",
        channels=("MR", "T2", "CT")[:channels],
        classes=names[:classes],
        file_ending=".nii.gz",
        spacing_mm=(spacing, spacing, spacing),
        patch=(16, 16, 16),
        normalisation=(Normalisation(kind="none"),) * channels,
        batch_labeled=2,
        batch_unlabeled=2,
        median_shape=(32, 32, 32),
        windows=(3, 3, 3),
        memory_estimate_mb=1.0,
    )


def save_threshold(run: Path, channels: int = 1, classes: int = 2, spacing: float = 1.0) -> Path:
    """A run folder with the network above; loading needs `build_network` to give a `Threshold`."""
    run.mkdir(exist_ok=True)
    made, extra = plan(channels, classes, spacing), {"augment": "all"}
    save_model(run, Threshold(channels, classes), NetworkConfig(name="threshold"), made, extra)
    return run


def rotation(seed: int) -> np.ndarray:
    """A right-handed direction matrix with no axis along an axis of the world; `seed` 0 is the identity."""
    if seed == 0:
        return np.eye(3)
    matrix, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return matrix * np.sign(np.linalg.det(matrix))


def scan(
    size: tuple[int, int, int] = (29, 37, 19),
    spacing: tuple[float, float, float] = (1.1, 0.8, 1.7),
    direction: np.ndarray | None = None,
    origin: tuple[float, float, float] = (-31.0, 12.5, 87.0),
    at: tuple[float, float, float] = (0.4, 0.6, 0.45),
    radius_mm: float = 6.0,
) -> tuple[sitk.Image, np.ndarray]:
    """An int16 image with a soft ball, and the ball's centre in the world.

    `at` is the place of the ball as a share of the size along each index axis. The brightness is 500 at `radius_mm`.
    """
    image = sitk.Image(size, sitk.sitkInt16)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection((np.eye(3) if direction is None else direction).ravel().tolist())
    centre = np.array(
        image.TransformContinuousIndexToPhysicalPoint([a * (s - 1) for a, s in zip(at, size, strict=True)])
    )
    index = np.stack(np.meshgrid(*[np.arange(n) for n in size], indexing="ij"), -1) * np.array(spacing)
    world = index @ np.array(image.GetDirection()).reshape(3, 3).T + np.array(origin)
    distance = np.linalg.norm(world - centre, axis=-1)
    values = BRIGHT * np.clip(0.5 + (radius_mm - distance) / 8, 0, 1)
    filled = sitk.GetImageFromArray(values.transpose(2, 1, 0).round().astype(np.int16))
    filled.CopyInformation(image)
    return filled, centre


def write_series(image: sitk.Image, folder: Path) -> None:
    """Write a DICOM series, one file a slice."""
    folder.mkdir(parents=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    matrix = np.array(image.GetDirection()).reshape(3, 3)
    orientation = "\\".join(f"{v:.10f}" for v in [*matrix[:, 0], *matrix[:, 1]])
    for number in range(image.GetSize()[2]):
        piece = image[:, :, number]
        position = image.TransformIndexToPhysicalPoint((0, 0, number))
        tags = {
            "0008|0008": "DERIVED\\SECONDARY",
            "0008|0018": f"1.2.826.0.1.3680043.2.1125.1.{number + 1}",
            "0008|0060": "MR",
            "0018|0050": f"{image.GetSpacing()[2]:.10f}",
            "0020|000d": "1.2.826.0.1.3680043.2.1125.2",
            "0020|000e": "1.2.826.0.1.3680043.2.1125.3",
            "0020|0013": str(number + 1),
            "0020|0032": "\\".join(f"{v:.10f}" for v in position),
            "0020|0037": orientation,
        }
        for key, value in tags.items():
            piece.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{number:03d}.dcm"))
        writer.Execute(piece)


def centroid(mask: sitk.Image) -> np.ndarray:
    """World position of the mean of the voxels of class 1, by SimpleITK's own arithmetic."""
    index = np.argwhere(sitk.GetArrayFromImage(mask) == 1).mean(0)[::-1]
    return np.array(mask.TransformContinuousIndexToPhysicalPoint([float(v) for v in index]))


def overlap(mask: np.ndarray, reference: np.ndarray) -> float:
    """Dice coefficient."""
    return 2.0 * float((mask & reference).sum()) / float(mask.sum() + reference.sum())
