"""`tiny-sam3d`: our own small promptable 3D model, pre-trained on synthetic volumes alone, in the package. (ours)

A volume is resampled as a whole to a grid whose sides are multiples of 16; clicks, boxes and masks move along, answers move back.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from scarceseg.errors import ConfigError, DataError
from scarceseg.files import write_atomic
from scarceseg.foundation.base import (
    Embedding,
    HeadTunable,
    Masks,
    PromptKind,
    Spacing,
    check_image,
    check_prompts,
    freeze,
    with_own,
)
from scarceseg.foundation.clicks import error_distances
from scarceseg.foundation.prompts import resize_prompt
from scarceseg.foundation.tiny_sam3d_net import (
    MULTIPLE,
    EncodedPrompt,
    TinySam3DConfig,
    TinySam3DNet,
    squared_distances,
)
from scarceseg.foundation.weights import read_tensors
from scarceseg.types import ImageBatch, Prompt

KIND = "tiny-sam3d"
LONGEST = 112
"""Voxels of the longest side of the grid a volume is brought to, unless its own voxels are coarser."""


def resample_whole(volume: torch.Tensor, size: tuple[int, int, int]) -> torch.Tensor:
    """The same field of view ``[B, C, X, Y, Z]`` in other voxels: trilinear; averaged first where they are much larger."""
    old = tuple(volume.shape[2:])
    if old == size:
        return volume
    # Interpolation alone would skip voxels where the new ones are more than half as large again.
    x, y, z = (m if n > 1.5 * m else n for n, m in zip(old, size, strict=True))
    if (x, y, z) != old:
        volume = F.adaptive_avg_pool3d(volume, (x, y, z))
    return F.interpolate(volume, size=size, mode="trilinear", align_corners=False)


CORRECTIONS_FROM = 3
"""The first clicks say what is meant; from this one on they correct its border."""


@dataclass(frozen=True)
class Grid:
    """The grid a volume is seen on: the same field of view with other voxels.

    Attributes:
        size: voxels ``(X, Y, Z)`` of the volume.
        seen: voxels of the model's grid, multiples of 16.
    """

    size: tuple[int, int, int]
    seen: tuple[int, int, int]

    @classmethod
    def fit(cls, size: tuple[int, int, int], spacing_mm: Spacing, longest: int) -> Grid:
        """About cubic voxels, no finer than the volume's finest and at most `longest` along the longest side.

        Sides are rounded to multiples of 16 by stretching: the network has seen stretched things, but no empty margin.
        """
        extent = [n * mm for n, mm in zip(size, spacing_mm, strict=True)]
        voxel = max(min(spacing_mm), max(extent) / longest)
        x, y, z = (max(1, round(e / voxel / MULTIPLE)) * MULTIPLE for e in extent)
        return cls(size, (x, y, z))

    def put(self, volume: torch.Tensor) -> torch.Tensor:
        """``[B, C, X, Y, Z]`` onto the model's grid."""
        return resample_whole(volume, self.seen)

    def take(self, seen: torch.Tensor) -> torch.Tensor:
        """The inverse: ``[B, C, x, y, z]`` on the model's grid to the volume's voxels."""
        return resample_whole(seen, self.size)

    def places(self, voxels: torch.Tensor) -> torch.Tensor:
        """Voxel indices ``[..., 3]`` of the volume as (broken) indices of the model's grid."""
        scale = voxels.new_tensor([m / n for n, m in zip(self.size, self.seen, strict=True)])
        return (voxels + 0.5) * scale - 0.5

    def box(self, corners: torch.Tensor) -> torch.Tensor:
        """First and last voxel ``[2, 3]`` of a box in the volume as (broken) indices of the model's grid.

        The outer edges of the two voxels are kept, so that a box of one thick slice stays as thick on a finer grid.
        """
        moved = resize_prompt(Prompt(box_voxel=corners.float()), self.size, self.seen).box_voxel
        assert moved is not None
        return moved


class TinySam3D(HeadTunable):
    """The small promptable 3D network on whole volumes.

    Clicks accumulate; each round also sees the mask of the round before (`previous`), or the dense mask of the prompt. The
    network was trained on dialogues, so several clicks that come at once are answered one after the other, and a mask that
    comes without a click gets one in its deepest voxel.

    Args:
        network: with its weights; it is frozen.
        name: for messages and results.
        longest: see `Grid.fit`. More is finer and slower.
        channel: image channel to look at; None takes the mean of all (each z-scored).
        rows: prompts answered at once; bounds the memory.
        reach: from the third click on, a click changes the mask only around it: with a Gaussian weight whose deviation, at the
            third click, is so many radii of a ball as large as the mask, and shrinks with further clicks (exponent -0.6). 0 lets
            every click change everything. Without it late clicks mend one border and spoil another.

    Raises:
        ConfigError: an impossible option.
    """

    prompt_kinds: frozenset[PromptKind] = frozenset({"point", "box", "mask"})

    def __init__(
        self,
        network: TinySam3DNet,
        *,
        name: str = KIND,
        longest: int = LONGEST,
        channel: int | None = None,
        rows: int = 4,
        reach: float = 1.2,
    ) -> None:
        if longest < MULTIPLE or rows < 1 or reach < 0:
            raise ConfigError(
                f"expected longest >= {MULTIPLE}, rows >= 1 and reach >= 0, got {longest}, {rows} and {reach}"
            )
        freeze(network)
        # On the CPU the encoder is about 1.6 times faster with channels last; the answers differ by rounding.
        self.network = network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.name = name
        self.longest, self.channel, self.rows, self.reach = longest, channel, rows, reach

    @classmethod
    def from_file(cls, path: Path, name: str = KIND, **options: Any) -> TinySam3D:
        """Read a file of `save_tiny_sam3d`.

        Raises:
            DataError: no such file, or not of this model.
        """
        return cls(read_tiny_sam3d(path), name=name, **options)

    def to(self, device: torch.device) -> TinySam3D:
        """Move the weights; returns itself."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def embed(self, image: ImageBatch, spacing_mm: Spacing) -> Embedding:
        """Embed whole volumes; see `Promptable.embed`.

        Raises:
            DataError: not five axes, no such channel, or values that are not finite.
        """
        check_image(self, image)
        if self.channel is not None and not 0 <= self.channel < image.shape[1]:
            raise DataError(
                f"{self.name}: there is no channel {self.channel}, the image has {image.shape[1]} (0 first)"
            )
        volume = image if self.channel is None else image[:, self.channel : self.channel + 1]
        volume = volume.to(self._device, torch.float32)
        grid = Grid.fit((image.shape[2], image.shape[3], image.shape[4]), spacing_mm, self.longest)
        seen = _z_score(_z_score(grid.put(volume)).mean(1, keepdim=True))
        return Embedding(self.network.encoder(seen), grid.size, grid)

    @property
    def head(self) -> nn.ModuleDict:
        """See `HeadTunable`."""
        return nn.ModuleDict({"head": self.network.head})

    def with_own_head(self) -> TinySam3D:
        """See `HeadTunable`."""
        other = copy.copy(self)
        other.network = with_own(self.network, self.network.encoder)
        return other

    def segment(self, embedding: Embedding, prompts: Sequence[Prompt], previous: Masks | None = None) -> Masks:
        """Answer one prompt per row; see `Promptable.segment`.

        Raises:
            DataError: wrong number of prompts, one outside the volume, or an embedding or a previous answer that is not of this
                model for these rows.
        """
        check_prompts(self, embedding, prompts)
        memory = self._memory(embedding, previous)
        counts = [len(_clicks(prompt)[1]) for prompt in prompts]
        order: list[int] = []
        parts = []
        # Rows with equally many clicks go together: a row takes as many turns as it has clicks, whatever its neighbours have.
        for count in sorted(set(counts)):
            alike = [row for row, own in enumerate(counts) if own == count]
            for start in range(0, len(alike), self.rows):
                rows = alike[start : start + self.rows]
                last = None if memory is None else memory[rows]
                parts.append(self._answer(embedding.select(rows), [prompts[row] for row in rows], last))
                order += rows
        back = torch.tensor(order).argsort()
        logits, quality, seen = (torch.cat(column)[back.to(self._device)] for column in zip(*parts, strict=True))
        return Masks(logits, quality, {"probability": seen})

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device

    def _memory(self, embedding: Embedding, previous: Masks | None) -> torch.Tensor | None:
        """The mask of the last round ``[B, 1, x, y, z]`` on the model's grid."""
        if not isinstance(embedding.frame, Grid):
            raise DataError(
                f"{self.name}: expected an embedding of its own, got another model's: embed the volume again"
            )
        if previous is None:
            return None
        seen, expected = previous.memory.get("probability"), (len(embedding), 1, *embedding.frame.seen)
        if seen is None or tuple(seen.shape) != expected:
            got = "none" if seen is None else list(seen.shape)
            raise DataError(
                f"{self.name}: expected a previous answer with a mask {list(expected)}, got {got}: hand back the answer of the "
                "same model for the same rows"
            )
        return seen

    def _answer(
        self, embedding: Embedding, prompts: Sequence[Prompt], memory: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits and quality, and the mask on the model's grid that the next round will see."""
        grid: Grid = embedding.frame
        encoded = self._encode(prompts, grid, memory)
        count = encoded.labels.shape[1]
        for clicks in range(1 if memory is None else count, count + 1):
            so_far = replace(encoded, points=encoded.points[:, :clicks], labels=encoded.labels[:, :clicks])
            logits, quality = self.network.head(embedding.features, so_far)
            seen = torch.sigmoid(logits)[:, None]
            if clicks >= CORRECTIONS_FROM and self.reach and encoded.mask is not None:
                reach = self.reach / (clicks - CORRECTIONS_FROM + 1) ** 0.6
                seen = _near_click(so_far.points[:, -1:], encoded.mask, seen, reach)
            encoded = replace(encoded, mask=seen, has_mask=torch.ones_like(encoded.has_mask))
        return grid.take(torch.logit(seen, eps=1e-4))[:, 0], quality, seen

    def _encode(self, prompts: Sequence[Prompt], grid: Grid, memory: torch.Tensor | None) -> EncodedPrompt:
        device = self._device
        clicks = [_clicks(prompt) for prompt in prompts]
        most = max(1, *(len(points) for points, _ in clicks))
        points = torch.zeros(len(prompts), most, 3, device=device)
        labels = torch.full((len(prompts), most), -1, device=device)
        boxes = torch.full((len(prompts), 2, 3), float("nan"), device=device)
        for row, (prompt, (places, inside)) in enumerate(zip(prompts, clicks, strict=True)):
            points[row, : len(places)] = grid.places(places.to(device).float())
            labels[row, : len(inside)] = inside.to(device).long()
            if prompt.box_voxel is not None:
                boxes[row] = grid.box(prompt.box_voxel.to(device))
        given = torch.tensor([prompt.mask is not None for prompt in prompts], device=device)
        if memory is None and not given.any():
            return EncodedPrompt(points, labels, boxes, None, given.float())
        mask = torch.zeros(len(prompts), 1, *grid.seen, device=device) if memory is None else memory.clone()
        for row, prompt in enumerate(prompts):
            if prompt.mask is not None:
                mask[row] = grid.put(prompt.mask.to(device).float()[None, None])[0]
        known = given.float() if memory is None else torch.ones(len(prompts), device=device)
        return EncodedPrompt(points, labels, boxes, mask, known)


def _near_click(click: torch.Tensor, before: torch.Tensor, after: torch.Tensor, reach: float) -> torch.Tensor:
    """The new mask around the newest click ``[B, 1, 3]``, the one before far away from it; all of the new one after none."""
    voxels = (before > 0.5).flatten(1).sum(1)
    voxels = torch.where(voxels > 0, voxels.float(), torch.inf)
    radius = (voxels * (3 / (4 * math.pi))) ** (1 / 3)  # of the ball as large as the mask before
    deviation = (reach * radius)[:, None, None, None, None]
    weight = torch.exp(-squared_distances(click, before.shape[2:]) / (2 * deviation**2))
    return weight * after + (1 - weight) * before


def _clicks(prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
    """The clicks of a prompt; a mask that comes alone gets one in its deepest voxel."""
    if prompt.points_voxel is not None and prompt.point_labels is not None and len(prompt.points_voxel):
        return prompt.points_voxel, prompt.point_labels
    none = torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)
    if prompt.mask is None or prompt.box_voxel is not None or not (prompt.mask > 0.5).any():
        return none
    depth, _ = error_distances(torch.zeros_like(prompt.mask), prompt.mask > 0.5)
    deepest = torch.stack(torch.unravel_index(depth.argmax(), depth.shape))
    return deepest[None].float(), torch.ones(1, dtype=torch.long)


def _z_score(volume: torch.Tensor) -> torch.Tensor:
    mean = volume.mean((2, 3, 4), keepdim=True)
    return (volume - mean) / (volume.std((2, 3, 4), keepdim=True) + 1e-6)


def save_tiny_sam3d(path: Path, network: TinySam3DNet, note: dict[str, str] | None = None) -> None:
    """Write the weights in half precision, with the sizes in the file's own description.

    Args:
        path: a ``.safetensors`` file.
        network: what is written.
        note: how it was made; kept in the file.
    """
    state = {key: value.detach().cpu().half().contiguous() for key, value in network.state_dict().items()}
    about = {"kind": KIND, "config": json.dumps(network.config.to_dict())} | (note or {})
    write_atomic(path, lambda file: save_file(state, file, metadata=about))


def read_tiny_sam3d(path: Path) -> TinySam3DNet:
    """Read what `save_tiny_sam3d` wrote; single precision again.

    Raises:
        DataError: no such file, damaged, or not of this model.
    """
    state, about = read_tensors(path)
    if about.get("kind") != KIND:
        raise DataError(f"{path} holds {about.get('kind', 'weights of another model')}, expected {KIND}")
    try:
        network = TinySam3DNet(TinySam3DConfig.from_dict(json.loads(about["config"])))
        network.load_state_dict({key: value.float() for key, value in state.items()})
    except Exception as error:  # a network of impossible sizes fails in many ways
        reason = f"no {error}" if isinstance(error, KeyError) else (str(error).splitlines() or [""])[-1].strip()
        raise DataError(f"{path} does not fit {KIND}: {reason}; get it again") from None
    return network
