"""Two ways to call the tensors of a SAM, and its positional tables on another grid.

Meta's files and Hugging Face's `SamModel` hold the same tensors under other names; only the matrix of the Fourier code stands
twice in the latter. Names that belong to no SAM pass through unchanged, so that a report can show them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F

from scarceseg.errors import DataError

T = TypeVar("T")

# Official beginning, Hugging Face beginning; "#" is a number, an entry without a final dot is a whole name.
_PAIRS = (
    ("image_encoder.pos_embed", "vision_encoder.pos_embed"),
    ("image_encoder.patch_embed.proj.", "vision_encoder.patch_embed.projection."),
    ("image_encoder.blocks.#.norm1.", "vision_encoder.layers.#.layer_norm1."),
    ("image_encoder.blocks.#.norm2.", "vision_encoder.layers.#.layer_norm2."),
    ("image_encoder.blocks.#.", "vision_encoder.layers.#."),
    ("image_encoder.neck.0.", "vision_encoder.neck.conv1."),
    ("image_encoder.neck.1.", "vision_encoder.neck.layer_norm1."),
    ("image_encoder.neck.2.", "vision_encoder.neck.conv2."),
    ("image_encoder.neck.3.", "vision_encoder.neck.layer_norm2."),
    ("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", "shared_image_embedding.positional_embedding"),
    ("prompt_encoder.point_embeddings.#.", "prompt_encoder.point_embed.#."),
    ("prompt_encoder.mask_downscaling.0.", "prompt_encoder.mask_embed.conv1."),
    ("prompt_encoder.mask_downscaling.1.", "prompt_encoder.mask_embed.layer_norm1."),
    ("prompt_encoder.mask_downscaling.3.", "prompt_encoder.mask_embed.conv2."),
    ("prompt_encoder.mask_downscaling.4.", "prompt_encoder.mask_embed.layer_norm2."),
    ("prompt_encoder.mask_downscaling.6.", "prompt_encoder.mask_embed.conv3."),
    ("mask_decoder.transformer.layers.#.norm1.", "mask_decoder.transformer.layers.#.layer_norm1."),
    ("mask_decoder.transformer.layers.#.norm2.", "mask_decoder.transformer.layers.#.layer_norm2."),
    ("mask_decoder.transformer.layers.#.norm3.", "mask_decoder.transformer.layers.#.layer_norm3."),
    ("mask_decoder.transformer.layers.#.norm4.", "mask_decoder.transformer.layers.#.layer_norm4."),
    ("mask_decoder.transformer.norm_final_attn.", "mask_decoder.transformer.layer_norm_final_attn."),
    ("mask_decoder.output_upscaling.0.", "mask_decoder.upscale_conv1."),
    ("mask_decoder.output_upscaling.1.", "mask_decoder.upscale_layer_norm."),
    ("mask_decoder.output_upscaling.3.", "mask_decoder.upscale_conv2."),
)
# The Fourier matrix as image code and as prompt code: one tensor under two names.
FOURIER = ("shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding")
# What depends on the number of mask tokens.
_BY_TOKENS = (
    "mask_decoder.mask_tokens.",
    "mask_decoder.output_hypernetworks_mlps.",
    "mask_decoder.iou_prediction_head.",
)
_MLP = re.compile(r"(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head)\.)(.*)")
_TABLE = re.compile(r"vision_encoder\.layers\.(\d+)\.attn\.rel_pos_[hw]")


def is_hugging_face(names: Collection[str]) -> bool:
    """Whether these are Hugging Face's names and not the official ones."""
    return any(name.startswith(("vision_encoder.", "shared_image_embedding.")) for name in names)


def by_tokens(name: str) -> bool:
    """Whether a tensor's shape or presence depends on the number of mask tokens: the tokens, their heads, the IoU head."""
    return name.startswith(_BY_TOKENS)


def to_hugging_face(state: Mapping[str, T]) -> dict[str, T]:
    """Official names -> those of `SamModel`; the Fourier matrix is given under both of its names.

    Args:
        state: a whole state dict or a part of it (an MLP head must be whole: its last layer has a name of its own).
    """
    last = {prefix: max(map(int, layers)) for prefix, layers in _mlp_layers(state).items()}
    renamed = {_forward(name, last): value for name, value in state.items()}
    for here, there in (FOURIER, FOURIER[::-1]):
        if here in renamed:
            renamed.setdefault(there, renamed[here])
    return renamed


def to_official(state: Mapping[str, T]) -> dict[str, T]:
    """Names of `SamModel` -> official ones; the inverse of `to_hugging_face`, for whole state dicts and for parts."""
    state = dict(state)
    if FOURIER[1] in state:
        copy = state.pop(FOURIER[1])
        state.setdefault(FOURIER[0], copy)
    hidden = {prefix: len(set(layers)) for prefix, layers in _mlp_layers(state).items()}
    return {_backward(name, hidden): value for name, value in state.items()}


def _mlp_layers(names: Collection[str] | Mapping[str, T]) -> dict[str, list[str]]:
    """Numbers of the layers of each MLP head, by the beginning of its name."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        head = _MLP.fullmatch(name)
        layer = head and re.match(r"layers\.(\d+)\.", head[2])
        if head and layer:
            found[head[1]].append(layer[1])
    return found


def _forward(name: str, last: Mapping[str, int]) -> str:
    head = _MLP.fullmatch(name)
    if head is None:
        return _rename(name, _TO_HUGGING_FACE)
    layer = re.fullmatch(r"layers\.(\d+)\.(\w+)", head[2])
    if layer is None:
        return name
    number = int(layer[1])
    if number == 0:
        return f"{head[1]}proj_in.{layer[2]}"
    return f"{head[1]}proj_out.{layer[2]}" if number == last[head[1]] else f"{head[1]}layers.{number - 1}.{layer[2]}"


def _backward(name: str, hidden: Mapping[str, int]) -> str:
    head = _MLP.fullmatch(name)
    if head is None:
        return _rename(name, _TO_OFFICIAL)
    layer = re.fullmatch(r"(proj_in|proj_out|layers\.(\d+))\.(\w+)", head[2])
    if layer is None:
        return name
    number = 0 if layer[1] == "proj_in" else hidden.get(head[1], 0) + 1 if layer[1] == "proj_out" else int(layer[2]) + 1
    return f"{head[1]}layers.{number}.{layer[3]}"


def _rename(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in rules:
        renamed, count = pattern.subn(replacement, name, count=1)
        if count:
            return renamed
    return name


def _rules(pairs: Collection[tuple[str, str]]) -> list[tuple[re.Pattern[str], str]]:
    rules = []
    for source, target in pairs:
        end = "" if source.endswith(".") else "$"
        rules.append((re.compile("^" + re.escape(source).replace(r"\#", r"(\d+)") + end), target.replace("#", r"\1")))
    return rules


_TO_HUGGING_FACE = _rules(_PAIRS)
_TO_OFFICIAL = _rules([(hugging_face, official) for official, hugging_face in _PAIRS])


def resize_tables(
    state: Mapping[str, torch.Tensor], grid: int, global_blocks: Collection[int]
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Fit the positional tables of the image encoder to another image size.

    ``pos_embed`` ``[1, E, E, dim]`` is resized bilinearly over the grid, ``rel_pos_*`` ``[2E - 1, head_dim]`` of the blocks
    with global attention linearly along the first axis, both with ``align_corners=False``. Tables of windowed blocks do not
    depend on the image size.

    Args:
        state: Hugging Face names; not changed.
        grid: E, patches along a side of the new image.
        global_blocks: numbers of the blocks with global attention.

    Returns:
        The state with new tables, and the names of those that changed.

    Raises:
        DataError: a ``pos_embed`` that is no square grid of codes.
    """
    resized: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        table = _TABLE.fullmatch(name)
        if name == "vision_encoder.pos_embed":
            if value.ndim != 4 or value.shape[1] != value.shape[2]:
                raise DataError(f"{name}: expected a square grid [1, E, E, dim], got {list(value.shape)}")
            if value.shape[1] != grid:
                resized[name] = resize_pos_embed(value, grid)
        elif table and int(table[1]) in global_blocks and len(value) != 2 * grid - 1:
            resized[name] = resize_rel_pos(value, 2 * grid - 1)
    return {**state, **resized}, tuple(resized)


def resize_pos_embed(table: torch.Tensor, grid: int) -> torch.Tensor:
    """``[1, E, E, dim]`` -> ``[1, grid, grid, dim]``, bilinear."""
    planes = F.interpolate(table.permute(0, 3, 1, 2), size=(grid, grid), mode="bilinear", align_corners=False)
    return planes.permute(0, 2, 3, 1).contiguous()


def resize_rel_pos(table: torch.Tensor, length: int) -> torch.Tensor:
    """``[L, head_dim]`` -> ``[length, head_dim]``, linear."""
    return F.interpolate(table.T[None], size=length, mode="linear", align_corners=False)[0].T.contiguous()
