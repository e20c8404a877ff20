"""Test-time augmentation: the mean prediction over the ways in which training has turned and flipped its patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from scarceseg.errors import ConfigError
from scarceseg.types import Augment, ImageBatch, Logits


class MeanOverOrientations(nn.Module):
    """A network asked about every orientation that training has drawn, its answers turned back and averaged. (ours)

    The mean of the class probabilities comes out as their logarithm, which a softmax turns into the mean again.

    Args:
        network: ``[B, C, X, Y, Z]`` to logits ``[B, K, X, Y, Z]``.
        augment: what the network was trained with.
        square: whether X and Y of the training patches were equal, so that quarter turns were drawn.

    Raises:
        ConfigError: it was trained in one orientation.
    """

    def __init__(self, network: nn.Module, augment: Augment, square: bool) -> None:
        super().__init__()
        if augment not in ("all", "reflections"):
            raise ConfigError(
                f"this network was trained without turns and flips (augment: {augment}), so there is nothing to average: "
                "predict without 'tta'"
            )
        self.network = network
        self.orientations = orientations(augment, square)

    def forward(self, image: ImageBatch) -> Logits:
        """Logarithm of the mean probability, float32."""
        total: torch.Tensor | None = None
        for turns, flipped in self.orientations:
            seen = torch.rot90(image, turns, (2, 3))
            logits = self.network(seen.flip(2) if flipped else seen).float()
            answer = torch.rot90(logits.flip(2) if flipped else logits, -turns, (2, 3)).softmax(1)
            total = answer if total is None else total + answer
        assert total is not None
        return (total / len(self.orientations)).clamp_min(torch.finfo(torch.float32).tiny).log()


def orientations(augment: Augment, square: bool) -> Sequence[tuple[int, bool]]:
    """Quarter turns in the plane of X and Y, and whether X is flipped afterwards, of every orientation in training."""
    flips = (False, True) if augment == "all" else (True,)
    return [(quarter, flipped) for flipped in flips for quarter in ((0, 1, 2, 3) if square else (0, 2))]
