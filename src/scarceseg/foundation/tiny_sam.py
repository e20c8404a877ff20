"""`tiny-sam`: a small SAM for stitched mosaics, pre-trained on synthetic volumes alone, in the package. (ours)

The network is `transformers.SamModel` with small numbers in its config. Whatever its voxels, a volume is brought to the one grid
the canvas was made for (56 x 56 x 49: seven by seven tiles of 56 pixels) and seen whole, so that a place on the canvas is a place
in the volume. That absolute position is worth a lot with few labels, where volumes are cropped alike.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import SamConfig, SamModel

from scarceseg.errors import DataError
from scarceseg.files import write_atomic
from scarceseg.foundation.base import Tunable, TunedModel, Tuning, freeze
from scarceseg.foundation.identify import compare
from scarceseg.foundation.sam import image_size_of
from scarceseg.foundation.sam_tuned import MosaicOptions, TunedSam
from scarceseg.foundation.tiny_sam3d import resample_whole
from scarceseg.foundation.weights import read_tensors
from scarceseg.types import ImageBatch, Logits

KIND = "tiny-sam"
GRID = 7
"""Tiles along each side of the canvas."""

Size = tuple[int, int, int]


class TinySam(Tunable):
    """The small SAM, to be tuned on whole volumes. It was not taught to answer prompts, and offers none.

    Args:
        sam: the network; it is frozen.
        name: for messages and results.
        augment: let tuning turn and flip the mosaic, as SFR does. Off, because it hides where in the volume a tile lies.
    """

    sees = "volume"
    usual_rank = 16
    usual_lr = 4e-3

    def __init__(self, sam: SamModel, name: str = KIND, augment: bool = False) -> None:
        side = image_size_of(sam)
        self.seen: Size = (side // GRID, side // GRID, GRID * GRID)
        self.sam, self.name = sam, name
        self.mosaic = MosaicOptions(augment=augment)
        freeze(sam)

    @classmethod
    def from_file(cls, path: Path, name: str = KIND, augment: bool = False) -> TinySam:
        """Read a file of `save_tiny_sam`.

        Raises:
            DataError: no such file, damaged, or not of this model.
        """
        return cls(read_tiny_sam(path), name, augment)

    def tunable(self, channels: int, classes: int, tuning: Tuning, size: Size) -> TunedModel:
        """A copy opened for K classes that sees each volume whole; volumes need not have `size`, it only names the usual one."""
        tuned = TunedSam(self.sam, channels, classes, tuning, self.seen, self.mosaic)
        return WholeVolume(tuned, self.seen)


class WholeVolume(TunedModel):
    """A tuned network of one fixed grid, for volumes of any size: resampled on the way in, and logits on the way out.

    Args:
        inner: what is tuned.
        seen: voxels ``(X, Y, Z)`` it was opened for.
    """

    def __init__(self, inner: TunedModel, seen: Size) -> None:
        super().__init__()
        self.inner, self.seen = inner, seen

    def forward(self, image: ImageBatch) -> Logits:
        """Class logits in the frame of the volumes.

        Raises:
            DataError: another number of axes or channels than the network was opened for.
        """
        if image.ndim != 5:
            raise DataError(f"a tuned {KIND} takes volumes [B, C, X, Y, Z], got {list(image.shape)}")
        size = (image.shape[2], image.shape[3], image.shape[4])
        logits: Logits = self.inner(resample_whole(image, self.seen))
        return resample_whole(logits, size)

    def tuned_state(self) -> dict[str, torch.Tensor]:
        """See `TunedModel.tuned_state`."""
        return self.inner.tuned_state()

    def load_tuned_state(self, state: dict[str, torch.Tensor]) -> None:
        """See `TunedModel.load_tuned_state`."""
        self.inner.load_tuned_state(state)


def tiny_sam_config(tile: int = 56, patch: int = 8, width: int = 192, depth: int = 6) -> SamConfig:
    """Sizes of the network: canvas 392 = 7 x 7 tiles of 56, tokens of 8 pixels, 6 blocks of width 192.

    Windows of 7 tokens are exactly one slice; every other block looks at the whole mosaic. There are no relative positions: a
    distance on the mosaic is not a distance in the volume (and without them attention needs a fifth of the time on a CPU).
    """
    side, common = GRID * tile, {"hidden_size": 128}
    return SamConfig(
        vision_config={
            "hidden_size": width,
            "output_channels": 128,
            "num_hidden_layers": depth,
            "num_attention_heads": width // 32,
            "image_size": side,
            "patch_size": patch,
            "window_size": tile // patch,
            "global_attn_indexes": list(range(1, depth, 2)),
            "num_pos_feats": 64,
            "mlp_dim": 4 * width,
            "initializer_range": 0.02,
            "use_rel_pos": False,
        },
        prompt_encoder_config=common | {"image_size": side, "patch_size": patch, "mask_input_channels": 16},
        mask_decoder_config=common | {"mlp_dim": 256, "num_attention_heads": 4, "iou_head_hidden_dim": 64},
    )


def save_tiny_sam(path: Path, sam: SamModel, note: dict[str, str] | None = None) -> None:
    """Write the weights in half precision, with the config in the file's own description.

    Args:
        path: a ``.safetensors`` file.
        sam: what is written.
        note: how it was made; kept in the file.
    """
    state = {key: value.detach().cpu().half().contiguous().clone() for key, value in sam.state_dict().items()}
    about = {"kind": KIND, "config": json.dumps(sam.config.to_dict())} | (note or {})
    write_atomic(path, lambda file: save_file(state, file, metadata=about))


def read_tiny_sam(path: Path) -> SamModel:
    """Read what `save_tiny_sam` wrote; single precision again.

    Raises:
        DataError: no such file, damaged, or not of this model.
    """
    state, about = read_tensors(path)
    if about.get("kind") != KIND:
        raise DataError(f"{path} holds {about.get('kind', 'weights of another model')}, expected {KIND}")
    try:
        sam = SamModel(SamConfig.from_dict(json.loads(about["config"])))
    except Exception as error:  # the library's own checks raise many kinds
        reason = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[-1].strip()
        raise DataError(f"{path} does not fit {KIND}: {reason}; get it again") from None
    missing, unexpected, reshaped = compare(state, sam.state_dict())
    if missing or unexpected or reshaped:
        wrong = ", ".join([*missing, *unexpected, *reshaped][:3])
        raise DataError(
            f"{path} does not fit {KIND}: {wrong} and so on are missing, too many or of another shape; get it again"
        )
    sam.load_state_dict({key: value.float() for key, value in state.items()})
    return sam


def start_tiny_sam(seed: int = 0) -> SamModel:
    """A fresh network for pre-training.

    The decoder starts as the original does, and positions with unit frequency: Hugging Face's own first weights (deviation
    0.02, frequency 64) are meant to be overwritten by a checkpoint, and from them clicks cannot be located. The absolute table
    starts as a code of the place in the volume.
    """
    torch.manual_seed(seed)
    sam = SamModel(tiny_sam_config())
    for part in (sam.prompt_encoder, sam.mask_decoder, sam.vision_encoder.neck):
        for module in part.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.ConvTranspose2d | torch.nn.Embedding):
                module.reset_parameters()
    frequencies = sam.shared_image_embedding.positional_embedding
    frequencies.requires_grad_(False)
    frequencies.data.normal_(0, 2.0)
    table = sam.vision_encoder.pos_embed
    assert table is not None
    with torch.no_grad():
        table.copy_(0.5 * _volume_code(table.shape[1] // GRID, table.shape[-1]))
    return sam


def _volume_code(tokens: int, width: int) -> torch.Tensor:
    """Sines and cosines of each token's place in the volume ``[1, E, E, width]``, a third of the channels an axis."""
    place = torch.arange(tokens, dtype=torch.float32) / tokens
    depth = torch.arange(GRID**2, dtype=torch.float32) / GRID**2
    parts = []
    for axis in torch.meshgrid(place, place, depth, indexing="ij"):
        waves = math.pi * 2 ** torch.linspace(0, 4, width // 6) * axis[..., None]
        parts += [waves.sin(), waves.cos()]
    code = torch.cat(parts, -1)  # [x, y, z, width], to rows of tiles, y, columns of tiles, x
    code = code.reshape(tokens, tokens, GRID, GRID, width).permute(2, 1, 3, 0, 4)
    return code.reshape(1, GRID * tokens, GRID * tokens, width)
