"""How good a frozen model's masks prove to be where the reference is known."""

from __future__ import annotations

import torch
from torch import nn

from scarceseg.types import IGNORE_LABEL


class ProvenMasks(nn.Module):
    """Soft Dice of the masks that the model drew of each foreground class on labelled rows, over about the last 10 looks. (ours)

    The student prompts there as it does on unlabelled rows, so that what counts is the model with such prompts on such images.

    Args:
        count: of foreground classes.
    """

    KEPT = 0.9
    """Share of the sums that is kept from one look at a class to the next."""
    sums: torch.Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(3, count))

    def see(self, masks: torch.Tensor, asked: torch.Tensor, label: torch.Tensor) -> None:
        """Take labelled rows in.

        Args:
            masks: the model's probabilities ``[L, K-1, X, Y, Z]``.
            asked: ``[L, K-1]`` bool; other masks do not count.
            label: the reference ``[L, X, Y, Z]``.
        """
        truth = torch.stack([label == value for value in range(1, masks.shape[1] + 1)], 1).to(masks)
        inside = (label != IGNORE_LABEL)[:, None] * asked[:, :, None, None, None]
        new = torch.stack([x.sum((0, 2, 3, 4)) for x in (masks * truth * inside, masks * inside, truth * inside)])
        self.sums = torch.where(asked.any(0), self.KEPT * self.sums + new, self.sums)

    def dice(self) -> torch.Tensor:
        """``[K-1]`` in [0, 1]; 0 for a class that has not been asked for."""
        overlap, found, there = self.sums
        return 2 * overlap / (found + there).clamp_min(1e-8)
