"""Sizes of a SAM, read from the shapes of its tensors: ViT-B, -L, -H, MedSAM and small ones need no further description."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from transformers import SamConfig

from scarceseg.errors import ConfigError, DataError
from scarceseg.foundation.sam_keys import is_hugging_face, to_hugging_face

PUBLISHED_HEADS = 8
# Hugging Face's default in the mask decoder is 1e-6; Meta's weights were trained with PyTorch's default.
_DECODER_EPS = 1e-5


def sam_config_from_state(state: Mapping[str, torch.Tensor], decoder_heads: int | None = None) -> SamConfig:
    """The configuration whose model holds exactly these tensors.

    Blocks whose relative tables have 2E - 1 rows for a grid of E x E patches attend globally, the others in windows of (rows
    + 1) / 2. Where both are equal they compute the same; then the blocks that close each quarter of the depth are taken as
    global, as in the published models, which matters only when the image size is changed.

    Args:
        state: a whole state dict, official or Hugging Face names; ``meta`` tensors will do.
        decoder_heads: heads of the mask decoder, the one size that no tensor shows; None is 8, as in all published models.

    Raises:
        DataError: tensors of a SAM are missing or contradict each other, so it is damaged or another model.
        ConfigError: a number of decoder heads that does not divide the decoder's width.
    """
    tensors = state if is_hugging_face(state) else to_hugging_face(state)
    pos_embed, patch = (
        _need(tensors, "vision_encoder.pos_embed", 4),
        _need(tensors, "vision_encoder.patch_embed.projection.weight", 4),
    )
    dim, grid, patch_size = patch.shape[0], pos_embed.shape[1], patch.shape[-1]
    depth = _count(tensors, r"vision_encoder\.layers\.(\d+)\.")
    tables = [_need(tensors, f"vision_encoder.layers.{i}.attn.rel_pos_h", 2) for i in range(depth)]
    if not tables:
        raise DataError("expected the tensors of a SAM, got an image encoder without blocks: the file is damaged")
    window, global_blocks = _attention([len(table) for table in tables], grid)
    width = _need(tensors, "vision_encoder.neck.conv1.weight", 4).shape[0]
    vision = {
        "hidden_size": dim,
        "output_channels": width,
        "num_hidden_layers": depth,
        "num_attention_heads": _heads(dim, tables[0].shape[1]),
        "num_channels": patch.shape[1],
        "image_size": grid * patch_size,
        "patch_size": patch_size,
        "qkv_bias": "vision_encoder.layers.0.attn.qkv.bias" in tensors,
        "window_size": window,
        "global_attn_indexes": global_blocks,
        "num_pos_feats": _need(tensors, "shared_image_embedding.positional_embedding", 2).shape[1],
        "mlp_dim": _need(tensors, "vision_encoder.layers.0.mlp.lin1.weight", 2).shape[0],
    }
    prompt = {
        "hidden_size": width,
        "image_size": grid * patch_size,
        "patch_size": patch_size,
        "mask_input_channels": _need(tensors, "prompt_encoder.mask_embed.conv2.weight", 4).shape[0],
        "num_point_embeddings": _count(tensors, r"prompt_encoder\.point_embed\.(\d+)\."),
    }
    return SamConfig(
        vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=_decoder(tensors, width, decoder_heads)
    )


def _decoder(tensors: Mapping[str, torch.Tensor], width: int, heads: int | None) -> dict[str, Any]:
    layer = "mask_decoder.transformer.layers.0."
    inner = _need(tensors, f"{layer}cross_attn_token_to_image.q_proj.weight", 2).shape[0]
    heads = PUBLISHED_HEADS if heads is None else heads
    if heads < 1 or inner % heads or width % heads:
        raise ConfigError(
            f"{heads} heads do not divide the mask decoder's widths {width} and {inner}: tell the number of decoder heads"
        )
    return {
        "hidden_size": width,
        "mlp_dim": _need(tensors, f"{layer}mlp.lin1.weight", 2).shape[0],
        "num_hidden_layers": _count(tensors, r"mask_decoder\.transformer\.layers\.(\d+)\."),
        "num_attention_heads": heads,
        "attention_downsample_rate": width // max(inner, 1),
        "num_multimask_outputs": len(_need(tensors, "mask_decoder.mask_tokens.weight", 2)) - 1,
        "iou_head_depth": _count(tensors, r"mask_decoder\.iou_prediction_head\.layers\.(\d+)\.") + 2,
        "iou_head_hidden_dim": len(_need(tensors, "mask_decoder.iou_prediction_head.proj_in.weight", 2)),
        "layer_norm_eps": _DECODER_EPS,
    }


def corrected(config: SamConfig) -> SamConfig:
    """A copy with the norm of the mask decoder as Meta trained it; the configurations on the Hub say 1e-6."""
    copy = SamConfig.from_dict(config.to_dict())
    parts(copy)[2].layer_norm_eps = _DECODER_EPS
    return copy


def resized(config: SamConfig, image_size: int | None, mask_tokens: int | None) -> SamConfig:
    """A copy for another image size and number of mask tokens (None leaves it).

    Raises:
        ConfigError: a size that is no multiple of the patch size, or no mask token.
    """
    copy = SamConfig.from_dict(config.to_dict())
    vision, prompt, decoder = parts(copy)
    if image_size is not None:
        if image_size < 1 or image_size % vision.patch_size:
            near = max(round(image_size / vision.patch_size), 1) * vision.patch_size
            raise ConfigError(
                f"this SAM takes images with sides that are multiples of {vision.patch_size}, got {image_size}: take {near}"
            )
        vision.image_size = prompt.image_size = image_size
        prompt.image_embedding_size = image_size // vision.patch_size
    if mask_tokens is not None:
        if mask_tokens < 1:
            raise ConfigError(f"a SAM has at least 1 mask token, got {mask_tokens}")
        decoder.num_multimask_outputs = mask_tokens - 1
    return copy


def parts(config: SamConfig) -> tuple[Any, Any, Any]:
    """Configurations of image encoder, prompt encoder and mask decoder, whose types the library leaves open."""
    return (
        cast(Any, config.vision_config),
        cast(Any, config.prompt_encoder_config),
        cast(Any, config.mask_decoder_config),
    )


def _need(tensors: Mapping[str, torch.Tensor], name: str, ndim: int) -> torch.Tensor:
    if name not in tensors:
        examples = ", ".join(sorted(tensors)[:3]) or "none"
        raise DataError(
            f"expected the tensors of a SAM, but {name} is missing (there are {len(tensors)}, such as {examples}): the file is "
            "incomplete or holds another model"
        )
    if tensors[name].ndim != ndim:
        raise DataError(
            f"expected the tensors of a SAM, but {name} has the shape {list(tensors[name].shape)}: it holds another model"
        )
    return tensors[name]


def _count(names: Collection[str] | Mapping[str, Any], pattern: str) -> int:
    """How many numbers, from 0 on, stand in names of this pattern."""
    numbers = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    return len(numbers)


def _heads(dim: int, head_dim: int) -> int:
    if head_dim < 1 or dim % head_dim:
        raise DataError(
            f"a width of {dim} does not split into heads of {head_dim}: the file is damaged or another model"
        )
    return dim // head_dim


def _attention(lengths: list[int], grid: int) -> tuple[int, list[int]]:
    """Window size and numbers of the global blocks, from the lengths of the relative tables."""
    whole, kinds = 2 * grid - 1, set(lengths)
    if kinds == {whole}:
        step = len(lengths) // 4 if len(lengths) % 4 == 0 else 1
        return grid, list(range(step - 1, len(lengths), step))
    # Tables left at another image size are longer than windows; the model resizes them.
    if whole not in kinds and len(kinds) == 2:
        whole = max(kinds)
    windows = kinds - {whole}
    if len(windows) > 1:
        raise DataError(
            f"relative tables of a SAM have one length beside {whole}, got {sorted(windows)}: another model"
        )
    return (windows.pop() + 1) // 2, [i for i, length in enumerate(lengths) if length == whole]
