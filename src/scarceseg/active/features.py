"""What a volume looks like, as a row of numbers in which near means alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scarceseg.networks.base import EncoderDecoder, SegmentationNetwork
from scarceseg.types import ImageBatch, LabelMap, Logits, Volume

PERCENTILES = (5, 25, 50, 75, 95)

Floats = NDArray[np.float64]


class Watched(SegmentationNetwork):
    """A network that keeps the mean of its coarsest encoder features over everything it has seen since `reset`.

    The features of the layer before the classifier are what core-sets (Sener and Savarese, ICLR 2018) measure distance in; of
    an encoder-decoder that is the bottleneck, averaged over space as for a global pooling.

    Args:
        network: shared, not copied.
    """

    def __init__(self, network: SegmentationNetwork) -> None:
        super().__init__()
        self.network = network
        self.reset()

    @property
    def divisor(self) -> tuple[int, int, int]:
        """As of the network."""
        return self.network.divisor

    def reset(self) -> None:
        """Forget what was seen."""
        self._sum: torch.Tensor | None = None
        self._rows = 0

    def forward(self, image: ImageBatch) -> Logits:
        """The network's logits."""
        if not isinstance(self.network, EncoderDecoder):
            return self.network(image)
        features = self.network.encode(image)
        mean = features[-1].float().mean(dim=(2, 3, 4)).sum(0)
        self._sum = mean if self._sum is None else self._sum + mean
        self._rows += len(image)
        return self.network.decode(features)

    def features(self) -> NDArray[np.float32] | None:
        """Mean over all windows, one value a channel; None for a network that does not show its encoder."""
        return None if self._sum is None else (self._sum / self._rows).cpu().numpy().astype(np.float32)


def volume_statistics(image: Volume, label: LabelMap, spacing_mm: Sequence[float], classes: int) -> NDArray[np.float32]:
    """Intensity and shape in place of features: for networks that do not show any.

    Args:
        image: ``[C, X, Y, Z]``, prepared.
        label: the student's classes ``[X, Y, Z]``.
        spacing_mm: of both.
        classes: K.

    Returns:
        For each channel mean, deviation and five percentiles; the sides of the volume in mm; for each foreground class the
        log of 1 + its volume in ml and the sides of its bounding box in mm. Units differ: see `standardised`.
    """
    spacing = np.asarray(spacing_mm, dtype=np.float64)
    values: list[float] = []
    for channel in image:
        values += [channel.mean(dtype=np.float64), channel.std(dtype=np.float64), *np.percentile(channel, PERCENTILES)]
    values += list(label.shape * spacing)
    for index in range(1, classes):
        inside = np.argwhere(label == index)
        values.append(np.log1p(len(inside) * spacing.prod() / 1000))
        values += list((np.ptp(inside, axis=0) + 1) * spacing) if len(inside) else [0.0] * 3
    return np.asarray(values, dtype=np.float32)


def standardised(rows: NDArray[np.floating[Any]]) -> Floats:
    """Columns with mean 0 and deviation 1; one that does not vary becomes 0."""
    values = rows.astype(np.float64)
    spread = values.std(0)
    flat = spread <= 1e-6 * np.abs(values).max(0, initial=1e-12)
    return np.where(flat, 0.0, (values - values.mean(0)) / np.where(flat, 1.0, spread))
