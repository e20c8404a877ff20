"""Labelled patches with a drawing of one of their structures, as a student would have drawn it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from scarceseg.data.sampling import Batch, made_ahead
from scarceseg.data.whole import Sampler
from scarceseg.functional.spoilt import COARSE_AND_FINE, spoilt_masks
from scarceseg.seeds import rng
from scarceseg.types import IGNORE_LABEL


class Drawings:
    """The labelled rows of another sampler, each about one foreground class it has, with that class's spoilt reference.

    The drawing is one more channel behind those of the image, so that whatever redraws it sees both; the label is 1 in the class
    and 0 elsewhere. A row without foreground is ignored altogether, and its drawing is empty.

    Args:
        inner: makes the batches.
        seed: of the draws, with which every batch is a pure function of its iteration.
    """

    def __init__(self, inner: Sampler, seed: int) -> None:
        self.inner, self.seed = inner, seed

    def batch(self, iteration: int) -> Batch:
        """Rows ``[L, C+1, X, Y, Z]`` with labels 0, 1 and 255."""
        labelled, _ = self.inner.batch(iteration)
        draw = rng(self.seed, "stage", 3, iteration)
        target = torch.zeros_like(labelled.label, dtype=torch.bool)
        for row, label in enumerate(labelled.label):
            there = [value for value in label.unique().tolist() if value not in (0, IGNORE_LABEL)]
            if there:
                target[row] = label == int(draw.choice(there))
        some = target.flatten(1).any(1)
        drawn = spoilt_masks(target, draw, COARSE_AND_FINE)
        lost = ~(drawn > 0.5).flatten(1).any(1)  # too little is left to ask about
        drawn = torch.where(lost[:, None, None, None, None], target[:, None].float(), drawn)
        drawn = drawn * some[:, None, None, None, None]
        known = (labelled.label != IGNORE_LABEL) & some[:, None, None, None]
        label = torch.where(known, target.long(), IGNORE_LABEL)
        return replace(labelled, image=torch.cat([labelled.image, drawn], 1), label=label), None

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches of the iterations ``start .. stop - 1``."""
        return made_ahead(self.batch, start, stop)
