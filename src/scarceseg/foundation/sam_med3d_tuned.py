"""SAM-Med3D opened for some classes: patches in, class logits out, no prompts.

As SFR opens SAM (Li et al., TMI 2025), with three axes instead of a mosaic: LoRA on q and v of all blocks (or adapters, or
neither), the mask decoder trained with one token for each class and one for the background.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from scarceseg.foundation.adapters import Adapted, BottleneckAdapter
from scarceseg.foundation.base import Tunable, Tuning
from scarceseg.foundation.sam_med3d import Cube, SamMed3D, z_score
from scarceseg.foundation.sam_med3d_heads import MaskDecoder
from scarceseg.foundation.sam_med3d_net import Block, SamMed3DNet
from scarceseg.foundation.volume_tuning import LowRankQV, TunedVolume, add_lora
from scarceseg.types import ImageBatch, Logits


class TunedSamMed3D(TunedVolume):
    """SAM-Med3D for K classes, most of it frozen; see `SamMed3DModel.tunable`.

    ``[B, C, X, Y, Z]`` to logits ``[B, K, X, Y, Z]``. A patch lies in the middle of the model's cube in its own voxels (their
    millimetres are not known here), made smaller only where it is larger than the cube. Several channels are mixed into one.
    The intensities are z-scored as for prompts, over the voxels above the patch's lowest.

    Mask token c is class c, token 0 the background. They start as copies of the token and the layers for a clear prompt, but the
    background's last layer at 0. What no loss reaches (the estimate of the IoU, the encoding of clicks and masks) stays frozen.

    Args:
        network: is copied and never changed.
        channels, classes, tuning: see `Tunable.tunable`.
        channel, name: of `SamMed3D`.

    Raises:
        ConfigError: see `TunedVolume`.
    """

    network: SamMed3DNet

    def __init__(
        self, network: SamMed3DNet, channels: int, classes: int, tuning: Tuning, *, channel: int | None, name: str
    ) -> None:
        super().__init__(name, channels, classes, tuning, channel)
        self.network = copy.deepcopy(network)
        decoder = self.network.mask_decoder
        _renew_tokens(decoder, classes)
        generator = self._generator()
        if tuning.strategy != "decoder":
            for block in self.network.image_encoder.blocks:
                assert isinstance(block, Block)
                _open_block(block, tuning, generator)
        decoder.iou_prediction_head = nn.Identity()  # type: ignore[assignment]
        self._close(decoder, self.network.prompt_encoder.no_mask_embed)

    def forward(self, image: ImageBatch) -> Logits:
        """Class logits in the frame of the patches.

        Raises:
            DataError: another number of axes or channels than the model was opened for.
        """
        size, side = self._checked(image), self.network.config.img_size
        cube = Cube.around(size, (1.0, 1.0, 1.0), side, None, "shrink")
        volume = self._mixed(image)
        volume = volume - volume.amin(dim=(1, 2, 3, 4), keepdim=True)
        embedding = self.network.image_encoder(z_score(cube.put(volume)))
        low_res = decode_all_tokens(self.network, embedding).float()
        whole = F.interpolate(low_res, size=(side, side, side), mode="trilinear", align_corners=False)
        return cube.take(whole, 0.0)  # nothing of a patch lies outside the cube


def decode_all_tokens(network: SamMed3DNet, embedding: torch.Tensor) -> torch.Tensor:
    """The mask decoder without prompts and with every mask token: logits ``[B, T, 4E, 4E, 4E]`` of ``[B, C, E, E, E]``."""
    decoder, encoder = network.mask_decoder, network.prompt_encoder
    rows = len(embedding)
    own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    _, dense = encoder(None, None, None, rows)
    places = (embedding + dense).flatten(2).transpose(1, 2)
    tokens, places = decoder.transformer(
        own.expand(rows, -1, -1), places, encoder.dense_code().flatten(2).transpose(1, 2)
    )
    upscaled = decoder.output_upscaling(places.transpose(1, 2).unflatten(2, embedding.shape[2:]))
    heads = decoder.output_hypernetworks_mlps
    weights = torch.stack([head(token) for head, token in zip(heads, tokens[:, 1:].unbind(1), strict=True)], dim=1)
    return torch.einsum("btc,bcxyz->btxyz", weights, upscaled)


def _renew_tokens(decoder: MaskDecoder, classes: int) -> None:
    """One token and one head a class from the decoder's own for clear prompts, in place."""
    token, head = decoder.mask_tokens.weight[:1], decoder.output_hypernetworks_mlps[0]
    decoder.mask_tokens = nn.Embedding.from_pretrained(token.detach().repeat(classes, 1), freeze=False)
    decoder.output_hypernetworks_mlps = nn.ModuleList(copy.deepcopy(head) for _ in range(classes))
    last = decoder.output_hypernetworks_mlps[0].get_submodule("layers.2")
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.zero_()


def _open_block(block: Block, tuning: Tuning, generator: torch.Generator) -> None:
    """LoRA on the block's q and v, or adapters behind its attention and its MLP, in place."""
    weight = block.attn.qkv.weight
    if tuning.strategy == "lora":
        add_lora(block.attn.qkv, LowRankQV(weight, tuning.rank, generator))
        return
    behind = [
        BottleneckAdapter(weight.shape[1], tuning.rank, generator=generator, device=weight.device, dtype=weight.dtype)
        for _ in range(2)
    ]
    block.attn.proj = Adapted(block.attn.proj, behind[0])  # type: ignore[assignment]
    block.mlp = Adapted(block.mlp, behind[1])  # type: ignore[assignment]


class SamMed3DModel(SamMed3D, Tunable):
    """`SamMed3D` that can be tuned as well, on patches."""

    sees = "patch"
    slices = False

    def tunable(self, channels: int, classes: int, tuning: Tuning, size: tuple[int, int, int]) -> TunedSamMed3D:
        """A copy opened for K classes; patches need not have `size`, and up to `img_size` (128) voxels a side none is lost.

        ``lora`` trains low-rank additions to q and v and the mask decoder; ``adapter`` bottlenecks behind attention and MLP and
        the mask decoder; ``decoder`` the mask decoder alone.

        Raises:
            ConfigError: a strategy, rank, channel or number of channels or classes that is not possible.
        """
        return TunedSamMed3D(self.network, channels, classes, tuning, channel=self.channel, name=self.name)
