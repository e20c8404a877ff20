"""What a segmentation network is here, and how one is found by its name."""

from __future__ import annotations

import copy
import inspect
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from scarceseg.errors import ConfigError, near_matches
from scarceseg.registry import Registry, unknown
from scarceseg.types import ImageBatch, Logits


class SegmentationNetwork(nn.Module, ABC):
    """A patch ``[B, C, X, Y, Z]`` in, logits ``[B, K, X, Y, Z]`` of the same size out.

    Attributes:
        fixed_size: the one patch it is built for, or None.
    """

    fixed_size: tuple[int, int, int] | None = None

    @property
    @abstractmethod
    def divisor(self) -> tuple[int, int, int]:
        """Each side of the input has to be a multiple of these numbers."""

    @abstractmethod
    def forward(self, image: ImageBatch) -> Logits:
        """Logits of every voxel.

        Raises:
            ConfigError: a side is not a multiple of `divisor`.
        """

    def initialise_layers(self) -> None:
        """What the constructor does to the layers' own initial weights; nothing by default."""

    def check_size(self, image: ImageBatch) -> None:
        """Refuse a patch the network cannot halve often enough, and say which size would fit.

        Raises:
            ConfigError: not five axes, or a side that is not a multiple of `divisor`.
        """
        if image.ndim != 5:
            raise ConfigError(
                f"{type(self).__name__} expects a batch [B, C, X, Y, Z] (5 axes), got the shape {list(image.shape)}"
            )
        size = tuple(image.shape[2:])
        fitting = tuple(-(-side // step) * step for side, step in zip(size, self.divisor, strict=True))
        if size != fitting:
            raise ConfigError(
                f"{type(self).__name__} expects sides that are multiples of {_by(self.divisor)}, got {_by(size)}: "
                f"pad the patch to {_by(fitting)}"
            )


class EncoderDecoder(SegmentationNetwork):
    """A network in two halves. Methods that add decoders or disturb features work on the list between them.

    Attributes:
        encoder_parts: names of the submodules that only `encode` uses.
    """

    encoder_parts: tuple[str, ...] = ()

    @abstractmethod
    def encode(self, image: ImageBatch) -> list[torch.Tensor]:
        """Features from fine to coarse; the first has the size of the input, the last is the bottleneck."""

    @abstractmethod
    def decode_stages(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """The decoder's features from what `encode` returned, fine to coarse; the first has the size of the input."""

    @abstractmethod
    def head(self, features: torch.Tensor) -> Logits:
        """Logits from the finest features of the decoder."""

    def decode(self, features: list[torch.Tensor]) -> Logits:
        """Logits from what `encode` returned."""
        return self.head(self.decode_stages(features)[0])

    def forward(self, image: ImageBatch) -> Logits:
        """``decode(encode(image))``."""
        return self.decode(self.encode(image))


class WithFeatures(nn.Module):
    """A network that also hands out what its two halves computed, for terms that share it.

    Args:
        network: shared, not copied.
    """

    def __init__(self, network: EncoderDecoder) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: ImageBatch) -> tuple[Logits, list[torch.Tensor], list[torch.Tensor]]:
        """Logits, encoder features and decoder features, both fine to coarse."""
        encoded = self.network.encode(image)
        decoded = self.network.decode_stages(encoded)
        return self.network.head(decoded[0]), encoded, decoded


class Decoder(nn.Module):
    """A decoder of its own for a network's features: the same layers, without the encoder.

    Args:
        network: copied; it stays as it is.
        fresh: draw new initial weights; else start from the network's.
    """

    def __init__(self, network: EncoderDecoder, fresh: bool = True) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        for name in network.encoder_parts:
            delattr(self.network, name)
        if fresh:
            reinitialise(self.network)

    def forward(self, features: list[torch.Tensor]) -> Logits:
        """Logits from what the network's `encode` returned."""
        return self.network.decode(features)


def reinitialise(module: nn.Module) -> None:
    """Draw new initial weights for every layer, as its own constructor does, from torch's global generator."""
    for layer in module.modules():
        if callable(reset := getattr(layer, "reset_parameters", None)):
            reset()
    for layer in module.modules():
        if isinstance(layer, SegmentationNetwork):
            layer.initialise_layers()


def require_halves(network: nn.Module, term: str) -> EncoderDecoder:
    """The network, if it has an encoder and a decoder.

    Raises:
        ConfigError: it has not.
    """
    if not isinstance(network, EncoderDecoder):
        raise ConfigError(
            f"{term} works on the features between encoder and decoder, which this network does not show: "
            "use --network vnet or unet3d"
        )
    return network


def channels_of(network: EncoderDecoder) -> tuple[list[int], list[int]]:
    """Channels of the features that `encode` and `decode_stages` return, both from fine to coarse.

    A copy of the network is tried: weights, running statistics, mode and random state stay as they are.
    """
    twin = copy.deepcopy(network).eval()
    first = next(layer for layer in twin.modules() if isinstance(layer, nn.Conv3d))
    sides = [2 * step for step in network.divisor]
    with torch.no_grad():
        encoded = twin.encode(first.weight.new_zeros(1, first.in_channels, *sides))
        decoded = twin.decode_stages(encoded)
    return [level.shape[1] for level in encoded], [level.shape[1] for level in decoded]


def check_statistics(image: ImageBatch, divisor: tuple[int, int, int], normalization: str, training: bool) -> None:
    """Refuse an input of which so little is left at the bottleneck that its normalisation has no statistics.

    Raises:
        ConfigError: one voxel per channel under instance norm, or per channel and batch under batch norm in training.
    """
    rows = image.shape[0] * int(os.environ.get("WORLD_SIZE", "1"))  # several processes share their statistics
    voxels = math.prod(side // step for side, step in zip(image.shape[2:], divisor, strict=True))
    if (normalization == "instancenorm" and voxels == 1) or (
        normalization == "batchnorm" and training and voxels * rows == 1
    ):
        raise ConfigError(
            f"a {'batch of one ' if normalization == 'batchnorm' else ''}patch of {_by(tuple(image.shape[2:]))} leaves "
            f"a single voxel at the bottleneck, which {normalization} cannot normalise: "
            f"take a patch with at least one side of {2 * divisor[0]}"
        )


NETWORKS: Registry[Callable[..., SegmentationNetwork]] = Registry("network", "scarceseg.networks")
"""Networks by name. An entry is called with ``channels``, ``classes`` and the arguments of the config."""


def build_network(name: str, channels: int, classes: int, args: dict[str, Any] | None = None) -> SegmentationNetwork:
    """A freshly initialised network.

    Args:
        name: an entry of `NETWORKS`, or a network of MONAI such as ``SegResNet`` or ``monai:UNet``.
        channels: image channels C.
        classes: classes K, with the background.
        args: arguments of the network's own.

    Raises:
        ConfigError: unknown name (near matches are listed) or arguments the network does not take.
    """
    from scarceseg.networks import monai_net

    if channels < 1 or classes < 2:
        raise ConfigError(
            f"a network needs at least 1 channel and 2 classes (background counts), got {channels} and {classes}"
        )
    args = dict(args or {})
    known = NETWORKS.names()
    if name in known:
        return _call(name, NETWORKS.get(name), {"channels": channels, "classes": classes}, args)
    plain = name.removeprefix(monai_net.PREFIX)
    if monai_net.find(plain) is not None:
        return monai_net.MonaiNetwork(plain, channels, classes, args)
    if name.startswith(monai_net.PREFIX):
        raise ConfigError(f"unknown MONAI network {plain!r}: {near_matches(plain, monai_net.NAMES)}")
    raise unknown("network", name, [*known, *monai_net.NAMES])


def keep_layout(features: torch.Tensor) -> torch.Tensor:
    """Give the gradient of `features` the memory layout `features` has.

    A 1x1x1 convolution to a few classes returns its gradient in the default layout even where everything before it is
    channels-last; at full resolution the normalisation and ReLU below would then take PyTorch's slow mixed-layout path.
    """
    if features.requires_grad and features.is_contiguous(memory_format=torch.channels_last_3d):
        features.register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last_3d))
    return features


class Sides(NamedTuple):
    """What a network asks of a patch: sides that are multiples of `divisor`, or where it is `fixed` exactly that size."""

    divisor: tuple[int, int, int]
    fixed: tuple[int, int, int] | None = None


def sides_of(name: str, args: dict[str, Any] | None = None, channels: int = 1, classes: int = 2) -> Sides:
    """What a network asks of a patch; random state is left as it was.

    It is built on the meta device, or where it reads values while it is built, which that has not got, on the CPU.

    Args:
        name, args, channels, classes: see `build_network`.

    Raises:
        ConfigError: as `build_network`.
    """
    NETWORKS.names()  # their files are imported here, and not on the meta device

    def built(device: str) -> Sides:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            network = build_network(name, channels, classes, args)
            return Sides(network.divisor, network.fixed_size)

    try:
        return built("meta")
    except Exception:  # of any kind: what is wrong with the settings is told by the second attempt
        return built("cpu")


def divisor_of(name: str, args: dict[str, Any] | None = None) -> tuple[int, int, int]:
    """`SegmentationNetwork.divisor` of a network, see `sides_of`."""
    return sides_of(name, args).divisor


def _call(
    name: str, build: Callable[..., SegmentationNetwork], given: dict[str, Any], args: dict[str, Any]
) -> SegmentationNetwork:
    known = [key for key in inspect.signature(build).parameters if key not in given]
    for key in args:
        if key not in known:
            raise ConfigError(f"the network {name!r} takes no argument {key!r}: {near_matches(key, known)}")
    return build(**given, **args)


def _by(sides: tuple[int, ...]) -> str:
    return "x".join(str(side) for side in sides)
