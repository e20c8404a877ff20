"""Segment Anything (Kirillov et al., ICCV 2023) through Hugging Face's `SamModel`: built from any file, run in tensors.

`load_sam` reads a file or folder, `build_sam` takes tensors; `image_embedding` is the expensive part, `decode` the cheap one.
The numbers are those of Meta's code; where Hugging Face's defaults differ (the norm of the mask decoder), Meta's are used.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import SamConfig, SamModel

from scarceseg.errors import DataError
from scarceseg.foundation.base import freeze
from scarceseg.foundation.sam_config import corrected, parts, resized, sam_config_from_state
from scarceseg.foundation.sam_keys import (
    FOURIER,
    by_tokens,
    is_hugging_face,
    resize_tables,
    to_hugging_face,
    to_official,
)
from scarceseg.foundation.weights import read_tensors

__all__ = [
    "LoadReport",
    "build_sam",
    "decode",
    "image_embedding",
    "image_size_of",
    "load_sam",
    "normalise_pixels",
    "sam_config_from_state",
    "upsample_masks",
]

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
"""Of the RGB images, 0..255, that SAM was trained on."""


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors of a file; names are those of the file's own naming.

    Attributes:
        missing: the model has them, the file has not; they hold fresh values.
        unexpected: the file has them, the model has not.
        resized: positional tables brought to another image size.
        fresh: depend on the number of mask tokens, which was changed, and hold fresh values.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every name fits; tables that were resized and heads that were asked to be fresh are no fault."""
        return not (self.missing or self.unexpected)

    @property
    def text(self) -> str:
        """One line for each kind of finding, with the first names."""
        words = {
            "missing, filled with fresh values": self.missing,
            "unexpected, not used": self.unexpected,
            "resized to another image size": self.resized,
            "fresh for another number of masks": self.fresh,
        }
        found = [f"{len(names)} tensors {what}: {_some(names)}" for what, names in words.items() if names]
        return "\n".join(found) or "every tensor fits"


def _some(names: Sequence[str], shown: int = 4) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def build_sam(
    config: SamConfig,
    state: Mapping[str, torch.Tensor],
    image_size: int | None = None,
    mask_tokens: int | None = None,
) -> tuple[SamModel, LoadReport]:
    """A SAM with the values of a state dict, in float32 and evaluation mode.

    Args:
        config: sizes of the model, such as `sam_config_from_state` gives.
        state: official or Hugging Face names; its tensors are copied.
        image_size: side of the images in pixels; None keeps the configuration's. Positional tables are resized to it.
        mask_tokens: number of mask tokens (SAM's own count is 4); None keeps the configuration's. Where the state has
            another, the tokens, their heads and the IoU head get fresh values from PyTorch's global generator.

    Raises:
        DataError: a tensor with the right name and another shape.
        ConfigError: an image size or number of tokens that is not possible.
    """
    config = resized(config, image_size, mask_tokens)
    vision, _, decoder = parts(config)
    official = not is_hugging_face(state)
    tensors = to_hugging_face(state if official else to_official(state))  # gives the Fourier matrix both of its names
    fresh: set[str] = set()
    with torch.device("meta"):
        sam = SamModel(config)
    wanted = sam.state_dict()
    tokens = tensors.get("mask_decoder.mask_tokens.weight")
    if tokens is not None and len(tokens) != decoder.num_multimask_outputs + 1:
        fresh = {name for name in wanted if by_tokens(name)}
        tensors = {name: value for name, value in tensors.items() if not by_tokens(name)}
    blocks = [i for i in range(vision.num_hidden_layers) if i in vision.global_attn_indexes]
    tensors, tables = resize_tables(tensors, vision.image_size // vision.patch_size, blocks)
    missing, unexpected = wanted.keys() - tensors.keys() - fresh, tensors.keys() - wanted.keys()
    _check_shapes({name: tensors[name] for name in tensors if name in wanted}, wanted)
    values = {name: tensors[name].detach().to(torch.float32, copy=True) for name in tensors if name in wanted}
    sam.load_state_dict(values, strict=False, assign=True)
    sam.prompt_encoder.shared_embedding.positional_embedding = sam.shared_image_embedding.positional_embedding
    _fill(sam)
    names = _file_names(wanted) if official else {}
    groups = (missing, unexpected, tables, fresh)
    report = LoadReport(*(tuple(sorted({names.get(name, name) for name in group})) for group in groups))
    return sam.eval(), report


def load_sam(path: Path, image_size: int | None = None) -> tuple[SamModel, LoadReport]:
    """Read a SAM; no code in a file is ever run.

    Args:
        path: official ``.pth``, ``.safetensors`` of either naming (a ``decoder_heads`` entry of its metadata is followed), or
            a Hugging Face folder with ``config.json`` and the weights.
        image_size: side of the images in pixels; None keeps the file's.

    Returns:
        The frozen model, in evaluation mode, and what became of the tensors. Tensors that belong to no SAM are a warning.

    Raises:
        DataError: there is no such file; it is damaged, holds code, is incomplete, or holds another model.
        ConfigError: an image size that is no multiple of the patch size.
    """
    from scarceseg.foundation.identify import weights_file

    path = Path(path)
    state, metadata = read_tensors(weights_file(path))
    try:
        if path.is_dir():
            config = _read_config(path / "config.json")
        else:
            heads = metadata.get("decoder_heads", "")
            config = sam_config_from_state(state, int(heads) if heads.isdigit() else None)
        sam, report = build_sam(config, state, image_size)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    if report.missing:
        raise DataError(
            f"{path}: expected all tensors of a SAM, {len(report.missing)} are missing, such as {_some(report.missing)}; get "
            "the whole file, 'scarceseg foundations check' lists what it lacks"
        )
    if not report.ok:
        warnings.warn(f"{path}: {report.text}", stacklevel=2)
    freeze(sam)
    return sam, report


def _read_config(path: Path) -> SamConfig:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("model_type") != "sam":
            kind = content.get("model_type") if isinstance(content, dict) else type(content).__name__
            raise DataError(f"expected model_type 'sam' in config.json, got {kind!r}: the folder holds another model")
        return corrected(SamConfig.from_dict(content))
    except OSError as error:
        raise DataError(
            f"cannot read config.json ({error.strerror or error}): give the file with the weights"
        ) from None
    except DataError:
        raise
    except Exception as error:  # the library's own checks raise many kinds
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(f"config.json is damaged or no configuration of a SAM ({line}); get it again") from None


def _check_shapes(tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    other = [name for name, value in tensors.items() if value.shape != wanted[name].shape]
    if other:
        first = other[0]
        raise DataError(
            f"{len(other)} tensors of this SAM have another shape, such as {first}: expected {list(wanted[first].shape)}, got "
            f"{list(tensors[first].shape)}; the sizes told and the file do not belong together"
        )


def _fill(sam: SamModel) -> None:
    """Give every parameter that got no value a fresh one: a layer's own draw, zeros for tables."""
    for module in sam.modules():
        empty = [name for name, value in module.named_parameters(recurse=False) if value.is_meta]
        for name in empty:
            setattr(module, name, nn.Parameter(torch.zeros(getattr(module, name).shape, device="cpu")))
        reset = getattr(module, "reset_parameters", None)
        if empty and reset is not None and len(empty) == len(list(module.parameters(recurse=False))):
            reset()


def _file_names(wanted: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Hugging Face name -> official name of each tensor of a model."""
    names = {name: official for official, name in to_official({name: name for name in wanted}).items()}
    return names | {FOURIER[1]: names[FOURIER[0]]}


def image_size_of(sam: SamModel) -> int:
    """Side S of the images the model takes, in pixels."""
    return int(parts(sam.config)[0].image_size)


def normalise_pixels(image: torch.Tensor) -> torch.Tensor:
    """Intensities 0..255 ``[..., 3, H, W]`` as SAM takes them: its mean removed, over its deviation, channel by channel."""
    mean, std = (image.new_tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return (image - mean) / std


@torch.no_grad()
def image_embedding(sam: SamModel, pixels: torch.Tensor) -> torch.Tensor:
    """Run the image encoder.

    Args:
        sam: the model.
        pixels: ``[N, 3, S, S]`` normalised pixels, zeros beyond the image at the right and at the bottom.

    Returns:
        ``[N, D, E, E]`` with E = S / patch size.
    """
    features: torch.Tensor = sam.vision_encoder(pixels).last_hidden_state
    return features


@torch.no_grad()
def decode(
    sam: SamModel,
    embedding: torch.Tensor,
    points: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    boxes: torch.Tensor | None = None,
    masks: torch.Tensor | None = None,
    multimask: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Answer prompts. All rows of a call have the same kinds of prompt and number of points.

    Args:
        sam: the model.
        embedding: ``[P, D, E, E]``, or ``[1, D, E, E]`` for P prompts on one image.
        points: ``[P, N, 2]`` pixel indices (x, y), x along columns; 0.5 is added inside. Without a box, the point of label
            -1 that the official code appends is appended here too.
        labels: ``[P, N]`` 1 inside, 0 outside, -1 no point.
        boxes: ``[P, 4]`` first and last pixel (x0, y0, x1, y1).
        masks: ``[P, 1, 4E, 4E]`` logits of a mask.
        multimask: give masks 1, 2, ... of an ambiguous prompt instead of mask 0.

    Returns:
        Low-resolution logits ``[P, M, 4E, 4E]`` and the estimated IoU ``[P, M]``, as the head gives it (not cut to [0, 1]).
    """
    given = [prompt for prompt in (points, boxes, masks) if prompt is not None]
    rows = len(given[0]) if given else len(embedding)
    # A batch row for each prompt: only so may rows have masks of their own.
    sparse, dense = sam.prompt_encoder(
        input_points=None if points is None else points[:, None].float(),
        input_labels=None if labels is None else labels[:, None].int(),
        input_boxes=None if boxes is None else boxes[:, None].float(),
        input_masks=masks,
    )
    logits, quality = sam.mask_decoder(
        image_embeddings=embedding.float().expand(rows, -1, -1, -1),
        image_positional_embeddings=sam.get_image_wide_positional_embeddings().expand(rows, -1, -1, -1),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask,
    )
    return logits[:, 0], quality[:, 0]


def upsample_masks(
    low_res: torch.Tensor, image_size: int, shown: tuple[int, int], original: tuple[int, int]
) -> torch.Tensor:
    """Masks in the frame of the image before it was resized and padded.

    Args:
        low_res: ``[P, M, 4E, 4E]`` logits of `decode`.
        image_size: S.
        shown: rows and columns that the resized image takes of S x S.
        original: rows and columns before.

    Returns:
        ``[P, M, *original]`` logits: bilinear to S x S, cut, bilinear to the original, as in the official code.
    """
    whole = F.interpolate(low_res, size=(image_size, image_size), mode="bilinear", align_corners=False)
    return F.interpolate(whole[..., : shown[0], : shown[1]], size=original, mode="bilinear", align_corners=False)
