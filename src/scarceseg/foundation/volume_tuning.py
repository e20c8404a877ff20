"""What the tuned volumetric models share: low-rank additions to any layer, adapters on feature maps, channels, and their files.

LoRA (Hu et al., ICLR 2022, section 4.1) is ``W <- W + B A`` with rank r. For a convolution W is ``[out, in, k, k, k]`` and A, B
are ``[r, in k^3]`` and ``[out, r]``: a convolution to r maps and a 1x1x1 one behind it, computed as one, so that a volume costs
what it cost before. A is Kaiming-uniform with a = sqrt(5), B starts at 0, scale 1, as in `lora`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.utils import parametrize

from scarceseg.errors import ConfigError, DataError
from scarceseg.foundation.adapters import BottleneckAdapter
from scarceseg.foundation.base import TunedModel, Tuning, freeze
from scarceseg.foundation.lora import copies, fill, fresh
from scarceseg.types import ImageBatch

LORA = ".parametrizations.weight.0."


class LowRank(nn.Module):
    """``B A`` for one weight ``[out, ...]``; 0 until B is trained.

    Args:
        weight: that it will be added to; tells the sizes, the device and the type.
        rank: of A and B, at least 1.
        generator: draws A.
    """

    def __init__(self, weight: torch.Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.a = nn.Parameter(weight.new_zeros(rank, weight[0].numel()))
        self.b = nn.Parameter(weight.new_zeros(len(weight), rank))
        fresh(self.a, lambda values: nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight with the addition."""
        return weight + (self.b @ self.a).view(weight.shape)


class LowRankQV(nn.Module):
    """`LowRank` on the first and the last third of a fused ``qkv`` weight ``[3 * dim, dim]``; the keys stay as they are."""

    def __init__(self, weight: torch.Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        query, _, value = weight.chunk(3)
        self.q, self.v = LowRank(query, rank, generator), LowRank(value, rank, generator)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight with the additions."""
        query, key, value = weight.chunk(3)
        return torch.cat([self.q(query), key, self.v(value)])


def add_lora(layer: nn.Module, low_rank: LowRank | LowRankQV) -> None:
    """Put the addition on the layer's frozen ``weight``, in place."""
    parametrize.register_parametrization(layer, "weight", low_rank)


class AdaptedMaps(nn.Module):
    """A frozen module whose output ``[B, C, x, y, z]`` a bottleneck adapter corrects, voxel by voxel."""

    def __init__(self, frozen: nn.Module, adapter: BottleneckAdapter) -> None:
        super().__init__()
        self.frozen, self.adapter = frozen, adapter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The module's output, corrected."""
        corrected: torch.Tensor = self.adapter(self.frozen(x).movedim(1, -1))
        return corrected.movedim(-1, 1)


class ChannelMix(nn.Module):
    """Several channels to the one that a pre-trained model reads: a trained weight for each, ``[B, C, ...]`` to ``[B, 1, ...]``.

    Args:
        channels: C.
        first: channel that it starts with alone; None starts with the mean of all.
    """

    def __init__(self, channels: int, first: int | None = None) -> None:
        super().__init__()
        start = torch.full((channels,), 1 / channels)
        if first is not None:
            start = torch.eye(channels)[first]
        self.weight = nn.Parameter(start)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """The weighted sum."""
        return torch.einsum("bc...,c->b...", image, self.weight)[:, None]


class TunedVolume(TunedModel):
    """A volumetric network opened for K classes: its input, and the file of what was tuned.

    A subclass puts its (copied) network in, opens what it tunes, and calls `_close` at the end of its own construction.

    Args:
        name: of the model, for messages.
        channels, classes, tuning: see `Tunable.tunable`.
        channel: see `ChannelMix`.

    Raises:
        ConfigError: a strategy, rank, channel or number of channels or classes that is not possible.
    """

    network: nn.Module

    def __init__(self, name: str, channels: int, classes: int, tuning: Tuning, channel: int | None = None) -> None:
        super().__init__()
        tuning.check(name, channels, classes)
        if channel is not None and not 0 <= channel < channels:
            raise ConfigError(f"{name}: there is no channel {channel}, the images have {channels} (0 first)")
        self.name, self.channels, self.classes, self.tuning = name, channels, classes, tuning
        self.channel_mix = ChannelMix(channels, channel) if channels > 1 else None
        self._tuned: tuple[str, ...] = ()

    def _generator(self) -> torch.Generator:
        """For new weights: on the CPU, seeded by PyTorch's own generator."""
        return torch.Generator().manual_seed(int(torch.randint(2**62, (), device="cpu")))

    def _close(self, *opened: nn.Module | nn.Parameter) -> None:
        """Freeze all but these parts, the additions and the mix of channels, and remember which those are."""
        freeze(self.network)
        self.to(next(self.network.parameters()).device)
        additions = [m for m in self.modules() if isinstance(m, LowRank | BottleneckAdapter | ChannelMix)]
        for part in (*opened, *additions):
            part.requires_grad_(True)
        self._tuned = tuple(name for name, parameter in self.named_parameters() if parameter.requires_grad)

    def _checked(self, image: ImageBatch) -> tuple[int, int, int]:
        """Voxels of the volumes.

        Raises:
            DataError: another number of axes or channels than the model was opened for.
        """
        if image.ndim != 5 or image.shape[1] != self.channels:
            raise DataError(
                f"this tuned {self.name} was opened for [B, {self.channels}, X, Y, Z] (channels and voxels), got "
                f"{list(image.shape)}"
            )
        return image.shape[2], image.shape[3], image.shape[4]

    def _mixed(self, image: torch.Tensor) -> torch.Tensor:
        """One channel ``[B, 1, X, Y, Z]``."""
        mixed: torch.Tensor = image if self.channel_mix is None else self.channel_mix(image)
        return mixed

    def tuned_state(self) -> dict[str, torch.Tensor]:
        """Copies of what tuning changes, under the names of the network; LoRA as ``<layer>.lora.*``."""
        return copies(self._live())

    def load_tuned_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put back what `tuned_state` gave.

        Raises:
            DataError: missing or unexpected names, or other shapes.
        """
        fill(self._live(), state, f"tuned {self.name} ({self.tuning.strategy})")

    def _live(self) -> dict[str, torch.Tensor]:
        parameters = dict(self.named_parameters())
        return {
            name.removeprefix("network.").replace(LORA, ".lora."): parameters[name].detach() for name in self._tuned
        }
