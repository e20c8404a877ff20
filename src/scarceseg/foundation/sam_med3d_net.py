"""SAM-Med3D's network under the names of its published files: sizes, image encoder, and all parts together.

Wang et al., "SAM-Med3D", arXiv:2310.15161: Segment Anything (Kirillov et al., ICCV 2023) with three axes. Two oddities of its
relative and absolute positional codes are part of the trained weights and kept: see `GridAttention` and
`sam_med3d_heads.PromptEncoder.dense_code`. Where the published implementation computes rows that it throws away, this one does
not; the numbers are the same to rounding.

Axes: ``D`` features of a token, ``C`` features of the prompt and mask side, ``E = img_size / patch_size`` tokens a side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from scarceseg.errors import DataError
from scarceseg.foundation.sam_med3d_heads import LayerNorm3d, MaskDecoder, PromptEncoder, TwoLinear


@dataclass(frozen=True)
class SamMed3DConfig:
    """Sizes of a SAM-Med3D; the defaults are the published ViT-B.

    Attributes:
        img_size: voxels a side of the cube it sees.
        patch_size: voxels a side of a token.
        embed_dim, depth, num_heads, mlp_dim: of the image encoder.
        window_size: tokens a side of the windows of the blocks that are not in `global_attn_indexes`.
        global_attn_indexes: blocks that attend to the whole cube.
        prompt_embed_dim: C.
        mask_in_chans: channels inside the encoder of dense masks.
        mask_tokens: masks the decoder gives: one for clear prompts, the others for ambiguous ones.
        iou_hidden_dim: width of the head that estimates the IoU.
        decoder_depth, decoder_heads, decoder_mlp_dim: of the two-way transformer.
    """

    img_size: int = 128
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    window_size: int = 14
    global_attn_indexes: tuple[int, ...] = (2, 5, 8, 11)
    prompt_embed_dim: int = 384
    mask_in_chans: int = 16
    mask_tokens: int = 4
    iou_hidden_dim: int = 256
    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_mlp_dim: int = 2048

    @property
    def grid(self) -> int:
        """E: tokens a side."""
        return self.img_size // self.patch_size

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> SamMed3DConfig:
        """Sizes read from the tensors of a file; only the decoder's 8 heads leave no trace in them.

        Args:
            state: tensors by published name; their values are not read (the device may be ``meta``).

        Raises:
            DataError: a tensor that tells a size is missing or has an impossible shape.
        """
        position = _shape(state, "image_encoder.pos_embed", 5)
        grid, width = position[1], position[4]
        if position != (1, grid, grid, grid, width):
            raise DataError(f"image_encoder.pos_embed: expected [1, E, E, E, D] with one side E, got {list(position)}")
        depth = _count(state, "image_encoder.blocks.")
        head_dim = _shape(state, "image_encoder.blocks.0.attn.rel_pos_d", 2)[1]
        if width % head_dim:
            raise DataError(f"image_encoder.blocks.0.attn.rel_pos_d: {width} features do not divide by {head_dim}")
        names = {i: f"image_encoder.blocks.{i}.attn.rel_pos_d" for i in range(depth)}
        sides = {i: (_shape(state, name, 2)[0] + 1) // 2 for i, name in names.items() if name in state}
        windows = {side for side in sides.values() if side != grid}
        if len(windows) > 1:
            raise DataError(
                f"expected windows of one size in all blocks, the tables rel_pos_d are for {sorted(windows)}"
            )
        patch = _shape(state, "image_encoder.patch_embed.proj.weight", 5)
        if patch != (width, 1, *[patch[-1]] * 3):
            raise DataError(f"image_encoder.patch_embed.proj.weight: expected [{width}, 1, P, P, P], got {list(patch)}")
        return cls(
            img_size=grid * patch[-1],
            patch_size=patch[-1],
            embed_dim=width,
            depth=depth,
            num_heads=width // head_dim,
            mlp_dim=_shape(state, "image_encoder.blocks.0.mlp.lin1.weight", 2)[0],
            window_size=next(iter(windows), grid),
            global_attn_indexes=tuple(i for i, side in sides.items() if side == grid),
            prompt_embed_dim=_shape(state, "image_encoder.neck.0.weight", 5)[0],
            mask_in_chans=_shape(state, "prompt_encoder.mask_downscaling.3.weight", 5)[0],
            mask_tokens=_shape(state, "mask_decoder.mask_tokens.weight", 2)[0],
            iou_hidden_dim=_shape(state, "mask_decoder.iou_prediction_head.layers.0.weight", 2)[0],
            decoder_depth=_count(state, "mask_decoder.transformer.layers."),
            decoder_mlp_dim=_shape(state, "mask_decoder.transformer.layers.0.mlp.lin1.weight", 2)[0],
        )


def _shape(state: Mapping[str, torch.Tensor], name: str, axes: int) -> tuple[int, ...]:
    if name not in state:
        raise DataError(f"this is no whole SAM-Med3D: the tensor {name} is missing; get the file again")
    shape = tuple(state[name].shape)
    if len(shape) != axes or 0 in shape:
        raise DataError(f"{name}: expected {axes} axes, got shape {list(shape)}; is this a SAM-Med3D file?")
    return shape


def _count(state: Mapping[str, torch.Tensor], prefix: str) -> int:
    numbers = [name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)]
    return 1 + max((int(number) for number in numbers if number.isdigit()), default=0)


class GridAttention(nn.Module):
    """Attention among the tokens of cubes of `side` tokens, with relative positions.

    With query i = (i0, i1, i2), key j, side L and q(.) the unscaled query *at the place given*, the score of a pair is

        q(i).k(j) / sqrt(head_dim) + q(i0, i1, i2).Rd[i0-j2+L-1] + q(i0, i1, j0).Rh[i1-j2+L-1] + q(i0, i1, j1).Rw[j1-j2+L-1]

    A regular relative code would be q(i).Rd[i0-j0+L-1] + q(i).Rh[i1-j1+L-1] + q(i).Rw[i2-j2+L-1]. The exchanged axes are those
    of the published implementation; its weights were trained with them, so that the regular form would spoil them.
    """

    def __init__(self, dim: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads, self.side = heads, side
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        for axis in "dhw":
            self.register_parameter(f"rel_pos_{axis}", nn.Parameter(torch.zeros(2 * side - 1, dim // heads)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend within windows of `side` tokens.

        Args:
            x: ``[B, E, E, E, D]``. Windows that reach beyond it are filled with zeros, and these tokens take part: their query,
                key and value are the bias of `qkv`.
        """
        batch, grid, side = x.shape[0], x.shape[1], self.side
        count = math.ceil(grid / side)
        gap = count * side - grid
        # A token of zeros needs no product: padding after the product and before the bias gives its query, key and value.
        qkv = F.pad(F.linear(x, self.qkv.weight), (0, 0, *[0, gap] * 3)) + self.qkv.bias
        windows = qkv.reshape(batch, count, side, count, side, count, side, -1)
        windows = windows.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch * count**3, side, side, side, 3, self.heads, -1)
        # Where one window holds the whole grid, the answers of the tokens of zeros are not wanted.
        asked = min(grid, side)
        q, k, v = windows.permute(4, 0, 5, 1, 2, 3, 6)
        answer = self._attend(q, k, v, asked)
        answer = answer.reshape(batch, count, count, count, asked, asked, asked, -1)
        answer = answer.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(batch, *[count * asked] * 3, -1)
        result: torch.Tensor = self.proj(answer[:, :grid, :grid, :grid])
        return result

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, asked: int) -> torch.Tensor:
        """Answers ``[W, asked^3, D]`` to the first `asked` queries a side of ``[W, heads, L, L, L, head_dim]``."""
        first = q[:, :, :asked, :asked]
        query = first[:, :, :, :, :asked].flatten(2, 4)
        score = self._positions(first, asked).to(q.dtype)
        answer = F.scaled_dot_product_attention(query, k.flatten(2, 4), v.flatten(2, 4), attn_mask=score)
        return answer.transpose(1, 2).flatten(2)

    def _positions(self, q: torch.Tensor, asked: int) -> torch.Tensor:
        """The three relative terms ``[W, heads, asked^3, L^3]`` from the queries ``[W, heads, asked, asked, L, head_dim]``.

        Each term depends on four of the six indices i0 i1 i2 j0 j1 j2 alone, so that the sum is made by broadcasting.
        """
        side = self.side
        index = torch.arange(side, device=q.device)
        offset = index[:, None] - index + side - 1  # [a, b]: place of a - b in a table
        rel_d, rel_h, rel_w = (getattr(self, f"rel_pos_{axis}")[offset].to(q.dtype) for axis in "dhw")
        # In the equations below a, b, c are i0, i1 and the third place of q; z is j2.
        d = torch.einsum("whabcf,azf->whabcz", q[..., :asked, :], rel_d[:asked])
        h = torch.einsum("whabcf,bzf->whabcz", q, rel_h[:asked])
        w = torch.einsum("whabcf,czf->whabcz", q, rel_w)
        score = d[:, :, :, :, :, None, None] + (h[:, :, :, :, None, :, None] + w[:, :, :, :, None, None])
        return score.reshape(*q.shape[:2], asked**3, side**3)


class Block(nn.Module):
    """Transformer block of the image encoder; the tokens of windows are normalised before zeros are added."""

    def __init__(self, config: SamMed3DConfig, side: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.attn = GridAttention(config.embed_dim, config.num_heads, side)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.mlp = TwoLinear(config.embed_dim, config.mlp_dim, nn.GELU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, E, E, E, D]``, the same out."""
        x = x + self.attn(self.norm1(x))
        result: torch.Tensor = x + self.mlp(self.norm2(x))
        return result


class PatchEmbedding(nn.Module):
    """Tokens ``[B, E, E, E, D]`` of a cube ``[B, 1, S, S, S]``."""

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(1, dim, patch, stride=patch)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Each patch becomes a token."""
        tokens: torch.Tensor = self.proj(image)
        return tokens.movedim(1, -1)


class ImageEncoder(nn.Module):
    """Cube ``[B, 1, S, S, S]`` of z-scored intensities to its embedding ``[B, C, E, E, E]``."""

    def __init__(self, config: SamMed3DConfig) -> None:
        super().__init__()
        dim, grid, out = config.embed_dim, config.grid, config.prompt_embed_dim
        self.patch_embed = PatchEmbedding(dim, config.patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, grid, dim))
        sides = [grid if i in config.global_attn_indexes else config.window_size for i in range(config.depth)]
        self.blocks = nn.Sequential(*[Block(config, side) for side in sides])
        self.neck = nn.Sequential(
            nn.Conv3d(dim, out, 1, bias=False),
            LayerNorm3d(out),
            nn.Conv3d(out, out, 3, padding=1, bias=False),
            LayerNorm3d(out),
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Embed a batch of cubes."""
        tokens = self.blocks(self.patch_embed(image) + self.pos_embed)
        result: torch.Tensor = self.neck(tokens.movedim(-1, 1))
        return result


class SamMed3DNet(nn.Module):
    """Image encoder, prompt encoder and mask decoder together.

    Args:
        config: sizes.
    """

    def __init__(self, config: SamMed3DConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or SamMed3DConfig()
        self.image_encoder = ImageEncoder(c)
        self.prompt_encoder = PromptEncoder(c.prompt_embed_dim, c.img_size, c.grid, c.mask_in_chans)
        self.mask_decoder = MaskDecoder(
            c.prompt_embed_dim, c.mask_tokens, c.iou_hidden_dim, c.decoder_depth, c.decoder_heads, c.decoder_mlp_dim
        )

    def forward(
        self,
        embedding: torch.Tensor,
        points: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        multimask: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Answer one prompt per row of ``image_encoder(cube)``.

        Args:
            embedding: ``[B, C, E, E, E]``.
            points: ``[B, N, 3]`` clicks in voxels of the cube, or None.
            labels: ``[B, N]`` 1 inside, 0 outside, or None.
            mask: ``[B, 1, 4E, 4E, 4E]`` logits, or None.
            multimask: three masks for an ambiguous prompt instead of one.

        Returns:
            Logits ``[B, M, 4E, 4E, 4E]`` and estimated IoU ``[B, M]``, M = 1, or 3 with `multimask`.
        """
        sparse, dense = self.prompt_encoder(points, labels, mask, len(embedding))
        result: tuple[torch.Tensor, torch.Tensor] = self.mask_decoder(
            embedding, self.prompt_encoder.dense_code(), sparse, dense, multimask
        )
        return result
