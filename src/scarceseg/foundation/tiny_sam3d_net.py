"""The network of `tiny-sam3d`: a residual 3D encoder that is paid once a volume, and a small head that is paid per prompt.

The head sees, at half resolution, where the clicks, the box and the last mask are, and how much each voxel's feature
resembles the features under the clicks (the cue that lets one click select a region); it looks at the embedding again at
three scales.
Everything is convolutional: any volume whose sides are multiples of 16 goes in. (ours)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

MULTIPLE = 16
"""Sides of a volume must be multiples of this."""


@dataclass(frozen=True)
class TinySam3DConfig:
    """Sizes of the network.

    Attributes:
        full: channels at full resolution.
        gates: of them, channels the head switches on and off to draw the border between half-resolution voxels.
        widths: channels at 1/2, 1/4, 1/8 and 1/16.
        head: channels of the prompt head at 1/2, 1/4 and 1/8.
        similarities: independent similarity maps per sign of click.
        similarity_width: feature channels of each.
        norm: channels of one group of the group normalisation.
    """

    full: int = 8
    gates: int = 4
    widths: tuple[int, int, int, int] = (32, 64, 96, 80)
    head: tuple[int, int, int] = (16, 32, 48)
    similarities: int = 4
    similarity_width: int = 8
    norm: int = 8

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TinySam3DConfig:
        """Inverse of `to_dict`; unknown names are an error of the caller."""
        known = {f.name for f in fields(cls)}
        chosen: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
        return cls(**chosen)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class EncodedPrompt:
    """Prompts of a batch as padded tensors, in voxels of the embedded volume.

    Attributes:
        points: ``[B, N, 3]``.
        labels: ``[B, N]`` 1 inside, 0 outside, -1 no click.
        boxes: ``[B, 2, 3]`` lowest and highest corner; NaN where there is no box.
        mask: ``[B, 1, X, Y, Z]`` probability in [0, 1], or None.
        has_mask: ``[B]`` 1 where the row's mask means something.
    """

    points: torch.Tensor
    labels: torch.Tensor
    boxes: torch.Tensor
    mask: torch.Tensor | None
    has_mask: torch.Tensor


def _norm(channels: int, group: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(channels // group, 1), channels)


class Convolution(nn.Conv3d):
    """A 3D convolution that keeps PyTorch from its slow native kernel, which it prefers for one small volume on the CPU."""

    def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and len(x) == 1
        if plain and torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu"):
            # About 4 to 7 times faster at 1/2 and 1/4 resolution; the same numbers to rounding.
            padding, stride = [int(p) for p in self.padding], list(self.stride)
            return torch.mkldnn_convolution(x, weight, bias, padding, stride, list(self.dilation), self.groups)
        return super()._conv_forward(x, weight, bias)


class Pointwise(nn.Module):
    """A 1x1x1 convolution as one matrix product: several times faster than a convolution where one thread works."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, inputs, ...]`` to ``[B, outputs, ...]``."""
        if x.is_contiguous(memory_format=torch.channels_last_3d):
            return F.linear(x.permute(0, 2, 3, 4, 1), self.linear.weight, self.linear.bias).permute(0, 4, 1, 2, 3)
        y = torch.matmul(self.linear.weight, x.flatten(2)) + self.linear.bias[:, None]
        return y.reshape(len(x), -1, *x.shape[2:])


class Residual(nn.Module):
    """Two 3x3x3 convolutions around which the input passes, normalised before each (pre-activation)."""

    def __init__(self, channels: int, group: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(channels, group), _norm(channels, group)
        self.conv1 = Convolution(channels, channels, 3, padding=1, bias=False)
        self.conv2 = Convolution(channels, channels, 3, padding=1, bias=False)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape out as in."""
        y = self.conv1(F.relu(self.norm1(x), inplace=True))
        return x + self.conv2(F.relu(self.norm2(y), inplace=True))


def _upsample(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, size=like.shape[2:], mode="trilinear", align_corners=False)


class Encoder(nn.Module):
    """Image ``[B, 1, X, Y, Z]`` to the maps the head needs (see `forward`)."""

    def __init__(self, config: TinySam3DConfig) -> None:
        super().__init__()
        w, g = config.widths, config.norm
        self.stem = Convolution(1, config.full, 3, padding=1)
        self.stem_norm = _norm(config.full, g)
        sizes = (config.full, *w)
        self.down = nn.ModuleList(Convolution(a, b, 2, stride=2) for a, b in pairwise(sizes))
        self.encode = nn.ModuleList(nn.Sequential(Residual(c, g), Residual(c, g)) for c in w)
        self.up = nn.ModuleList(Pointwise(w[i + 1], w[i]) for i in range(3))
        self.decode = nn.ModuleList(nn.Sequential(*(Residual(w[i], g) for _ in range(2 - i // 2))) for i in range(3))
        self.out_norm = nn.ModuleList(_norm(w[i], g) for i in range(3))
        self.out = nn.ModuleList(Pointwise(w[i], config.head[i]) for i in range(3))
        self.out_full = Pointwise(config.full, config.gates)
        self.out_similar = Pointwise(w[0], config.similarities * config.similarity_width)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """``full``, ``half``, ``quarter``, ``eighth``: projected features; ``similar``: features compared with clicks."""
        full = F.relu(self.stem_norm(self.stem(image)))
        x, skips = full, []
        for down, encode in zip(self.down, self.encode, strict=True):
            x = encode(down(x))
            skips.append(x)
        maps = {"full": self.out_full(full)}
        for level, name in ((2, "eighth"), (1, "quarter"), (0, "half")):
            x = self.decode[level](skips[level] + _upsample(self.up[level](x), skips[level]))
            shown = F.relu(self.out_norm[level](x))
            maps[name] = self.out[level](shown)
            if level == 0:
                maps["similar"] = self.out_similar(shown)
        return maps


class PromptHead(nn.Module):
    """Maps of the encoder and a prompt to one mask's logits at full resolution, and an estimate of its IoU."""

    def __init__(self, config: TinySam3DConfig) -> None:
        super().__init__()
        self.config = config
        h, g = config.head, config.norm
        self.prompt = Pointwise(2 * config.similarities + 4 + 2 + 2, h[0])
        self.half_norm = _norm(h[0], g)
        self.half_conv = Convolution(h[0], h[0], 3, padding=1)
        self.to_quarter = Convolution(h[0], h[1], 2, stride=2)
        self.quarter = Residual(h[1], g)
        self.to_eighth = Convolution(h[1], h[2], 2, stride=2)
        self.eighth = nn.Sequential(Residual(h[2], g))
        self.context = nn.Linear(h[2], h[2])
        self.eighth_out = Residual(h[2], g)
        self.up_quarter = Pointwise(h[2], h[1])
        self.quarter_out = Residual(h[1], g)
        self.up_half = Pointwise(h[1], h[0])
        self.logit_parts = Pointwise(h[0], 8)
        self.gate = Pointwise(h[0], config.gates)
        self.temperature = nn.Parameter(torch.full((config.similarities,), 3.0))
        self.quality = nn.Sequential(nn.Linear(2 * h[1], 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, maps: dict[str, torch.Tensor], prompt: EncodedPrompt) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits ``[B, X, Y, Z]`` and IoU estimates ``[B]`` in [0, 1]."""
        half = self.prompt(self._prompt_maps(maps["similar"], prompt)) + maps["half"]
        half = self.half_conv(F.relu(self.half_norm(half)))
        quarter = self.quarter(self.to_quarter(half) + maps["quarter"])
        eighth = self.eighth(self.to_eighth(quarter) + maps["eighth"])
        eighth = eighth + self.context(eighth.mean((2, 3, 4)))[:, :, None, None, None]
        eighth = self.eighth_out(eighth)
        quarter = self.quarter_out(quarter + _upsample(self.up_quarter(eighth), quarter))
        half = half + _upsample(self.up_half(quarter), half)
        parts = self.logit_parts(half)
        logits = self._finest(parts, self.gate(half), maps["full"])
        inside = F.avg_pool3d(torch.sigmoid(parts.detach().mean(1, keepdim=True)), 2)
        pooled = (quarter * inside).sum((2, 3, 4)) / inside.sum((2, 3, 4)).clamp_min(1.0)
        quality = torch.sigmoid(self.quality(torch.cat([pooled, quarter.mean((2, 3, 4))], 1)))[:, 0]
        return logits, quality

    @staticmethod
    def _finest(parts: torch.Tensor, gate: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
        """Full-resolution logits ``[B, X, Y, Z]``: 8 sub-voxels of each half-resolution voxel, plus gated image features."""
        b, g, x, y, z = gate.shape
        fine = full.reshape(b, g, x, 2, y, 2, z, 2)
        logits = torch.einsum("bgxiyjzk,bgxyz->bxiyjzk", fine, gate)
        logits = logits + parts.reshape(b, 2, 2, 2, x, y, z).permute(0, 4, 1, 5, 2, 6, 3)
        return logits.reshape(b, 2 * x, 2 * y, 2 * z)

    def _prompt_maps(self, similar: torch.Tensor, prompt: EncodedPrompt) -> torch.Tensor:
        size = similar.shape[2:]
        maps = [self._similarity(similar, prompt)]
        squares = squared_distances(half_places(prompt.points), size)
        for sign in (1, 0):
            away = prompt.labels != sign
            nearest = squares.masked_fill(away[:, :, None, None, None], 1e6).amin(1, keepdim=True)
            maps += [torch.exp(-nearest / 4.5), torch.exp(-nearest.sqrt() / 10)]
        given = ~prompt.boxes.isnan().flatten(1).any(1)
        maps += [_inside_box(prompt.boxes, size), _constant(given, size)]
        if prompt.mask is None:
            dense = torch.zeros_like(maps[-1])
        else:
            dense = F.avg_pool3d(prompt.mask, 2) * prompt.has_mask[:, None, None, None, None]
        maps += [dense, _constant(prompt.has_mask > 0, size)]
        return torch.cat(maps, 1)

    def _similarity(self, similar: torch.Tensor, prompt: EncodedPrompt) -> torch.Tensor:
        """Cosine between each voxel's feature and its most similar click, per map and sign of click; -1 without a click."""
        b, n = prompt.labels.shape
        heads, width = self.config.similarities, self.config.similarity_width
        size = similar.shape[2:]
        features = similar.reshape(b, heads, width, -1)
        unit = features * torch.rsqrt(features.square().sum(2, keepdim=True) + 1e-6)
        limit = torch.tensor(size, device=similar.device) - 1
        at = (prompt.points / 2).floor().long().clamp_min(0).minimum(limit)
        flat = (at[..., 0] * size[1] + at[..., 1]) * size[2] + at[..., 2]
        clicked = unit.gather(3, flat[:, None, None, :].expand(b, heads, width, n))
        cosine = torch.einsum("bhwn,bhwv->bhnv", clicked, unit)
        found = []
        for sign in (1, 0):
            away = (prompt.labels != sign)[:, None, :, None]
            found.append(cosine.masked_fill(away, -1.0).amax(2))
        both = torch.stack(found, 1) * self.temperature[:, None]
        return both.reshape(b, 2 * heads, *size)


def _constant(value: torch.Tensor, size: torch.Size) -> torch.Tensor:
    return value.float()[:, None, None, None, None].expand(-1, 1, *size)


def half_places(points: torch.Tensor) -> torch.Tensor:
    """Voxel indices of the full grid as (broken) indices of the one at half resolution."""
    return (points + 0.5) / 2 - 0.5


def squared_distances(points: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Squared distance ``[B, N, x, y, z]`` of each voxel of a grid from each point ``[B, N, 3]``, all in voxels of the grid."""
    parts = []
    for axis, length in enumerate(size):
        centre = torch.arange(length, device=points.device, dtype=points.dtype)
        parts.append((centre - points[..., axis, None]).square())
    x, y, z = parts
    return x[..., :, None, None] + y[..., None, :, None] + z[..., None, None, :]


def _inside_box(boxes: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """1 inside of each row's box ``[B, 1, x, y, z]`` on the half grid; 0 everywhere where there is none."""
    inside = torch.ones(1, 1, 1, 1, 1, device=boxes.device)
    for axis, length in enumerate(size):
        centre = torch.arange(length, device=boxes.device) * 2 + 0.5
        low, high = boxes[:, 0, axis, None], boxes[:, 1, axis, None]
        along = ((centre >= low - 0.5) & (centre <= high + 0.5)).float()
        inside = inside * along[:, None].reshape(-1, 1, *(length if a == axis else 1 for a in range(3)))
    return inside.expand(-1, 1, *size)


class TinySam3DNet(nn.Module):
    """Encoder and prompt head together.

    Args:
        config: sizes.
    """

    def __init__(self, config: TinySam3DConfig | None = None) -> None:
        super().__init__()
        self.config = config or TinySam3DConfig()
        self.encoder = Encoder(self.config)
        self.head = PromptHead(self.config)

    def forward(self, image: torch.Tensor, prompt: EncodedPrompt) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed ``[B, 1, X, Y, Z]`` and answer one prompt per row: logits ``[B, X, Y, Z]``, IoU estimates ``[B]``."""
        return self.head(self.encoder(image), prompt)
