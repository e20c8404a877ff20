"""What the student knows of each class, for a mask of one class not to take the place of another."""

from __future__ import annotations

import torch
from torch import nn

from scarceseg.functional.reliability import rise
from scarceseg.types import IGNORE_LABEL


class KnownClasses(nn.Module):
    """How well the student knows each foreground class, so that no mask covers a neighbour that nobody asks for yet.

    What is known of a class is its soft Dice on labelled rows over about the last 20 steps that had it.

    Args:
        beside: of `scarceseg.functional.surroundings.surroundings`, ``[K-1, K-1]``.
    """

    KEPT = 0.95
    """Share of the sums that is kept from one step with a class to the next."""
    NEAR = (0.05, 0.25)
    """Share in the surroundings of another class below which masks do not concern that one, and from which on they do."""
    sums: torch.Tensor
    beside: torch.Tensor

    def __init__(self, beside: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(3, len(beside)))
        self.register_buffer("beside", beside, persistent=False)

    def see(self, foreground: torch.Tensor, label: torch.Tensor) -> None:
        """Take labelled rows in: the student's probabilities ``[L, K-1, X, Y, Z]`` and the reference ``[L, X, Y, Z]``."""
        truth = torch.stack([label == value for value in range(1, foreground.shape[1] + 1)], 1).to(foreground)
        inside = (label != IGNORE_LABEL)[:, None]
        new = torch.stack([x.sum((0, 2, 3, 4)) for x in (foreground * truth, foreground * inside, truth)])
        self.sums = torch.where(new[2] > 0, self.KEPT * self.sums + new, self.sums)

    def dice(self) -> torch.Tensor:
        """``[K-1]`` in [0, 1]; 1 for a class that no labelled row has had yet, which nobody can wait for."""
        overlap, found, there = self.sums
        return torch.where(there > 0, 2 * overlap / (found + there).clamp_min(1e-8), 1.0)

    def neighbours(self, low: float, high: float) -> torch.Tensor:
        """``[K-1]``: how far the masks of each class may count, for the least known of the classes that it lies around (ours).

        0 while a class of which it is a good part of the surroundings has a Dice up to `low`; 1 when all such have `high`.
        """
        known = rise(self.dice(), low, high)[:, None]
        apart = 1 - rise(self.beside, *self.NEAR)
        return torch.maximum(known.expand_as(apart), apart).amin(0)
