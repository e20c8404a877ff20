"""SAM-Med3D behind the `Promptable` interface: a volume becomes one cube, clicks and masks move into it, answers move back.

Wang et al., "SAM-Med3D: Towards General-purpose Segmentation Models for Volumetric Medical Images", arXiv:2310.15161.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn

from scarceseg.errors import ConfigError, DataError
from scarceseg.foundation.base import (
    Embedding,
    HeadTunable,
    Masks,
    PromptKind,
    Spacing,
    check_prompts,
    freeze,
    with_own,
)
from scarceseg.foundation.identify import compare
from scarceseg.foundation.sam_med3d_net import SamMed3DConfig, SamMed3DNet
from scarceseg.foundation.weights import read_tensors
from scarceseg.types import ImageBatch, Prompt

Fit = Literal["shrink", "crop"]
Foreground = Literal["above-minimum", "above-zero"]

LOGIT_LIMIT = 10.0
"""Logits of a mask prompt are kept within +-10 (probability 0.00005 to 0.99995); voxels the model cannot see get -10."""
_LOW_RES = "low_res"


@dataclass(frozen=True)
class Cube:
    """Where a volume lies in the model's cube: it is resampled as a whole, then padded or cut around its centre.

    Attributes:
        size: voxels ``(X, Y, Z)`` of the volume.
        resampled: voxels of the same field of view on the model's grid.
        side: S, voxels a side of the cube.
    """

    size: tuple[int, int, int]
    resampled: tuple[int, int, int]
    side: int

    @classmethod
    def around(
        cls, size: tuple[int, int, int], spacing_mm: Spacing, side: int, target_mm: float | None, fit: Fit
    ) -> Cube:
        """The cube for volumes of one grid; `target_mm` None keeps the volume's own voxels."""
        exact = [n * mm / target_mm if target_mm else float(n) for n, mm in zip(size, spacing_mm, strict=True)]
        if fit == "shrink":
            exact = [length * min(1.0, side / max(exact)) for length in exact]
        x, y, z = (max(1, round(length)) for length in exact)
        return cls(size, (x, y, z), side)

    @property
    def before(self) -> tuple[int, int, int]:
        """Voxels of padding before the volume on each axis; negative where it is cut."""
        x, y, z = ((self.side - length) // 2 for length in self.resampled)
        return x, y, z

    def _margins(self, sign: int) -> list[int]:
        """Widths for `torch.nn.functional.pad`, last axis first; a negative width cuts."""
        widths: list[int] = []
        for length, before in reversed(list(zip(self.resampled, self.before, strict=True))):
            widths += [sign * before, sign * (self.side - length - before)]
        return widths

    def put(self, volume: torch.Tensor) -> torch.Tensor:
        """``[B, 1, X, Y, Z]`` to the cube ``[B, 1, S, S, S]``, trilinear; 0 around it."""
        return F.pad(_resize(volume, self.resampled), self._margins(1))

    def take(self, cube: torch.Tensor, outside: float) -> torch.Tensor:
        """The inverse of `put`: ``[B, 1, S, S, S]`` to ``[B, 1, X, Y, Z]``; `outside` where the cube does not reach."""
        return _resize(F.pad(cube, self._margins(-1), value=outside), self.size)

    def points(self, points_voxel: torch.Tensor) -> torch.Tensor:
        """Voxel indices ``[N, 3]`` of the volume as (broken) voxel indices of the cube.

        Raises:
            DataError: a place that was cut off.
        """
        scale, before = (points_voxel.new_tensor(values) for values in (self._scale(), self.before))
        moved = (points_voxel + 0.5) * scale - 0.5 + before
        outside = ((moved < -0.5) | (moved > self.side - 0.5)).any(dim=-1)
        if outside.any():
            where = tuple(round(float(value), 2) for value in points_voxel[outside][0])
            raise DataError(
                f"point {where} lies outside the central {self.side} voxels a side that the model sees with fit='crop': "
                "use fit='shrink', a coarser spacing, or cut the volume around the target"
            )
        return moved

    def _scale(self) -> list[float]:
        return [new / old for new, old in zip(self.resampled, self.size, strict=True)]


def _resize(volume: torch.Tensor, size: tuple[int, int, int]) -> torch.Tensor:
    """Trilinear, over the same field of view: the outer faces of the outer voxels stay where they are."""
    if tuple(volume.shape[2:]) == size:
        return volume
    return F.interpolate(volume, size=size, mode="trilinear", align_corners=False)


class SamMed3D(HeadTunable):
    """SAM-Med3D on whole volumes: clicks and masks in, one mask out. It knows no boxes.

    A volume is resampled to the model's voxels, z-scored over its foreground voxels (the published rule) and put in the middle of
    a cube of `img_size` (128) voxels a side. Clicks accumulate, and each round refines the low-resolution logits of the round
    before (`previous`), zeros at first, as in the published inference.

    Differs from the authors' code: a volume that does not fit is made smaller instead of cut around the click, so that one
    embedding serves every prompt; clicks keep their place between the model's voxels.

    Args:
        network: with its weights; it is frozen.
        name: for messages and results.
        spacing_mm: isotropic voxels of the model's cube; None keeps the voxels of the volume.
        fit: a volume larger than the cube is made smaller (``shrink``) or cut around its centre (``crop``; what was cut is
            outside the mask, and clicks there are refused).
        channel: image channel to look at, from 0; needed only where there are several.
        foreground: voxels that mean and standard deviation are taken over. ``above-minimum`` first moves the lowest intensity
            of each volume to 0, so that a shift or a scale of the intensities changes nothing; it equals the published rule for
            images whose background is 0. ``above-zero`` is the published rule to the letter, for raw intensities (CT in
            Hounsfield units) only.

    Raises:
        ConfigError: an impossible option.
    """

    prompt_kinds: frozenset[PromptKind] = frozenset({"point", "mask"})

    def __init__(
        self,
        network: SamMed3DNet,
        *,
        name: str = "sam-med3d",
        spacing_mm: float | None = 1.5,
        fit: Fit = "shrink",
        channel: int | None = None,
        foreground: Foreground = "above-minimum",
    ) -> None:
        if spacing_mm is not None and not 0 < spacing_mm < float("inf"):
            raise ConfigError(f"spacing_mm: expected millimetres above 0, or None, got {spacing_mm}")
        for option, value, known in (("fit", fit, get_args(Fit)), ("foreground", foreground, get_args(Foreground))):
            if value not in known:
                raise ConfigError(f"{option}: expected {' or '.join(known)}, got {value!r}")
        freeze(network)
        self.network = network
        self.name = name
        self.spacing_mm, self.fit, self.channel, self.foreground = spacing_mm, fit, channel, foreground
        self.channels = frozenset({1} if channel is None else ())

    @classmethod
    def from_file(
        cls, path: Path, name: str = "sam-med3d", device: torch.device | str | None = None, **options: Any
    ) -> SamMed3D:
        """Read published weights; no code in the file is run.

        Args:
            path: ``.pth`` (bare, or under ``model_state_dict``) or ``.safetensors`` under the published names.
            name: for messages and results.
            device: where the network goes; None is the CPU.
            options: of the class.

        Raises:
            DataError: no such file, damaged, or tensors that are missing, unexpected or of another shape.
            ConfigError: an impossible option.
        """
        network = network_from_state(read_tensors(path).state, str(path))
        return cls(network, name=name, **options).to(torch.device(device or "cpu"))

    def to(self, device: torch.device) -> SamMed3D:
        """Move the weights; returns itself."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def embed(self, image: ImageBatch, spacing_mm: Spacing) -> Embedding:
        """Embed whole volumes; see `Promptable.embed`.

        Raises:
            DataError: several channels while none was chosen, or values that are not finite.
        """
        volume = self._one_channel(image)
        size = (volume.shape[2], volume.shape[3], volume.shape[4])
        cube = Cube.around(size, spacing_mm, self.network.config.img_size, self.spacing_mm, self.fit)
        if self.foreground == "above-minimum":
            volume = volume - volume.amin(dim=(1, 2, 3, 4), keepdim=True)
        features = self.network.image_encoder(z_score(cube.put(volume)))
        return Embedding({"image": features}, size, cube)

    def _one_channel(self, image: ImageBatch) -> torch.Tensor:
        if image.ndim != 5:
            raise DataError(f"{self.name}: expected images [B, C, X, Y, Z], got shape {list(image.shape)}")
        count = image.shape[1]
        if self.channel is None and count != 1:
            raise DataError(
                f"{self.name} looks at one channel, the image has {count}: choose one with channel=0 to {count - 1}"
            )
        channel = self.channel or 0
        if not 0 <= channel < count:
            raise DataError(f"{self.name}: channel {channel} was asked for, the image has {count}, counted from 0")
        volume = image[:, channel : channel + 1].to(self._device, torch.float32)
        if not torch.isfinite(volume).all():
            raise DataError(
                f"{self.name}: the image holds values that are not finite (NaN or infinite): repair it first"
            )
        return volume

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def head(self) -> nn.ModuleDict:
        """See `HeadTunable`."""
        return nn.ModuleDict({"prompts": self.network.prompt_encoder, "masks": self.network.mask_decoder})

    def with_own_head(self) -> SamMed3D:
        """See `HeadTunable`."""
        other = copy.copy(self)
        other.network = with_own(self.network, self.network.image_encoder)
        return other

    def segment(self, embedding: Embedding, prompts: Sequence[Prompt], previous: Masks | None = None) -> Masks:
        """Answer one prompt per row; see `Promptable.segment`.

        `Prompt.mask` is where the first round starts from; with `previous`, the model's own last logits take its place.
        """
        check_prompts(self, embedding, prompts)
        cube: Cube = embedding.frame
        start = self._start(prompts, previous, cube)
        clicks = [self._clicks(prompt, cube) for prompt in prompts]
        low_res, quality = torch.empty_like(start), start.new_empty(len(prompts))
        # Rows with equally many clicks go together: filling up with empty clicks would change the answers.
        for count in {len(points) for points, _ in clicks}:
            rows = [row for row, (points, _) in enumerate(clicks) if len(points) == count]
            points = torch.stack([clicks[row][0] for row in rows]) if count else None
            labels = torch.stack([clicks[row][1] for row in rows]) if count else None
            low_res[rows], iou = self.network(embedding.features["image"][rows], points, labels, start[rows])
            quality[rows] = iou[:, 0]
        whole = _resize(low_res, (cube.side, cube.side, cube.side))
        logits = cube.take(whole, -LOGIT_LIMIT)[:, 0]
        return Masks(logits, quality.clamp(0, 1), {_LOW_RES: low_res})

    def _start(self, prompts: Sequence[Prompt], previous: Masks | None, cube: Cube) -> torch.Tensor:
        """Logits ``[B, 1, 4E, 4E, 4E]`` that the prompts start from: the last round's, a mask's, or zeros."""
        shape = (len(prompts), 1, *[4 * self.network.config.grid] * 3)
        if previous is not None:
            memory = previous.memory.get(_LOW_RES)
            if memory is None or tuple(memory.shape) != shape:
                got = "nothing" if memory is None else list(memory.shape)
                raise DataError(
                    f"{self.name}: expected previous.memory[{_LOW_RES!r}] of shape {list(shape)}, got {got}"
                )
            return memory.to(self._device)
        start = torch.zeros(shape, device=self._device)
        for row, prompt in enumerate(prompts):
            if prompt.mask is not None:
                probability = cube.put(prompt.mask.to(self._device, torch.float32)[None, None])
                probability = F.adaptive_avg_pool3d(probability, 4 * self.network.config.grid)
                start[row] = torch.logit(probability, eps=1e-6)[0].clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
        return start

    def _clicks(self, prompt: Prompt, cube: Cube) -> tuple[torch.Tensor, torch.Tensor]:
        """Places ``[N, 3]`` in the cube and labels ``[N]``."""
        if prompt.points_voxel is None or prompt.point_labels is None:
            return torch.zeros(0, 3), torch.zeros(0)
        labels = prompt.point_labels.to(self._device)
        if ((labels != 0) & (labels != 1)).any():
            raise DataError(f"expected click labels 1 (inside) or 0 (outside), got {sorted(set(labels.tolist()))}")
        return cube.points(prompt.points_voxel.to(self._device, torch.float32)), labels.long()


def z_score(cube: torch.Tensor) -> torch.Tensor:
    """``(x - mean) / std`` of each ``[B, 1, S, S, S]`` row, both over its voxels above 0; all 0 where these do not vary."""
    above = cube > 0
    axes = (1, 2, 3, 4)
    count = above.sum(dim=axes, keepdim=True)
    mean = (cube * above).sum(dim=axes, keepdim=True) / count.clamp_min(1)
    centred = cube - mean
    variance = (centred * above).square().sum(dim=axes, keepdim=True) / (count - 1).clamp_min(1)
    varies = variance > (1e-5 * mean).square()  # less is rounding
    std = torch.where(varies, variance, 1.0).sqrt()  # chosen before the root, whose gradient at 0 is not finite
    return torch.where(varies, centred / std, 0.0)


def network_from_state(state: Mapping[str, torch.Tensor], source: str = "the state") -> SamMed3DNet:
    """A network of the sizes that published tensors tell, holding them.

    Args:
        state: tensors by published name.
        source: what they come from, for messages.

    Raises:
        DataError: tensors that are missing, unexpected or of another shape; some of them are named.
    """
    try:
        config = SamMed3DConfig.from_state(state)
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    with torch.device("meta"):
        network = SamMed3DNet(config)
    kinds = ("missing", "unexpected", "of another shape")
    for what, names in zip(kinds, compare(state, network.state_dict()), strict=True):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise DataError(
                f"{source} does not fit SAM-Med3D: {len(names)} tensors {what} ({'; '.join(names[:3])}{more}); "
                "get the file again, or run 'scarceseg foundations check' on it"
            )
    network.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True, assign=True)
    return network
