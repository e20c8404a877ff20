"""A 2D SAM tuned on volumes laid out as mosaics of slices: the fine-tuning step of SFR (Li et al., TMI 2025).

A volume becomes one image (`stitching`), a SAM without prompts gives one mask per class and one for the background, and the masks
are cut back into the volume. Between the two frames there is nothing but the layout, so that a loss on the volume is the loss on
the mosaic without its empty cells (as long as slices are not resized).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import SamModel
from transformers.models.sam.modeling_sam import SamFeedForward

from scarceseg.errors import ConfigError, DataError
from scarceseg.foundation.adapters import adapter_tensors, open_with_adapters
from scarceseg.foundation.base import Tunable, TunedModel, Tuning, freeze
from scarceseg.foundation.lora import (
    copies,
    decoder_tensors,
    fill,
    lora_tensors,
    merge_lora,
    open_with_lora,
    train_decoder_only,
)
from scarceseg.foundation.sam import image_size_of
from scarceseg.foundation.sam_config import parts
from scarceseg.foundation.stitching import Stitch
from scarceseg.types import ImageBatch, Logits


@dataclass(frozen=True)
class MosaicOptions:
    """How volumes become mosaics, and how a SAM is opened on them.

    Attributes:
        layout: ``fitted`` chooses grid and number of canvases from the size; ``published`` is SFR's script, padding and all.
        resize: let the fitted layout scale slices to their cells, for whole volumes on a small canvas.
        augment: in training mode, each canvas is turned by a random one of the eight rotations and flips of a square (SFR's
            2D augmentation) and its masks are turned back.
        tokens: ``fresh`` mask tokens, or the SAM's ``own``, which needs as many as there are classes.
        checkpointing: compute the encoder's blocks again in the backward pass: about a third more time, far less memory.
        seed: of the new weights; drawn from PyTorch's generator when None.
    """

    layout: Literal["fitted", "published"] = "fitted"
    resize: bool = False
    augment: bool = True
    tokens: Literal["fresh", "own"] = "fresh"
    checkpointing: bool = False
    seed: int | None = None


class TunedSam(TunedModel):
    """A SAM for K classes on mosaics, most of it frozen.

    ``[B, C, X, Y, Z]`` z-scored intensities to logits ``[B, K, X, Y, Z]``; mask token c is class c, token 0 the background. The
    SAM's own pixel mean and deviation are not used, as in SFR.

    Channels: one is repeated to SAM's three; two become (a, b, mean of both); three are taken as they are; any other number
    goes through a trained 1x1 projection that starts as the mean.

    Differs from the authors' code: mask tokens are fresh for every number of classes (the script keeps SAM's own when the
    numbers happen to agree; ``tokens="own"`` does that); cells without a slice get no gradient at all, while the script
    leaves their squared probabilities in the Dice denominator.

    Args:
        sam: any SAM; it is copied and never changed.
        channels: image channels C.
        classes: K, background included.
        tuning: what is trained. ``lora``: LoRA on q and v, prompt encoder and decoder; ``decoder``: prompt encoder and
            decoder; ``adapter``: bottlenecks behind attention and MLP, prompt encoder and decoder.
        size: voxels (X, Y, Z) of the volumes or patches.
        options: see `MosaicOptions`.

    Raises:
        ConfigError: a strategy, rank, number of classes or channels, size or layout that is not possible.
    """

    def __init__(
        self,
        sam: SamModel,
        channels: int,
        classes: int,
        tuning: Tuning,
        size: tuple[int, int, int],
        options: MosaicOptions | None = None,
    ) -> None:
        super().__init__()
        self.options = options or MosaicOptions()
        self.tuning = tuning
        self.channels = channels
        self.size = size
        tuning.check("a SAM", channels, classes)
        seed = self.options.seed
        if seed is None:
            seed = int(torch.randint(2**62, (), device="cpu"))
        self.sam = copy.deepcopy(sam)
        if self.options.tokens == "fresh":
            renew_tokens(self.sam, classes, seed)
        elif self.sam.mask_decoder.num_mask_tokens != classes:
            own = self.sam.mask_decoder.num_mask_tokens
            raise ConfigError(f"this SAM has {own} mask tokens, {classes} classes need {classes}: use tokens='fresh'")
        self._open(torch.Generator().manual_seed(seed))
        self.canvas = image_size_of(sam)
        self.stitch = _layout(size, self.canvas, self.options)
        self.projection = _projection(channels, int(parts(sam.config)[0].num_channels), self.sam)
        self._generator: torch.Generator | None = None
        self.train(self.training)

    def _open(self, generator: torch.Generator) -> None:
        if self.tuning.strategy == "lora":
            open_with_lora(self.sam, self.tuning.rank, generator)
        elif self.tuning.strategy == "adapter":
            open_with_adapters(self.sam, self.tuning.rank, generator)
        else:
            train_decoder_only(self.sam)

    def train(self, mode: bool = True) -> TunedSam:
        """Training mode for what is trained; the encoder stays in evaluation mode, so that its dropout never acts."""
        super().train(mode)
        self.sam.vision_encoder.eval()
        return self

    def forward(self, image: ImageBatch) -> Logits:
        """Class logits in the frame of the volumes.

        Args:
            image: ``[B, C, X, Y, Z]`` z-scored intensities of the size the model was opened for.

        Raises:
            DataError: another number of axes, channels or voxels.
        """
        self._check(image)
        canvas = self._sam_channels(self.stitch.stitch(image))
        turns = self._draw_turns(len(canvas)) if self.training and self.options.augment else []
        low_res, _ = self.decode(self.encode(turn(canvas, turns)))
        return self.stitch.unstitch(self.upsample(turn_back(low_res, turns)))

    def encode(self, canvas: torch.Tensor) -> torch.Tensor:
        """Image embedding ``[N, D, S/p, S/p]`` of canvases ``[N, 3, S, S]``; no gradient when the encoder is not tuned."""
        encoder = self.sam.vision_encoder
        trained = self.tuning.strategy != "decoder" or self.projection is not None
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            hidden = encoder.patch_embed(canvas)
            if encoder.pos_embed is not None:
                hidden = hidden + encoder.pos_embed
            for layer in encoder.layers:
                if self.options.checkpointing and torch.is_grad_enabled():
                    hidden = checkpoint(layer, hidden, use_reentrant=False)
                else:
                    hidden = layer(hidden)
            features: torch.Tensor = encoder.neck(hidden)
        return features

    def decode(self, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Low-resolution logits ``[N, K, 4S/p, 4S/p]`` and the estimated IoU ``[N, K]`` of all mask tokens, without prompts."""
        return decode_all_tokens(self.sam, embedding)

    def upsample(self, low_res: torch.Tensor) -> torch.Tensor:
        """Bilinear to the canvas, ``[N, K, S, S]`` float32 under any precision of the network."""
        return F.interpolate(low_res.float(), size=(self.canvas, self.canvas), mode="bilinear", align_corners=False)

    def merged(self) -> TunedSam:
        """A frozen copy for prediction, LoRA added to the weights; it computes the same and cannot be tuned on."""
        plain = copy.deepcopy(self)
        plain.sam = merge_lora(plain.sam)
        freeze(plain)
        return plain

    def tuned_state(self) -> dict[str, torch.Tensor]:
        """Copies of what tuning changes: the published LoRA file, or official names of prompt encoder and decoder.

        Adapters are added as ``image_encoder.adapters.NNN.*``, a projection of the channels as ``channel_projection.weight``.
        """
        return copies(self._tuned_tensors())

    def load_tuned_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put back what `tuned_state` gave, or a published LoRA file.

        Raises:
            DataError: missing or unexpected names, or other shapes.
        """
        fill(self._tuned_tensors(), state, f"tuned SAM ({self.tuning.strategy})")

    def seed_augmentation(self, seed: int) -> None:
        """Draw the turns of the canvases from a generator of this model's own; until then PyTorch's global one is used."""
        self._generator = torch.Generator().manual_seed(seed)

    def augmentation_state(self) -> torch.Tensor | None:
        """State of the own generator, to be saved with a checkpoint; None when there is none."""
        return None if self._generator is None else self._generator.get_state()

    def set_augmentation_state(self, state: torch.Tensor | None) -> None:
        """Go on drawing from where `augmentation_state` was taken."""
        self._generator = None
        if state is not None:
            self._generator = torch.Generator()
            self._generator.set_state(state.cpu())

    def _draw_turns(self, count: int) -> list[int]:
        drawn: list[int] = torch.randint(8, (count,), generator=self._generator, device="cpu").tolist()
        return drawn

    def _tuned_tensors(self) -> dict[str, torch.Tensor]:
        state = lora_tensors(self.sam) if self.tuning.strategy == "lora" else decoder_tensors(self.sam)
        if self.tuning.strategy == "adapter":
            state = {**adapter_tensors(self.sam), **state}
        if self.projection is not None:
            state["channel_projection.weight"] = self.projection.weight.detach()
        return state

    def _sam_channels(self, canvas: torch.Tensor) -> torch.Tensor:
        if self.projection is not None:
            projected: torch.Tensor = self.projection(canvas)
            return projected
        wanted = int(parts(self.sam.config)[0].num_channels)
        if self.channels == wanted:
            return canvas
        if self.channels == 1:
            return canvas.expand(-1, wanted, -1, -1)
        return torch.cat([canvas, canvas.mean(dim=1, keepdim=True)], dim=1)

    def _check(self, image: ImageBatch) -> None:
        expected = (self.channels, *self.size)
        if image.ndim != 5 or tuple(image.shape[1:]) != expected:
            raise DataError(
                f"this tuned SAM was opened for [B, {', '.join(map(str, expected))}] (channels and voxels), got "
                f"{list(image.shape)}: cut the volume into patches of that size, or open the model for another size"
            )


class TunableSam(Tunable):
    """Any SAM as a `Tunable`; to be mixed into an adapter that has the network, or used alone.

    Args:
        name: for messages and results.
        sam: the frozen original.
        mosaic: layout and options of what `tunable` hands out.
    """

    def __init__(self, name: str, sam: SamModel, mosaic: MosaicOptions | None = None) -> None:
        self.name = name
        self.sam = sam
        self.mosaic = mosaic or MosaicOptions()

    def tunable(self, channels: int, classes: int, tuning: Tuning, size: tuple[int, int, int]) -> TunedSam:
        """A copy opened for K classes; see `TunedSam`."""
        return TunedSam(self.sam, channels, classes, tuning, size, self.mosaic)


def decode_all_tokens(sam: SamModel, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask decoder without prompts and with every mask token, not SAM's choice of one or three of them.

    Args:
        sam: the model; its prompt encoder gives the "no mask" code.
        embedding: ``[N, D, E, E]`` of the image encoder.

    Returns:
        Logits ``[N, T, 4E, 4E]`` and estimated IoU ``[N, T]`` of the T mask tokens.
    """
    decoder = sam.mask_decoder
    tokens, image = decoder_features(sam, embedding)
    iou_token, mask_tokens = tokens[:, 0], tokens[:, 1 : 1 + decoder.num_mask_tokens].unbind(1)
    weights = [mlp(token) for mlp, token in zip(decoder.output_hypernetworks_mlps, mask_tokens, strict=True)]
    logits = torch.einsum("ntc,nchw->nthw", torch.stack(weights, dim=1), image)
    return logits, decoder.iou_prediction_head(iou_token)


def decoder_features(sam: SamModel, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the mask decoder makes masks of, without prompts.

    Args:
        sam, embedding: see `decode_all_tokens`.

    Returns:
        Tokens ``[N, 1 + T, D]`` (the one for the IoU first) and the upscaled image ``[N, D/8, 4E, 4E]``.
    """
    decoder = sam.mask_decoder
    count, _, height, width = embedding.shape
    tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    no_mask = sam.prompt_encoder.no_mask_embed.weight[:, :, None, None]
    position = sam.get_image_wide_positional_embeddings()
    tokens, image = decoder.transformer(
        point_embeddings=tokens.expand(count, 1, -1, -1),
        image_embeddings=embedding + no_mask,
        image_positional_embeddings=position.expand(count, -1, -1, -1),
        attention_similarity=None,
    )
    image = image.reshape(count, height, width, -1).permute(0, 3, 1, 2)
    image = decoder.activation(decoder.upscale_layer_norm(decoder.upscale_conv1(image)))
    return tokens[:, 0], decoder.activation(decoder.upscale_conv2(image))


def renew_tokens(sam: SamModel, count: int, seed: int) -> None:
    """Give the decoder `count` fresh mask tokens, their heads and an IoU head, in place; initialised as in the official SAM."""
    decoder, config = sam.mask_decoder, parts(sam.config)[2]
    dim = decoder.hidden_size
    home = decoder.mask_tokens.weight
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokens = nn.Embedding(count, dim)
        heads = nn.ModuleList([SamFeedForward(dim, dim, dim // 8, 3) for _ in range(count)])
        quality = SamFeedForward(dim, config.iou_head_hidden_dim, count, config.iou_head_depth)
    decoder.mask_tokens = tokens.to(home)
    decoder.output_hypernetworks_mlps = heads.to(home)
    decoder.iou_prediction_head = quality.to(home)
    decoder.num_mask_tokens = count
    decoder.num_multimask_outputs = config.num_multimask_outputs = count - 1


def turn(images: torch.Tensor, turns: list[int]) -> torch.Tensor:
    """Turn each square image ``[..., S, S]`` by its number: quarter turns (0..3), and a flip from 4 on; [] for none."""
    if not turns:
        return images
    return torch.stack([_flip(torch.rot90(x, k % 4, (-2, -1)), k) for x, k in zip(images, turns, strict=True)])


def turn_back(images: torch.Tensor, turns: list[int]) -> torch.Tensor:
    """The inverse of `turn`."""
    if not turns:
        return images
    return torch.stack([torch.rot90(_flip(x, k), -(k % 4), (-2, -1)) for x, k in zip(images, turns, strict=True)])


def _flip(image: torch.Tensor, number: int) -> torch.Tensor:
    return image.flip(-1) if number >= 4 else image


def _layout(size: tuple[int, int, int], canvas: int, options: MosaicOptions) -> Stitch:
    if options.layout == "published":
        stitch = Stitch.published(size, canvas)
        lost = int((~stitch.covered()).sum())
        if lost:
            raise ConfigError(
                f"the published layout of {'x'.join(map(str, size))} voxels on {canvas}x{canvas} pixels leaves {lost} of them "
                "out: take smaller patches, or layout='fitted'"
            )
        return stitch
    return Stitch.fit(size, canvas, resize=options.resize)


def _projection(channels: int, wanted: int, sam: SamModel) -> nn.Conv2d | None:
    if channels in (1, wanted) or (channels, wanted) == (2, 3):
        return None
    home = sam.mask_decoder.mask_tokens.weight
    projection = nn.utils.skip_init(
        nn.Conv2d, channels, wanted, kernel_size=1, bias=False, device=home.device, dtype=home.dtype
    )
    nn.init.constant_(projection.weight, 1 / channels)
    return projection
