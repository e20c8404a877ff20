"""Warped masks of several atlases -> one probability per class, and how far the atlases agree."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from scipy import ndimage

from scarceseg.errors import ConfigError
from scarceseg.types import LabelMap

Array = NDArray[np.float32]

FLAT = 1e-3
"""Added to variances in a window, of intensities of unit variance: what varies less counts as flat."""


class Fusion(BaseModel):
    """How atlases are weighed.

    Attributes:
        kind: "mean" of the probabilities; "majority" of the atlases' own labels; "local" weighs each atlas at each
            voxel by its similarity to the image there; "joint" also takes into account which atlases err together.
        window: side of the cube in which images are compared, voxels, odd.
        power: of the local correlation in "local"; of the expected errors in "joint" (1 is the published 2 halved).
        ridge: added to the diagonal in "joint", relative to the mean error.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["mean", "majority", "local", "joint"] = "local"
    window: int = Field(5, ge=1)
    power: float = Field(4.0, gt=0)
    ridge: float = Field(0.1, gt=0)


def fuse(probabilities: Iterable[Array], warped_images: Array, image: Array, how: Fusion) -> tuple[Array, Array]:
    """Fuse atlases voxel by voxel.

    Args:
        probabilities: ``[A, K, X, Y, Z]``, or anything that gives ``[K, X, Y, Z]`` of one atlas after the other; they
            are not kept, so that many classes need the memory of two atlases only.
        warped_images: ``[A, C, X, Y, Z]``, the atlases' images on the same grid.
        image: ``[C, X, Y, Z]`` of the volume to label.
        how: weights.

    Returns:
        ``[K, X, Y, Z]`` float32 that sums to one over K, and the agreement ``[X, Y, Z]`` in [0, 1]: the weight of the
        atlases whose own label is the fused one. Of a single atlas it is the local similarity of the two images.

    Raises:
        ConfigError: shapes that do not fit each other.
    """
    if warped_images.ndim != 5 or not len(warped_images) or warped_images.shape[1:] != image.shape:
        raise ConfigError(
            "fusion: expected warped images [A, C, X, Y, Z] on the grid of the image [C, X, Y, Z], got "
            f"{warped_images.shape} and {image.shape}"
        )
    weights = fusion_weights(warped_images, image, how)
    fused, own = _add_up(probabilities, weights, how.kind == "majority")
    fused /= fused.sum(0, keepdims=True)
    if len(own) == 1:
        return fused, local_correlation(warped_images[0], image, how.window)
    winner = fused.argmax(0)
    agreement = np.zeros(winner.shape, dtype=np.float32)
    for weight, label in zip(weights, own, strict=True):
        agreement += weight * (label == winner)
    return fused, np.clip(agreement, 0, 1)


def _add_up(probabilities: Iterable[Array], weights: Array, vote: bool) -> tuple[Array, list[LabelMap]]:
    """Weighted sum over atlases, ``[K, X, Y, Z]``, and every atlas's own label."""
    fused, own = np.zeros(0, dtype=np.float32), []
    for number, one in enumerate(probabilities):
        if one.shape[1:] != weights.shape[1:] or number == len(weights):
            raise ConfigError(
                f"fusion: expected probabilities [K, {', '.join(map(str, weights.shape[1:]))}] of {len(weights)} "
                f"atlases, got {one.shape} for number {number + 1}"
            )
        own.append(one.argmax(0).astype(np.uint8))
        if vote:
            one = (own[-1] == np.arange(len(one))[:, None, None, None]).astype(np.float32)
        fused = weights[number] * one if number == 0 else fused + weights[number] * one
    if len(own) != len(weights):
        raise ConfigError(f"fusion: expected probabilities of {len(weights)} atlases, got {len(own)}")
    return fused, own


def fusion_weights(warped_images: Array, image: Array, how: Fusion) -> Array:
    """Weight of each atlas at each voxel, ``[A, X, Y, Z]``, non-negative with sum one over A."""
    count = len(warped_images)
    if count == 1 or how.kind in ("mean", "majority"):
        return np.full((count, *image.shape[1:]), 1 / count, dtype=np.float32)
    if how.kind == "local":
        weights = np.stack([local_correlation(warped, image, how.window) for warped in warped_images]) ** how.power
        weights += np.float32(1e-6)
    else:
        weights = _joint(warped_images, image, how)
    return weights / weights.sum(0, keepdims=True)


def local_correlation(first: Array, second: Array, window: int) -> Array:
    """Correlation coefficient of two images in a cube around every voxel, negative values cut to 0.

    Where both images are flat it is 1, where only one of them is, nearly 0 (see `FLAT`). Several channels: their mean.

    Args:
        first, second: ``[C, X, Y, Z]``.
        window: side of the cube, voxels.

    Returns:
        ``[X, Y, Z]`` in [0, 1].
    """
    total = np.zeros(first.shape[1:], dtype=np.float64)
    for a, b in zip(first, second, strict=True):
        a, b = _standard(a), _standard(b)
        covariance = _mean(a * b, window) - _mean(a, window) * _mean(b, window)
        spread = [np.maximum(_mean(v * v, window) - _mean(v, window) ** 2, 0) + FLAT for v in (a, b)]
        total += (covariance + FLAT) / np.sqrt(spread[0] * spread[1])
    return np.clip(total / len(first), 0, 1).astype(np.float32)


def _joint(warped_images: Array, image: Array, how: Fusion) -> Array:
    """Joint label fusion (Wang et al. 2013, eq. 8 and 12): ``w = M^-1 1``, with the errors two atlases make together."""
    count = len(warped_images)
    errors = [
        np.stack([np.abs(_locally(a, how.window) - _locally(b, how.window)) for a, b in zip(w, image, strict=True)])
        for w in warped_images
    ]
    together = np.empty((*image.shape[1:], count, count))
    for i in range(count):
        for j in range(i + 1):
            value = sum(_mean(a * b, how.window) for a, b in zip(errors[i], errors[j], strict=True)) / len(image)
            together[..., i, j] = together[..., j, i] = np.maximum(value, 0) ** how.power
    level = np.einsum("...ii->...", together)[..., None, None] / count
    together = together / np.maximum(level, 1e-12) + how.ridge * np.eye(count)
    weights = np.linalg.solve(together, np.ones((*together.shape[:-1], 1)))[..., 0]
    return np.maximum(np.moveaxis(weights, -1, 0), 0).astype(np.float32) + np.float32(1e-6)


def _locally(channel: Array, window: int) -> NDArray[np.float64]:
    values = _standard(channel)
    mean = _mean(values, window)
    return (values - mean) / np.sqrt(np.maximum(_mean(values * values, window) - mean**2, 0) + FLAT)


def _standard(channel: Array) -> NDArray[np.float64]:
    values = channel.astype(np.float64)
    values -= values.mean()
    spread = values.std()
    return values / spread if spread > 0 else values


def _mean(values: NDArray[Any], window: int) -> NDArray[np.float64]:
    return ndimage.uniform_filter(values, window, mode="nearest")
