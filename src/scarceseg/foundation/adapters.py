"""Bottleneck adapters behind the frozen blocks of a SAM image encoder.

Houlsby et al., "Parameter-efficient transfer learning for NLP", ICML 2019, section 2.1: behind the attention and behind the MLP
of each block, before the residual is added, ``h <- h + U gelu(D h)`` with ``D: dim -> width`` and ``U: width -> dim``. U starts
at 0 (ours; the paper starts near 0), so that the encoder computes exactly what it did before.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers import SamModel

from scarceseg.errors import ConfigError
from scarceseg.foundation.lora import blocks, fresh, train_decoder_only


class BottleneckAdapter(nn.Module):
    """``h + U gelu(D h)`` on the last axis, ``[..., dim]`` to ``[..., dim]``; the identity until U is trained."""

    def __init__(
        self,
        dim: int,
        width: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.down = nn.utils.skip_init(nn.Linear, dim, width, device=device, dtype=dtype)
        self.up = nn.utils.skip_init(nn.Linear, width, dim, device=device, dtype=dtype)
        # D is normal of variance 1 / dim: features of unit variance stay so.
        fresh(self.down.weight, lambda values: nn.init.normal_(values, std=dim**-0.5, generator=generator))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """The features with the adapter's correction."""
        correction: torch.Tensor = self.up(nn.functional.gelu(self.down(h)))
        return h + correction


class Adapted(nn.Module):
    """A frozen module and the adapter behind it."""

    def __init__(self, frozen: nn.Module, adapter: BottleneckAdapter) -> None:
        super().__init__()
        self.frozen = frozen
        self.adapter = adapter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The module's output, corrected."""
        adapted: torch.Tensor = self.adapter(self.frozen(x))
        return adapted


def open_with_adapters(sam: SamModel, width: int, generator: torch.Generator | None = None) -> SamModel:
    """Put adapters into all blocks, in place; they, the prompt encoder and the mask decoder are left open to gradients.

    Args:
        sam: a SAM without adapters.
        width: of the bottleneck, at least 1.
        generator: draws D; PyTorch's own when None.

    Raises:
        ConfigError: a width below 1, or adapters that are already there.
    """
    if width < 1:
        raise ConfigError(f"the width of an adapter starts at 1, got {width}")
    if any(True for _ in adapters(sam)):
        raise ConfigError("this SAM carries adapters already: open a fresh copy")
    train_decoder_only(sam)
    for layer in blocks(sam):
        layer.attn.proj = _followed(layer.attn.proj, layer.layer_norm1.weight, width, generator)
        layer.mlp = _followed(layer.mlp, layer.layer_norm2.weight, width, generator)
    return sam


def adapters(sam: SamModel) -> Iterator[BottleneckAdapter]:
    """All adapters, block by block, the attention's before the MLP's."""
    for layer in blocks(sam):
        for place in (layer.attn.proj, layer.mlp):
            if isinstance(place, Adapted):
                yield place.adapter


def adapter_tensors(sam: SamModel) -> dict[str, torch.Tensor]:
    """Live tensors named ``image_encoder.adapters.NNN.(down|up).(weight|bias)``, NNN = 2 * block + (0 attention, 1 MLP)."""
    return {
        f"image_encoder.adapters.{index:03d}.{name}": value
        for index, adapter in enumerate(adapters(sam))
        for name, value in adapter.state_dict().items()
    }


def _followed(module: nn.Module, gain: torch.Tensor, width: int, generator: torch.Generator | None) -> Adapted:
    """The module and its adapter; `gain` ``[dim]`` says how wide the features are, where they live and their type."""
    adapter = BottleneckAdapter(len(gain), width, generator=generator, device=gain.device, dtype=gain.dtype)
    return Adapted(module, adapter)
