"""`tiny-sam3d` opened for some classes: whole volumes or patches in, class logits out, no prompts and no mosaic. (ours)

The encoder is the pre-trained one. In the head, tokens of the classes stand where clicks stood: where a click was compared with
each voxel's features, a trained token of each class is, the background's as clicks outside, the others as clicks inside. Next to
them the head sees where in the volume it is, unless it is told not to.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from scarceseg.errors import ConfigError
from scarceseg.foundation.adapters import BottleneckAdapter
from scarceseg.foundation.base import Sees, Tunable, Tuning
from scarceseg.foundation.tiny_sam3d import Grid, TinySam3D, _z_score, resample_whole
from scarceseg.foundation.tiny_sam3d_net import (
    MULTIPLE,
    Convolution,
    EncodedPrompt,
    Pointwise,
    PromptHead,
    Residual,
    TinySam3DNet,
)
from scarceseg.foundation.volume_tuning import AdaptedMaps, LowRank, TunedVolume, add_lora
from scarceseg.types import ImageBatch, Logits

OCTAVES = 3
"""Waves of the place's code along each axis: half a wave a volume, one, and two."""
TUNED_LONGEST = 64
"""Voxels of the longest side of the grid for tuning, unless the volume's own voxels are coarser."""
ISOTROPIC = (1.0, 1.0, 1.0)


class ClassHead(PromptHead):
    """The prompt head with a token for each class in place of clicks, and logits of K classes instead of one mask.

    Everything starts from the pre-trained head: the scales it works on, what it did with the similarity to clicks inside (now:
    to the tokens of the classes) and outside (the background's), and its last layers, copied for each class; the background's
    start at 0. The tokens are new. The place has no influence at first.

    Args:
        head: pre-trained; not changed.
        classes: K, background included.
        generator: draws the tokens.
        placed: whether the head sees the place in the volume.
    """

    def __init__(self, head: PromptHead, classes: int, generator: torch.Generator, placed: bool = True) -> None:
        with torch.random.fork_rng(devices=[]):
            super().__init__(head.config)
        self.load_state_dict(head.state_dict())
        self.classes, self.placed = classes, placed
        config = head.config
        shape = (classes, config.similarities, config.similarity_width)
        self.tokens = nn.Parameter(torch.randn(shape, generator=generator))
        self.prompt = self._class_prompt(head)
        self.logit_parts = _for_classes(head.logit_parts, classes)
        self.gate = _for_classes(head.gate, classes)
        self.quality = nn.Sequential(nn.Identity())  # no estimate of its own IoU is wanted
        self.to(head.temperature.device)

    def _class_prompt(self, head: PromptHead) -> Pointwise:
        """The layer behind the prompt's maps, for the maps of the classes and the place."""
        heads, own = head.config.similarities, head.prompt.linear
        places = 6 * OCTAVES if self.placed else 0
        layer = _empty(self.classes * heads + places, own.out_features)
        inside, outside = own.weight[:, :heads], own.weight[:, heads : 2 * heads]
        with torch.no_grad():
            layer.linear.weight.zero_()
            layer.linear.weight[:, :heads] = outside
            layer.linear.weight[:, heads : self.classes * heads] = inside.repeat(1, self.classes - 1) / (
                self.classes - 1
            )
            layer.linear.bias.copy_(own.bias)
        return layer

    def answer(self, maps: dict[str, torch.Tensor]) -> torch.Tensor:
        """Class logits ``[B, K, X, Y, Z]`` from the maps of the encoder."""
        logits, _ = self(maps, _nothing(maps["similar"]))
        return logits

    def _prompt_maps(self, similar: torch.Tensor, prompt: EncodedPrompt) -> torch.Tensor:
        b, size = len(similar), similar.shape[2:]
        features = F.normalize(similar.reshape(b, *self.tokens.shape[1:], -1), dim=2, eps=1e-3)
        cosine = torch.einsum("bhwv,chw->bchv", features, F.normalize(self.tokens, dim=2))
        maps = (cosine * self.temperature[:, None]).reshape(b, -1, *size)
        if not self.placed:
            return maps
        return torch.cat([maps, place_code(size, similar).expand(b, -1, -1, -1, -1)], 1)

    def _finest(  # type: ignore[override]
        self, parts: torch.Tensor, gate: torch.Tensor, full: torch.Tensor
    ) -> torch.Tensor:
        """Of each class what `PromptHead` makes of one mask: ``[B, K, X, Y, Z]``."""
        c = self.classes
        each = [PromptHead._finest(p, g, full) for p, g in zip(parts.chunk(c, 1), gate.chunk(c, 1), strict=True)]
        return torch.stack(each, 1)


def place_code(size: torch.Size, like: torch.Tensor) -> torch.Tensor:
    """Sines and cosines ``[1, 6 * OCTAVES, x, y, z]`` of the place in the volume, the same code whatever its voxels."""
    axes = [(torch.arange(n, device=like.device, dtype=like.dtype) + 0.5) / n for n in size]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    waves = [math.pi * 2**octave * places for octave in range(OCTAVES)]
    return torch.cat([part for wave in waves for part in (wave.sin(), wave.cos())])[None]


def _empty(inputs: int, outputs: int) -> Pointwise:
    with torch.random.fork_rng(devices=[]):
        return Pointwise(inputs, outputs)


def _for_classes(layer: Pointwise, classes: int) -> Pointwise:
    """The layer's outputs once for each class, those of the background 0."""
    own = layer.linear
    wide = _empty(own.in_features, classes * own.out_features)
    keep = torch.ones(classes, device=own.weight.device)
    keep[0] = 0
    with torch.no_grad():
        wide.linear.weight.copy_(torch.kron(keep[:, None], own.weight))
        wide.linear.bias.copy_(torch.kron(keep, own.bias))
    return wide


def _nothing(like: torch.Tensor) -> EncodedPrompt:
    """A prompt without anything."""
    b = len(like)
    nan = like.new_full((b, 2, 3), float("nan"))
    return EncodedPrompt(like.new_zeros(b, 1, 3), like.new_full((b, 1), -1), nan, None, like.new_zeros(b))


class TunedTinySam3D(TunedVolume):
    """The small 3D network for K classes, most of it frozen; see `TinySam3DModel.tunable`.

    ``[B, C, X, Y, Z]`` to logits ``[B, K, X, Y, Z]``. A volume of any size is brought to the model's grid (`Grid.fit`, its voxels
    taken as cubes: none are known here) and z-scored there as for prompts; several channels are mixed into one.

    Args:
        network: is copied and never changed.
        channels, classes, tuning: see `Tunable.tunable`.
        longest: voxels of the longest side of the grid.
        channel: see `ChannelMix`.
        name: for messages.
        placed: see `ClassHead`.

    Raises:
        ConfigError: see `TunedVolume`.
    """

    network: TinySam3DNet

    def __init__(
        self,
        network: TinySam3DNet,
        channels: int,
        classes: int,
        tuning: Tuning,
        *,
        longest: int,
        channel: int | None,
        name: str,
        placed: bool = True,
    ) -> None:
        super().__init__(name, channels, classes, tuning, channel)
        self.longest = longest
        generator = self._generator()
        self.network = copy.deepcopy(network)
        head = ClassHead(network.head, classes, generator, placed)
        self.network.head = head
        if tuning.strategy == "lora":
            _open_with_lora(self.network.encoder, tuning.rank, generator)
        elif tuning.strategy == "adapter":
            _open_with_adapters(self.network.encoder, tuning.rank, generator)
        self._close(head)

    def forward(self, image: ImageBatch) -> Logits:
        """Class logits in the frame of the volumes.

        Raises:
            DataError: another number of axes or channels than the model was opened for.
        """
        grid = Grid.fit(self._checked(image), ISOTROPIC, self.longest)
        seen = _z_score(self._mixed(_z_score(grid.put(image))))
        maps = self.network.encoder(seen)
        head = self.network.head
        assert isinstance(head, ClassHead)
        return resample_whole(head.answer(maps).float(), grid.size)


def _open_with_lora(encoder: nn.Module, rank: int, generator: torch.Generator) -> None:
    """LoRA on every convolution of the encoder, also on those of 1x1x1."""
    for layer in list(encoder.modules()):
        if isinstance(layer, Convolution | nn.Linear):
            add_lora(layer, LowRank(layer.weight, rank, generator))


def _open_with_adapters(encoder: nn.Module, width: int, generator: torch.Generator) -> None:
    """An adapter behind the branch of every residual block, before it is added (Houlsby et al., ICML 2019, section 2.1)."""
    for block in list(encoder.modules()):
        if isinstance(block, Residual):
            weight = block.conv2.weight
            adapter = BottleneckAdapter(
                len(weight), width, generator=generator, device=weight.device, dtype=weight.dtype
            )
            block.conv2 = AdaptedMaps(block.conv2, adapter)  # type: ignore[assignment]


class TinySam3DModel(TinySam3D, Tunable):
    """`TinySam3D` that can be tuned as well.

    Args:
        network: with its weights; it is frozen.
        tuned_longest: voxels of the longest side of the grid on which tuned copies see a volume, fewer than for prompts because
            training passes through the network hundreds of times; 64 instead of 112 leave a fifth of the voxels.
        placed: tuned copies want whole volumes and know where in them they look, instead of patches (see `shown`).
        options: of `TinySam3D`.

    Raises:
        ConfigError: an impossible option.
    """

    slices = False
    usual_rank = 16
    usual_lr = 6e-3

    def __init__(
        self, network: TinySam3DNet, *, tuned_longest: int = TUNED_LONGEST, placed: bool = False, **options: Any
    ) -> None:
        if tuned_longest < MULTIPLE:
            raise ConfigError(f"expected tuned_longest >= {MULTIPLE}, got {tuned_longest}")
        super().__init__(network, **options)
        self.tuned_longest, self.placed = tuned_longest, placed
        self.sees: Sees = "volume" if placed else "patch"

    def shown(self, sees: Sees) -> TinySam3DModel:
        """The same weights for whole volumes, with their places, or for patches."""
        if sees == self.sees:
            return self
        other = copy.copy(self)
        other.sees, other.placed = sees, sees == "volume"
        return other

    def tunable(self, channels: int, classes: int, tuning: Tuning, size: tuple[int, int, int]) -> TunedTinySam3D:
        """A copy opened for K classes; volumes or patches need not have `size`.

        ``decoder`` trains the head alone, and is the cheapest: with one channel no gradient passes through the encoder. ``lora``
        trains low-rank additions to all convolutions of the encoder, too, ``adapter`` bottlenecks behind its residual blocks.

        Raises:
            ConfigError: a strategy, rank, channel or number of channels or classes that is not possible.
        """
        return TunedTinySam3D(
            self.network,
            channels,
            classes,
            tuning,
            longest=self.tuned_longest,
            channel=self.channel,
            name=self.name,
            placed=self.placed,
        )
