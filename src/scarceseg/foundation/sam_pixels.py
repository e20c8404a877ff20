"""Intensities of volumes -> pixels a 2D SAM knows."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from scarceseg.errors import DataError
from scarceseg.foundation.sam import normalise_pixels
from scarceseg.types import ImageBatch

Normalise = Literal["sam", "minmax", "zscore"]
"""``sam``: 0..255, then SAM's own pixel mean and deviation. ``minmax``: 0..1 (MedSAM). ``zscore``: mean 0, deviation 1 (SFR)."""

LOW, HIGH = 0.005, 0.995


def unit_range(image: ImageBatch) -> ImageBatch:
    """Each channel of each volume between its percentiles 0.5 and 99.5 -> [0, 1]; what lies beyond is cut.

    A constant channel becomes 0. Any positive affine change of the intensities gives the same result.

    Args:
        image: ``[B, C, X, Y, Z]``.
    """
    flat = image.flatten(2)
    count = flat.shape[2]
    # Order statistics and not torch.quantile, which refuses more than 16 million voxels.
    low, high = (flat.kthvalue(1 + round(q * (count - 1)), dim=2).values[..., None] for q in (LOW, HIGH))
    width = torch.where(high > low, high - low, 1)
    return ((flat - low) / width).clamp(0, 1).mul(high > low).view_as(image)


def standard(image: ImageBatch) -> ImageBatch:
    """Each channel of each volume with mean 0 and deviation 1; a constant one becomes 0."""
    spread, mean = torch.std_mean(image, dim=(2, 3, 4), keepdim=True, correction=0)
    return (image - mean) / torch.where(spread > 0, spread, 1)


def three_channels(image: ImageBatch, wanted: int) -> ImageBatch:
    """One channel is repeated; of two, (a, b, mean of both) is made; as many as the model takes stay as they are.

    Raises:
        DataError: another number of channels.
    """
    channels = image.shape[1]
    if channels == wanted:
        return image
    if channels == 1:
        return image.expand(-1, wanted, -1, -1, -1)
    if channels == 2 and wanted == 3:
        return torch.cat([image, image.mean(dim=1, keepdim=True)], dim=1)
    raise DataError(f"a SAM takes 1, 2 or {wanted} channels, got {channels}: choose among the channels of the image")


def to_pixels(image: ImageBatch, normalise: Normalise, wanted: int) -> ImageBatch:
    """Volumes ``[B, C, X, Y, Z]`` in any affine scale -> ``[B, 3, X, Y, Z]`` in the scale the network was trained with.

    Raises:
        DataError: a number of channels the model cannot take.
    """
    # Each channel is scaled by itself before two of them are averaged.
    whole = three_channels(standard(image) if normalise == "zscore" else unit_range(image), wanted)
    if normalise == "sam":
        return normalise_pixels(whole.mul(255).flatten(3)).view_as(whole)
    return whole


def fit_image(slices: torch.Tensor, shown: tuple[int, int], image_size: int) -> torch.Tensor:
    """Slices ``[N, 3, rows, columns]`` scaled to `shown`, with zeros to S x S at the right and at the bottom."""
    if slices.shape[-2:] != shown:
        slices = F.interpolate(slices, size=shown, mode="bilinear", align_corners=False, antialias=True)
    return F.pad(slices, (0, image_size - shown[1], 0, image_size - shown[0]))
