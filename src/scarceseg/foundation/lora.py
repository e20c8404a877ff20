"""LoRA on a SAM image encoder, and the published file of what it tunes.

Every block's query and value projections get a low-rank addition, ``q <- q + B_q A_q x`` and ``v <- v + B_v A_v x`` (Hu et al.,
"LoRA", ICLR 2022, section 4.1; on SAM: Zhang and Liu, "SAMed", 2023, and SFR, Li et al., TMI 2025). Scale 1, no bias, no dropout;
the key projection and all the rest of the encoder stay frozen. The prompt encoder and the mask decoder are trained as a whole.

The file holds ``w_a_NNN`` ``[rank, dim]`` (A) and ``w_b_NNN`` ``[dim, rank]`` (B), NNN = 2 * block for q and 2 * block + 1 for v,
and all ``prompt_encoder.*`` and ``mask_decoder.*`` tensors under the official names of SAM.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import SamModel

from scarceseg.errors import ConfigError, DataError
from scarceseg.foundation.base import freeze
from scarceseg.foundation.sam_keys import to_official

ADAPTER = "default"
TARGETS = r"vision_encoder\.layers\.\d+\.attn\.qkv\.[qv]"
DECODER_PARTS = ("prompt_encoder.", "mask_decoder.")


class SplitQKV(nn.Module):
    """A fused ``qkv`` projection as three, so that q and v can be adapted alone.

    Input ``[..., dim]``, output ``[..., 3 * dim]`` in the order q, k, v, equal to that of the fused layer.
    """

    def __init__(self, qkv: nn.Linear) -> None:
        super().__init__()
        self.q, self.k, self.v = (_linear(*part) for part in _thirds(qkv))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values side by side."""
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)

    def fused(self) -> nn.Linear:
        """One plain layer that does the same; LoRA of q and v is added to the weights."""
        parts = [_merged(part) for part in (self.q, self.k, self.v)]
        biases = [bias for _, bias in parts if bias is not None]
        return _linear(torch.cat([weight for weight, _ in parts]), torch.cat(biases) if biases else None)


def open_with_lora(sam: SamModel, rank: int, generator: torch.Generator | None = None) -> SamModel:
    """Put LoRA on q and v of all blocks, in place, and leave exactly what LoRA tuning trains open to gradients.

    B starts at 0, so that the output does not change; A is Kaiming-uniform with a = sqrt(5), as published.

    Args:
        sam: a SAM whose encoder has fused ``qkv`` layers.
        rank: of A and B, at least 1.
        generator: draws A; PyTorch's own when None.

    Raises:
        ConfigError: a rank below 1, or LoRA that is already there.
    """
    if rank < 1:
        raise ConfigError(f"the rank of LoRA starts at 1, got {rank}")
    for layer in blocks(sam):
        if isinstance(layer.attn.qkv, SplitQKV):
            raise ConfigError("this SAM carries LoRA already: open a fresh copy, or merge it first")
        layer.attn.qkv = SplitQKV(layer.attn.qkv)
    # alpha = rank makes peft's factor alpha / rank equal to 1.
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, lora_dropout=0.0, bias="none")
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, sam, ADAPTER)
    train_decoder_only(sam)
    for a, b in lora_weights(sam):
        fresh(a, lambda values: nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator))
        nn.init.zeros_(b)
        a.requires_grad_(True)
        b.requires_grad_(True)
    return sam


def fresh(parameter: nn.Parameter, draw: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Give a parameter new values drawn on the CPU, so that one seed means the same numbers on every device."""
    with torch.no_grad():
        parameter.copy_(draw(torch.empty(parameter.shape, device="cpu")))


def train_decoder_only(sam: SamModel) -> SamModel:
    """Freeze all but the prompt encoder and the mask decoder; the random Fourier matrix stays as it is."""
    sam.requires_grad_(False)
    sam.prompt_encoder.requires_grad_(True)
    sam.mask_decoder.requires_grad_(True)
    sam.shared_image_embedding.requires_grad_(False)
    sam.prompt_encoder.shared_embedding.requires_grad_(False)
    return sam


def blocks(sam: SamModel) -> list[Any]:
    """Transformer blocks of the image encoder, in order."""
    encoder: Any = sam.vision_encoder
    return list(encoder.layers)


def lora_weights(sam: SamModel) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """Pairs (A ``[rank, dim]``, B ``[dim, rank]``), block by block, q before v: the order of the published file."""
    for layer in blocks(sam):
        if not isinstance(layer.attn.qkv, SplitQKV):
            continue
        for part in (layer.attn.qkv.q, layer.attn.qkv.v):
            assert isinstance(part, LoraLayer)
            yield part.lora_A[ADAPTER].weight, part.lora_B[ADAPTER].weight


def merge_lora(sam: SamModel) -> SamModel:
    """A frozen copy without LoRA layers that computes the same: A and B are added to the weights, ``W <- W + B A``."""
    plain = copy.deepcopy(sam)
    for layer in blocks(plain):
        if isinstance(layer.attn.qkv, SplitQKV):
            layer.attn.qkv = layer.attn.qkv.fused()
    if hasattr(plain, "peft_config"):
        del plain.peft_config
    freeze(plain)
    return plain


def decoder_tensors(sam: SamModel) -> dict[str, torch.Tensor]:
    """Prompt encoder and mask decoder under official names; the values are the live tensors of the model."""
    names = ("shared_image_embedding.", *DECODER_PARTS)
    live = {key: value for key, value in sam.state_dict().items() if key.startswith(names)}
    return {key: value for key, value in to_official(live).items() if key.startswith(DECODER_PARTS)}


def lora_tensors(sam: SamModel) -> dict[str, torch.Tensor]:
    """Everything of the published file, live: LoRA, prompt encoder, mask decoder.

    Raises:
        ConfigError: a model without LoRA, such as a merged one.
    """
    pairs = list(lora_weights(sam))
    if not pairs:
        raise ConfigError("this SAM carries no LoRA: open it with LoRA first (a merged copy has lost it for good)")
    state: dict[str, torch.Tensor] = {f"w_a_{i:03d}": a.detach() for i, (a, _) in enumerate(pairs)}
    state.update({f"w_b_{i:03d}": b.detach() for i, (_, b) in enumerate(pairs)})
    return {**state, **decoder_tensors(sam)}


def lora_state(sam: SamModel) -> dict[str, torch.Tensor]:
    """Content of a LoRA file: copies of what LoRA tuning changes, under the published names."""
    return copies(lora_tensors(sam))


def load_lora_state(sam: SamModel, state: Mapping[str, torch.Tensor]) -> None:
    """Put a LoRA file into a model opened with `open_with_lora`.

    Raises:
        DataError: missing or unexpected names, or other shapes (another rank, size or number of classes).
    """
    fill(lora_tensors(sam), state, "LoRA file")


def copies(live: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Independent copies of live tensors, one storage each, as safetensors wants them."""
    return {key: value.detach().clone().contiguous() for key, value in live.items()}


def fill(live: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], what: str) -> None:
    """Write `state` into live tensors of the same names; nothing is written unless all of it fits.

    Raises:
        DataError: missing or unexpected names, or other shapes.
    """
    problems = _differences("missing", live.keys() - state.keys()) + _differences(
        "unexpected", state.keys() - live.keys()
    )
    if problems:
        raise DataError(f"{what}: the names do not fit this model: {'; '.join(problems)}")
    other = [key for key, value in live.items() if value.shape != state[key].shape]
    if other:
        first = other[0]
        raise DataError(
            f"{what}: {len(other)} tensors have another shape, such as {first}: expected {list(live[first].shape)}, got "
            f"{list(state[first].shape)}; open the model with the file's rank, size and number of classes"
        )
    with torch.no_grad():
        for key, value in live.items():
            value.copy_(state[key])


def _differences(kind: str, names: set[str], shown: int = 6) -> list[str]:
    if not names:
        return []
    listing = ", ".join(sorted(names)[:shown])
    return [f"{len(names)} {kind}: {listing}{' ...' if len(names) > shown else ''}"]


def _thirds(qkv: nn.Linear) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    biases = qkv.bias.chunk(3) if qkv.bias is not None else (None, None, None)
    yield from zip(qkv.weight.chunk(3), biases, strict=True)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    # Built without its own random weights: the draw would move the global generator.
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer


def _merged(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    if isinstance(layer, LoraLayer):
        base, delta = _merged(layer.get_base_layer()), cast(Any, layer).get_delta_weight(ADAPTER)
        return base[0] + delta, base[1]
    assert isinstance(layer, nn.Linear)
    return layer.weight, layer.bias
