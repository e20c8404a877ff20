"""The full layout of an architecture at the sizes that a file of weights shows: names and shapes, no values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from scarceseg.config import NetworkConfig
from scarceseg.errors import DataError

Kind = Literal[
    "sam-official", "sam-hf", "sam-med3d", "sam-lora", "sam-tuned", "tiny-sam", "tiny-sam3d", "student", "unknown"
]
"""``sam-official`` and ``sam-hf`` are one architecture under Meta's and Hugging Face's names; ``sam-lora`` is a LoRA file of the
published naming, ``sam-tuned`` the decoder (and adapters) that other tuning saves; ``student`` a network a run trained."""

Shapes = Mapping[str, torch.Tensor]
"""Tensors by name whose values are not read; the device may be ``meta``."""
Layout = tuple[dict[str, torch.Tensor], dict[str, Any]]
"""Expected ``meta`` tensors by name, and the sizes that tell models of a kind apart."""


def layout(kind: Kind, state: Shapes, metadata: Mapping[str, str]) -> Layout:
    """The full layout of the architecture that tensors belong to, at the sizes they show.

    Args:
        kind: as `kind_of` gives it; neither ``student`` nor ``unknown``.
        state: tensors by name; their values are not read.
        metadata: of a safetensors file.

    Returns:
        ``meta`` tensors by the names of the file's own naming, and the sizes that tell such models apart.

    Raises:
        DataError, ConfigError: the sizes cannot be told from the tensors, nor is it one of the published models.
    """
    if kind == "sam-med3d":
        return _med3d_layout(state)
    if kind == "tiny-sam3d":
        return _tiny3d_layout(metadata)
    if kind in {"sam-lora", "sam-tuned"}:
        return _tuned_layout(state)
    return _sam_layout(state, metadata)


def _sam_layout(state: Shapes, metadata: Mapping[str, str]) -> Layout:
    from transformers import SamModel

    from scarceseg.foundation.sam_config import parts
    from scarceseg.foundation.sam_keys import FOURIER, is_hugging_face, to_official

    config = _sam_config(state, metadata)
    try:
        with torch.device("meta"):
            expected: dict[str, torch.Tensor] = dict(SamModel(config).state_dict())
    except Exception as error:  # a network of impossible sizes fails in many ways
        raise DataError(f"its configuration describes no SAM ({error}); get the file again") from None
    if not is_hugging_face(state):
        expected = to_official(expected)
    elif FOURIER[0] in state or FOURIER[1] in state:
        # One matrix under two names; files may hold either or both.
        expected = {name: value for name, value in expected.items() if name in state or name not in FOURIER}
    vision, _, decoder = parts(config)
    sizes = {
        "image size": vision.image_size,
        "patch": vision.patch_size,
        "width": vision.hidden_size,
        "blocks": vision.num_hidden_layers,
        "mask tokens": decoder.num_multimask_outputs + 1,
    }
    return expected, sizes


def _sam_config(state: Shapes, metadata: Mapping[str, str]) -> Any:
    """Sizes read from the tensors, or those of the published model of the same width when a tensor that tells one is missing."""
    from transformers import SamConfig

    from scarceseg.foundation.sam_config import sam_config_from_state

    if "config" in metadata:  # our own files carry theirs
        try:
            return SamConfig.from_dict(json.loads(metadata["config"]))
        except Exception as error:  # the library checks each field in its own way
            raise DataError(f"its configuration cannot be read ({error}); get the file again") from None
    heads = metadata.get("decoder_heads", "")
    try:
        return sam_config_from_state(state, int(heads) if heads.isdigit() else None)
    except DataError:
        widths = {"image_encoder.blocks.0.norm1.weight", "vision_encoder.layers.0.layer_norm1.weight"} & state.keys()
        width = state[widths.pop()].numel() if widths else 0
        if width not in _PUBLISHED_SAM:
            raise
        depth, attention_heads = _PUBLISHED_SAM[width]
        vision = {
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_attention_heads": attention_heads,
            "mlp_dim": 4 * width,
            "global_attn_indexes": list(range(depth // 4 - 1, depth, depth // 4)),
        }
        return SamConfig(vision_config=vision)


_PUBLISHED_SAM = {768: (12, 12), 1024: (24, 16), 1280: (32, 16)}
"""Blocks and attention heads of ViT-B, -L and -H, by width."""


def _med3d_layout(state: Shapes) -> Layout:
    from scarceseg.foundation.sam_med3d_net import SamMed3DConfig, SamMed3DNet

    try:
        config = SamMed3DConfig.from_state(state)
    except DataError:
        norm = state.get("image_encoder.blocks.0.norm1.weight")
        config = SamMed3DConfig()
        if norm is None or norm.numel() != config.embed_dim:
            raise
    with torch.device("meta"):
        expected = SamMed3DNet(config).state_dict()
    names = {
        "img_size": "cube",
        "patch_size": "patch",
        "embed_dim": "width",
        "depth": "blocks",
        "mask_tokens": "mask tokens",
    }
    return expected, {word: getattr(config, name) for name, word in names.items()}


def _tiny3d_layout(metadata: Mapping[str, str]) -> Layout:
    from scarceseg.foundation.tiny_sam3d_net import TinySam3DConfig, TinySam3DNet

    try:
        config = TinySam3DConfig.from_dict(json.loads(metadata.get("config", "{}")))
        with torch.device("meta"):
            expected = TinySam3DNet(config).state_dict()
    except Exception as error:  # a network of impossible sizes fails in many ways
        raise DataError(f"its configuration cannot be read ({error}); get the file again") from None
    return expected, {"full": config.full, "widths": list(config.widths)}


def _tuned_layout(state: Shapes) -> Layout:
    """LoRA pairs, adapters and a channel projection as far as there are any, and a whole prompt encoder and mask decoder."""
    from scarceseg.foundation.lora import DECODER_PARTS

    decoder = {name: tensor for name, tensor in state.items() if name.startswith(DECODER_PARTS)}
    tokens = state.get("mask_decoder.mask_tokens.weight")
    if tokens is None or tokens.ndim != 2:
        raise DataError("mask_decoder.mask_tokens.weight is missing: the file is incomplete, get it again")
    whole, _ = _sam_layout({**decoder, **_stand_in_encoder(tokens.shape[1])}, {})
    expected = {name: tensor for name, tensor in whole.items() if name.startswith(DECODER_PARTS)}
    sizes: dict[str, Any] = {"mask tokens": len(tokens)}
    numbers = [int(name[4:]) for name in state if name[:4] in {"w_a_", "w_b_"} and name[4:].isdigit()]
    if numbers:
        blocks = max(numbers) // 2 + 1
        first = next(
            (state[name] for name in sorted(state) if name.startswith("w_a_")), torch.empty(0, 0, device="meta")
        )
        rank, width = first.shape
        for index in range(2 * blocks):
            expected[f"w_a_{index:03d}"] = torch.empty(rank, width, device="meta")
            expected[f"w_b_{index:03d}"] = torch.empty(width, rank, device="meta")
        sizes |= {"rank": rank, "width": width, "blocks": blocks}
    extra = ("image_encoder.adapters.", "channel_projection.")
    return expected | {name: tensor for name, tensor in state.items() if name.startswith(extra)}, sizes


def _stand_in_encoder(width: int) -> dict[str, torch.Tensor]:
    """Shapes of an image encoder of one block, so that the sizes of a decoder can be told without its own encoder."""
    shapes = {
        "pos_embed": (1, 4, 4, 16),
        "patch_embed.proj.weight": (16, 3, 16, 16),
        "blocks.0.attn.rel_pos_h": (7, 16),
        "blocks.0.mlp.lin1.weight": (64, 16),
        "neck.0.weight": (width, 16, 1, 1),
    }
    return {f"image_encoder.{name}": torch.empty(shape, device="meta") for name, shape in shapes.items()}


def student_layout(run: Path) -> Layout:
    """The layout of the network that ``model.json`` of a run describes.

    Raises:
        DataError, ConfigError: the description is damaged, or names a network that cannot be built here.
    """
    from scarceseg.networks.base import build_network

    try:
        info = json.loads((run / "model.json").read_bytes())
        config = NetworkConfig.model_validate(info["network"])
        channels, classes = len(info["channels"]), len(info["classes"])
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"{run / 'model.json'} is no description of a model; copy both files of the run again"
        ) from None
    network = build_network(config.name, channels, classes, config.args)
    return network.state_dict(), {"network": config.name, "channels": channels, "classes": classes}
