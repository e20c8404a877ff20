"""The cheap side of SAM-Med3D: clicks and masks to codes (`PromptEncoder`), codes and an embedding to masks (`MaskDecoder`).

Axes: ``C`` features, ``E`` tokens a side of the embedding, ``N`` clicks, ``T`` tokens of the decoder, ``M`` masks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class LayerNorm3d(nn.LayerNorm):
    """Normalisation over the channel axis of ``[B, C, x, y, z]`` at every place."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised, in the same axes."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class TwoLinear(nn.Module):
    """Linear, activation, linear on the last axis."""

    def __init__(self, dim: int, hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.lin1 = nn.Linear(dim, hidden)
        self.lin2 = nn.Linear(hidden, dim)
        self.act = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        result: torch.Tensor = self.lin2(self.act(self.lin1(x)))
        return result


class ThreeLinear(nn.Module):
    """Three linear layers with ReLU between them, on the last axis."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(inputs, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, outputs)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., inputs]`` to ``[..., outputs]``."""
        first, second, third = self.layers
        result: torch.Tensor = third(F.relu(second(F.relu(first(x)))))
        return result


class PositionCode(nn.Module):
    """Random Fourier code of a place: ``[sin t, cos t, sin t]`` with ``t = 2 pi (2c - 1) G``, ``G: [3, C/3]``."""

    positional_encoding_gaussian_matrix: torch.Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.zeros(3, channels // 3))

    def forward(self, place: torch.Tensor) -> torch.Tensor:
        """``[..., C]`` of places ``[..., 3]`` in [0, 1]."""
        t = 2 * math.pi * ((2 * place - 1) @ self.positional_encoding_gaussian_matrix)
        return torch.cat([t.sin(), t.cos(), t.sin()], dim=-1)


class PromptEncoder(nn.Module):
    """Clicks to sparse codes, a mask to a dense code.

    Args:
        channels: C.
        img_size: voxels a side of the cube that clicks live in.
        grid: E.
        mask_in_chans: channels inside the encoder of masks, a multiple of 4.
    """

    def __init__(self, channels: int, img_size: int, grid: int, mask_in_chans: int) -> None:
        super().__init__()
        self.img_size, self.grid = img_size, grid
        self.pe_layer = PositionCode(channels)
        # Outside and inside; a box has no embeddings in this model.
        self.point_embeddings = nn.ModuleList([nn.Embedding(1, channels) for _ in range(2)])
        self.not_a_point_embed = nn.Embedding(1, channels)
        self.no_mask_embed = nn.Embedding(1, channels)
        self.mask_downscaling = nn.Sequential(
            nn.Conv3d(1, mask_in_chans // 4, 2, stride=2),
            LayerNorm3d(mask_in_chans // 4),
            nn.GELU(),
            nn.Conv3d(mask_in_chans // 4, mask_in_chans, 2, stride=2),
            LayerNorm3d(mask_in_chans),
            nn.GELU(),
            nn.Conv3d(mask_in_chans, channels, 1),
        )

    def dense_code(self) -> torch.Tensor:
        """Code ``[1, C, E, E, E]`` of the places of the embedding's tokens.

        Token (i0, i1, i2) has the code of the place ``((i1+0.5)/E, (i0+0.5)/E, (i2+0.5)/E)``: its first two axes are exchanged
        against those of the clicks. The published implementation does so, and its weights were trained with it.
        """
        centre = (torch.arange(self.grid, device=self.no_mask_embed.weight.device) + 0.5) / self.grid
        i0, i1, i2 = torch.meshgrid(centre, centre, centre, indexing="ij")
        code: torch.Tensor = self.pe_layer(torch.stack([i1, i0, i2], dim=-1))
        return code.movedim(-1, 0)[None]

    def sparse_code(self, points: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Codes ``[B, N + 1, C]`` of clicks; the last one stands for "no box".

        Args:
            points: ``[B, N, 3]`` voxel indices in the cube, centres of voxels at whole numbers.
            labels: ``[B, N]`` 1 inside, 0 outside.
        """
        place = self.pe_layer((points + 0.5) / self.img_size)
        kinds = torch.cat([embedding.get_parameter("weight") for embedding in self.point_embeddings])
        no_box = self.not_a_point_embed.weight.expand(len(points), 1, -1)
        return torch.cat([place + kinds[labels.long()], no_box], dim=1)

    def forward(
        self, points: torch.Tensor | None, labels: torch.Tensor | None, mask: torch.Tensor | None, batch: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode one prompt per row.

        Args:
            points, labels: see `sparse_code`; None for no clicks.
            mask: ``[B, 1, 4E, 4E, 4E]`` logits, or None.
            batch: B where there are neither clicks nor a mask.

        Returns:
            Sparse ``[B, N + 1, C]`` (``[B, 0, C]`` without clicks) and dense ``[B, C, E, E, E]``.
        """
        none = self.no_mask_embed.weight
        rows = len(points) if points is not None else len(mask) if mask is not None else batch
        sparse = none.new_zeros(rows, 0, none.shape[1])
        if points is not None and labels is not None:
            sparse = self.sparse_code(points, labels)
        if mask is not None:
            return sparse, self.mask_downscaling(mask)
        return sparse, none[:, :, None, None, None].expand(rows, -1, self.grid, self.grid, self.grid)


class Attention(nn.Module):
    """Attention between two sets of tokens, in `inner` dimensions."""

    def __init__(self, dim: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, inner)
        self.k_proj = nn.Linear(dim, inner)
        self.v_proj = nn.Linear(dim, inner)
        self.out_proj = nn.Linear(inner, dim)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """``[B, Tq, C]`` from queries ``[B, Tq, C]``, keys and values ``[B, Tk, C]``."""
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        )
        result: torch.Tensor = self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return result


class TwoWayBlock(nn.Module):
    """Tokens look at each other and at the image, then the image looks at the tokens.

    Args:
        dim, heads, mlp_dim: sizes.
        first: the first block attends among the tokens without code and without residual.
    """

    def __init__(self, dim: int, heads: int, mlp_dim: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.self_attn = Attention(dim, heads, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn_token_to_image = Attention(dim, heads, dim // 2)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = TwoLinear(dim, mlp_dim, nn.ReLU())
        self.norm3 = nn.LayerNorm(dim)
        self.norm4 = nn.LayerNorm(dim)
        self.cross_attn_image_to_token = Attention(dim, heads, dim // 2)

    def forward(
        self, tokens: torch.Tensor, image: torch.Tensor, initial: torch.Tensor, code: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """New tokens ``[B, T, C]`` and image ``[B, E^3, C]``; `initial` and `code` are the tokens' and the image's codes."""
        if self.first:
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            placed = tokens + initial
            tokens = tokens + self.self_attn(placed, placed, tokens)
        tokens = self.norm1(tokens)
        placed_image = image + code
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + initial, placed_image, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.cross_attn_image_to_token(placed_image, tokens + initial, tokens))
        return tokens, image


class TwoWayTransformer(nn.Module):
    """Some `TwoWayBlock` and a last look of the tokens at the image."""

    def __init__(self, dim: int, depth: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([TwoWayBlock(dim, heads, mlp_dim, first=i == 0) for i in range(depth)])
        self.final_attn_token_to_image = Attention(dim, heads, dim // 2)
        self.norm_final_attn = nn.LayerNorm(dim)

    def forward(
        self, tokens: torch.Tensor, image: torch.Tensor, code: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens ``[B, T, C]`` and image ``[B, E^3, C]`` after they have seen each other; `code` is the image's."""
        initial = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, initial, code)
        seen = self.final_attn_token_to_image(tokens + initial, image + code, image)
        return self.norm_final_attn(tokens + seen), image


class MaskDecoder(nn.Module):
    """Embedding and codes of a prompt to masks and estimates of their IoU.

    Args:
        channels: C.
        masks: M; mask 0 is for clear prompts, the others for ambiguous ones.
        iou_hidden_dim: width of the head that estimates the IoU.
        depth, heads, mlp_dim: of the transformer.
    """

    def __init__(self, channels: int, masks: int, iou_hidden_dim: int, depth: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.transformer = TwoWayTransformer(channels, depth, heads, mlp_dim)
        self.iou_token = nn.Embedding(1, channels)
        self.mask_tokens = nn.Embedding(masks, channels)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose3d(channels, channels // 4, 2, stride=2),
            LayerNorm3d(channels // 4),
            nn.GELU(),
            nn.ConvTranspose3d(channels // 4, channels // 8, 2, stride=2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(
            [ThreeLinear(channels, channels, channels // 8) for _ in range(masks)]
        )
        self.iou_prediction_head = ThreeLinear(channels, iou_hidden_dim, masks)

    def forward(
        self,
        embedding: torch.Tensor,
        code: torch.Tensor,
        sparse: torch.Tensor,
        dense: torch.Tensor,
        multimask: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Answer one prompt per row.

        Args:
            embedding: ``[B, C, E, E, E]`` of the image encoder.
            code: ``[1, C, E, E, E]`` of `PromptEncoder.dense_code`.
            sparse, dense: of the prompt encoder.
            multimask: masks 1 to M - 1 instead of mask 0.

        Returns:
            Logits ``[B, 1 or M - 1, 4E, 4E, 4E]`` and estimated IoU ``[B, 1 or M - 1]`` (no sigmoid: mostly in [0, 1]).
        """
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([own.expand(len(sparse), -1, -1), sparse], dim=1)
        image = (embedding + dense).flatten(2).transpose(1, 2)
        tokens, image = self.transformer(tokens, image, code.flatten(2).transpose(1, 2))
        upscaled = self.output_upscaling(image.transpose(1, 2).unflatten(2, embedding.shape[2:]))
        chosen = range(1, len(self.output_hypernetworks_mlps)) if multimask else range(1)
        weights = torch.stack([self.output_hypernetworks_mlps[k](tokens[:, 1 + k]) for k in chosen], dim=1)
        logits = torch.einsum("bmc,bcxyz->bmxyz", weights, upscaled)
        return logits, self.iou_prediction_head(tokens[:, 0])[:, chosen.start : chosen.stop]
