"""The 3D U-Net that the SSL4MIS benchmark uses."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn

from scarceseg.errors import ConfigError
from scarceseg.networks.base import NETWORKS, EncoderDecoder, check_statistics
from scarceseg.types import ImageBatch, Logits

Normalization = Literal["instancenorm", "batchnorm", "none"]

_NORMS: dict[str, type[nn.Module]] = {
    "instancenorm": nn.InstanceNorm3d,
    "batchnorm": nn.BatchNorm3d,
    "none": nn.Identity,
}


class _DoubleUnit(nn.Module):
    """Twice a 3x3x3 convolution, normalisation and ReLU."""

    def __init__(self, source: int, target: int, normalization: str) -> None:
        super().__init__()
        self.conv1 = self._unit(source, target, normalization)
        self.conv2 = self._unit(target, target, normalization)

    @staticmethod
    def _unit(source: int, target: int, normalization: str) -> nn.Sequential:
        convolution = nn.Conv3d(source, target, kernel_size=3, padding=1)
        return nn.Sequential(convolution, _NORMS[normalization](target), nn.ReLU(inplace=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.conv1(x))


class _UpStep(nn.Module):
    """The deeper map at twice its size, behind the skip map, through a double unit."""

    def __init__(self, deep: int, skip: int, normalization: str) -> None:
        super().__init__()
        self.conv = _DoubleUnit(deep + skip, skip, normalization)

    def forward(self, skip: torch.Tensor, deep: torch.Tensor) -> torch.Tensor:
        deep = F.interpolate(deep, scale_factor=2, mode="trilinear", align_corners=False)
        return self.conv(torch.cat([skip, deep], dim=1))


@NETWORKS.register("unet3d")
class UNet3D(EncoderDecoder):
    """3D U-Net (Çiçek et al., MICCAI 2016) as defined by ``unet_3D`` of SSL4MIS.

    Five levels of (64, 128, 256, 512, 1024) / `feature_scale` channels; max pooling down, trilinear interpolation up,
    concatenation. Convolution weights start from Kaiming's normal distribution. Parameters have the names of the
    published checkpoints.

    The published option called ``is_batchnorm`` switches on instance normalisation, without gain, offset or running
    statistics. It is the default here too, under its own name; ``batchnorm`` gives what that name promises.

    Args:
        channels: image channels C.
        classes: classes K.
        feature_scale: divides the number of channels; 4 gives 5,884,050 parameters (one channel, two classes).
        normalization: of every unit.
        dropout: element-wise dropout with p = 0.3 after the bottleneck and before the last convolution.

    Raises:
        ConfigError: `feature_scale` outside 1..64 or an unknown `normalization`.
    """

    encoder_parts = ("conv1", "conv2", "conv3", "conv4", "center")

    def __init__(
        self,
        channels: int,
        classes: int,
        feature_scale: int = 4,
        normalization: Normalization = "instancenorm",
        dropout: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(feature_scale, int) or not 1 <= feature_scale <= 64:
            raise ConfigError(f"unet3d: feature_scale is a whole number from 1 to 64, got {feature_scale!r}")
        if normalization not in get_args(Normalization):
            raise ConfigError(f"unet3d: normalization is one of {get_args(Normalization)}, got {normalization!r}")
        self.normalization: str = normalization
        one, two, three, four, five = (width // feature_scale for width in (64, 128, 256, 512, 1024))
        self.conv1 = _DoubleUnit(channels, one, normalization)
        self.conv2 = _DoubleUnit(one, two, normalization)
        self.conv3 = _DoubleUnit(two, three, normalization)
        self.conv4 = _DoubleUnit(three, four, normalization)
        self.center = _DoubleUnit(four, five, normalization)
        self.up_concat4 = _UpStep(five, four, normalization)
        self.up_concat3 = _UpStep(four, three, normalization)
        self.up_concat2 = _UpStep(three, two, normalization)
        self.up_concat1 = _UpStep(two, one, normalization)
        self.final = nn.Conv3d(one, classes, kernel_size=1)
        self.dropout = nn.Dropout(p=0.3 if dropout else 0.0)
        self.initialise_layers()

    def initialise_layers(self) -> None:
        """Kaiming's normal distribution for the convolutions' weights."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight)

    @property
    def divisor(self) -> tuple[int, int, int]:
        """16: four halvings."""
        return (16, 16, 16)

    def encode(self, image: ImageBatch) -> list[torch.Tensor]:
        """Features of the five levels; dropout has acted on the last."""
        self.check_size(image)
        check_statistics(image, self.divisor, self.normalization, self.training)
        one = self.conv1(image)
        two = self.conv2(F.max_pool3d(one, 2))
        three = self.conv3(F.max_pool3d(two, 2))
        four = self.conv4(F.max_pool3d(three, 2))
        return [one, two, three, four, self.dropout(self.center(F.max_pool3d(four, 2)))]

    def decode_stages(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Four features with 64, 128, 256, 512 / `feature_scale` channels."""
        one, two, three, four, five = features
        coarse = self.up_concat4(four, five)
        middle = self.up_concat3(three, coarse)
        fine = self.up_concat2(two, middle)
        return [self.up_concat1(one, fine), fine, middle, coarse]

    def head(self, features: torch.Tensor) -> Logits:
        """Logits ``[B, K, X, Y, Z]``; dropout acts first."""
        return self.final(self.dropout(features))
