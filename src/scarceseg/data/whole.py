"""Batches for tuning a foundation model: whole volumes, patches with bent intensities, and several sources side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from scarceseg.data.augment import bend, contrast, curve_slices
from scarceseg.data.sampling import Batch, Source, made_ahead
from scarceseg.seeds import rng
from scarceseg.types import Labelled


class Sampler(Protocol):
    """What makes the batch of any iteration."""

    def batch(self, iteration: int) -> Batch:
        """Labelled rows, and unlabelled ones if any."""
        ...

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches of the iterations ``start .. stop - 1``."""
        ...


class WholeVolumes:
    """Whole labelled volumes on one common grid, bent a little and with another contrast each time.

    Cases are visited in a new random order per round. Every row is a pure function of (seed, row number).

    Args:
        sources: volumes with labels.
        size: voxels ``(X, Y, Z)`` of the common grid.
        rows: volumes in a batch.
        seed: of the draws.
        strength: of the bends; 0 neither bends nor changes the contrast.
        spacing_mm: of the volumes' voxels.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        size: tuple[int, int, int],
        rows: int,
        seed: int,
        strength: float = 1.0,
        spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        self.sources, self.size, self.rows, self.seed, self.strength = list(sources), size, rows, seed, strength
        self.spacing_mm = spacing_mm

    def batch(self, iteration: int) -> Batch:
        """Labelled rows of one iteration, as CPU tensors."""
        images, labels, names = [], [], []
        for number in range(iteration * self.rows, (iteration + 1) * self.rows):
            epoch, place = divmod(number, len(self.sources))
            source = self.sources[int(rng(self.seed, "stage", 0, epoch).permutation(len(self.sources))[place])]
            assert source.label is not None
            draw = rng(self.seed, "stage", 1, number)
            maps = np.asarray(source.image), np.asarray(source.label)
            image, label = bend(*maps, self.size, draw, self.strength, self.spacing_mm)
            images.append(torch.from_numpy(contrast(image, draw) if self.strength else image))
            labels.append(torch.from_numpy(label.astype(np.int64)))
            names.append(source.name)
        return Labelled(torch.stack(images), torch.stack(labels), tuple(names)), None

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches of the iterations ``start .. stop - 1``."""
        return made_ahead(self.batch, start, stop)


class CurvedSlices:
    """The batches of another sampler, every slice of a labelled image through an intensity curve of its own (SFR).

    Args:
        inner: makes the batches.
        seed: of the curves.
        axis: of the volume, 0 .. 2, that the slices are cut along.
    """

    def __init__(self, inner: Sampler, seed: int, axis: int = 2) -> None:
        self.inner, self.seed, self.axis = inner, seed, axis

    def batch(self, iteration: int) -> Batch:
        """The batch of one iteration."""
        labelled, unlabelled = self.inner.batch(iteration)
        draw = rng(self.seed, "stage", 2, iteration)
        images = labelled.image.transpose(2 + self.axis, 4)
        rows = [torch.from_numpy(curve_slices(image.numpy(), draw)) for image in images]
        return replace(labelled, image=torch.stack(rows).transpose(2 + self.axis, 4)), unlabelled

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches of the iterations ``start .. stop - 1``."""
        return made_ahead(self.batch, start, stop)


class SideBySide:
    """The labelled rows of several samplers in one batch, so that a large source does not drown a small one.

    Args:
        samplers: of rows with equal shapes.
    """

    def __init__(self, samplers: Sequence[Sampler]) -> None:
        self.samplers = list(samplers)

    def batch(self, iteration: int) -> Batch:
        """The batch of one iteration."""
        parts = [sampler.batch(iteration)[0] for sampler in self.samplers]
        image, label = (torch.cat([getattr(part, name) for part in parts]) for name in ("image", "label"))
        return Labelled(image, label, tuple(name for part in parts for name in part.case)), None

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches of the iterations ``start .. stop - 1``."""
        return made_ahead(self.batch, start, stop)
