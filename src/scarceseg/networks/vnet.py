"""The V-Net that the semi-supervised literature on the left atrium shares."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import nn

from scarceseg.errors import ConfigError
from scarceseg.networks.base import NETWORKS, EncoderDecoder, check_statistics, keep_layout
from scarceseg.types import ImageBatch, Logits

Normalization = Literal["batchnorm", "instancenorm", "groupnorm", "none"]

_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batchnorm": nn.BatchNorm3d,
    "instancenorm": nn.InstanceNorm3d,
    # 16 groups as published; fewer where a small network has fewer channels
    "groupnorm": lambda channels: nn.GroupNorm(math.gcd(16, channels), channels),
}


class _Units(nn.Module):
    """Convolutions, each followed by normalisation and ReLU, in one sequence called ``conv``."""

    def __init__(self, convolutions: list[nn.Module], channels: int, normalization: str) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for convolution in convolutions:
            layers.append(convolution)
            if normalization != "none":
                layers.append(_NORMS[normalization](channels))
            layers.append(nn.ReLU(inplace=True))
        self.conv = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def _stage(units: int, source: int, target: int, normalization: str) -> _Units:
    convolutions: list[nn.Module] = [
        nn.Conv3d(source if unit == 0 else target, target, kernel_size=3, padding=1) for unit in range(units)
    ]
    return _Units(convolutions, target, normalization)


def _down(source: int, normalization: str) -> _Units:
    return _Units([nn.Conv3d(source, 2 * source, kernel_size=2, stride=2)], 2 * source, normalization)


def _up(source: int, normalization: str) -> _Units:
    return _Units([nn.ConvTranspose3d(source, source // 2, kernel_size=2, stride=2)], source // 2, normalization)


@NETWORKS.register("vnet")
class VNet(EncoderDecoder):
    """V-Net as the UA-MT code base defined it (Yu et al., MICCAI 2019), after Milletari et al., 3DV 2016.

    Five encoder stages of 1, 2, 3, 3, 3 units (3x3x3 convolution, normalisation, ReLU) with f, 2f, 4f, 8f, 16f channels
    and strided 2x2x2 convolutions between them; four decoder stages of 3, 3, 2, 1 units. A skip connection is an
    addition, and a stage has no residual connection: both differ from the V-Net of 2016. Parameters have the names of
    the published checkpoints, and the initial values are those of PyTorch's layers, as there.

    Args:
        channels: image channels C.
        classes: classes K.
        n_filters: f; 16 gives the published 9,448,866 parameters (one channel, two classes).
        normalization: of every unit. Instance and group normalisation are without running statistics.
        dropout: drop whole channels with p = 0.5 after the bottleneck and before the last convolution. "auto" does so with two
            classes, as the network published for the left atrium, and not with more, as MagicNet's for organs: where half of the
            features in front of the last convolution are missing in training, a thin structure is learnt against that noise
            and partly lost without it (measured on phantoms, benchmarks/README.md).

    Raises:
        ConfigError: `n_filters` below 1, an unknown `normalization` or another value of `dropout`.
    """

    encoder_parts = (
        *("block_one", "block_two", "block_three", "block_four", "block_five"),
        *("block_one_dw", "block_two_dw", "block_three_dw", "block_four_dw"),
    )

    def __init__(
        self,
        channels: int,
        classes: int,
        n_filters: int = 16,
        normalization: Normalization = "batchnorm",
        dropout: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(n_filters, int) or n_filters < 1:
            raise ConfigError(f"vnet: n_filters is a whole number from 1 on, got {n_filters!r}")
        if normalization not in get_args(Normalization):
            raise ConfigError(f"vnet: normalization is one of {get_args(Normalization)}, got {normalization!r}")
        if not isinstance(dropout, bool) and dropout != "auto":
            raise ConfigError(f"vnet: dropout is true, false or auto, got {dropout!r}")
        self.normalization: str = normalization
        f, norm = n_filters, normalization
        self.block_one = _stage(1, channels, f, norm)
        self.block_one_dw = _down(f, norm)
        self.block_two = _stage(2, 2 * f, 2 * f, norm)
        self.block_two_dw = _down(2 * f, norm)
        self.block_three = _stage(3, 4 * f, 4 * f, norm)
        self.block_three_dw = _down(4 * f, norm)
        self.block_four = _stage(3, 8 * f, 8 * f, norm)
        self.block_four_dw = _down(8 * f, norm)
        self.block_five = _stage(3, 16 * f, 16 * f, norm)
        self.block_five_up = _up(16 * f, norm)
        self.block_six = _stage(3, 8 * f, 8 * f, norm)
        self.block_six_up = _up(8 * f, norm)
        self.block_seven = _stage(3, 4 * f, 4 * f, norm)
        self.block_seven_up = _up(4 * f, norm)
        self.block_eight = _stage(2, 2 * f, 2 * f, norm)
        self.block_eight_up = _up(2 * f, norm)
        self.block_nine = _stage(1, f, f, norm)
        self.out_conv = nn.Conv3d(f, classes, kernel_size=1)
        self.dropout = nn.Dropout3d(p=0.5 if (classes == 2 if dropout == "auto" else dropout) else 0.0)

    @property
    def divisor(self) -> tuple[int, int, int]:
        """16: four halvings."""
        return (16, 16, 16)

    def encode(self, image: ImageBatch) -> list[torch.Tensor]:
        """Five features with f, 2f, 4f, 8f, 16f channels; dropout has acted on the last."""
        self.check_size(image)
        check_statistics(image, self.divisor, self.normalization, self.training)
        one = self.block_one(image)
        two = self.block_two(self.block_one_dw(one))
        three = self.block_three(self.block_two_dw(two))
        four = self.block_four(self.block_three_dw(three))
        five = self.block_five(self.block_four_dw(four))
        return [one, two, three, four, self.dropout(five)]

    def decode_stages(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Four features with f, 2f, 4f, 8f channels."""
        one, two, three, four, five = features
        six = self.block_six(self.block_five_up(five) + four)
        seven = self.block_seven(self.block_six_up(six) + three)
        eight = self.block_eight(self.block_seven_up(seven) + two)
        nine = self.block_nine(self.block_eight_up(eight) + one)
        return [nine, eight, seven, six]

    def head(self, features: torch.Tensor) -> Logits:
        """Logits ``[B, K, X, Y, Z]``; dropout acts first."""
        return self.out_conv(keep_layout(self.dropout(features)))
