"""Small steps and networks whose output is known beforehand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from scarceseg.networks.base import EncoderDecoder
from scarceseg.types import Labelled, Step, Unlabelled

SIZE = (4, 3, 5)


class Scripted(nn.Module):
    """Returns prepared outputs, one after the other, and keeps what it was called with."""

    def __init__(self, outputs: list[torch.Tensor]) -> None:
        super().__init__()
        self.outputs = list(outputs)
        self.seen: list[torch.Tensor | list[torch.Tensor]] = []

    def forward(self, x: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        self.seen.append(x)
        return self.outputs.pop(0)


class Pointwise(EncoderDecoder):
    """Logits of a voxel depend on that voxel alone, so that cutting and swapping cannot change them."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.out = nn.Conv3d(channels, classes, 1)

    @property
    def divisor(self) -> tuple[int, int, int]:
        return (2, 2, 2)

    def encode(self, image: torch.Tensor) -> list[torch.Tensor]:
        self.check_size(image)
        return [image, F.avg_pool3d(image, 2)]

    def decode_stages(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        return [features[0]]

    def head(self, features: torch.Tensor) -> torch.Tensor:
        return self.out(features)


def random_step(classes: int, size: tuple[int, int, int] = SIZE, channels: int = 1, seed: int = 0) -> Step:
    """One labelled row (with ignored voxels) and two unlabelled ones, with random logits."""
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(0, classes, (1, *size), generator=g)
    label[0, 0, 0] = 255
    return Step(
        iteration=30,
        total=100,
        labelled=Labelled(torch.randn(1, channels, *size, generator=g), label, ("a",)),
        unlabelled=Unlabelled(torch.randn(2, channels, *size, generator=g), ("b", "c")),
        logits_l=torch.randn(1, classes, *size, generator=g),
        logits_u=torch.randn(2, classes, *size, generator=g),
        generator=torch.Generator().manual_seed(seed + 1),
    )


def random_features(
    channels: int, size: tuple[int, int, int], levels: int, seed: int = 2
) -> dict[str, list[torch.Tensor]]:
    """Positive features of both kinds of rows, halved from level to level."""
    g = torch.Generator().manual_seed(seed)
    sides = [[-(-side // 2**level) for side in size] for level in range(levels)]
    return {
        rows: [torch.rand(n, channels * 2**level, *side, generator=g) for level, side in enumerate(sides)]
        for rows, n in (("labelled", 1), ("unlabelled", 2))
    }
