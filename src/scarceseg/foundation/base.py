"""The two small interfaces behind which every foundation model stands, and the frozen objects they exchange.

`Promptable` pays once per volume (`embed`) and answers many prompts cheaply (`segment`). `Tunable` hands out a network
``[B, C, X, Y, Z] -> logits [B, K, X, Y, Z]`` that the one training loop tunes and the sliding window predicts with, like any
student. What lies between volume and model (intensity range, spacing, mosaic, crop, frame of the prompt) is the adapter's own.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import nn

from scarceseg.errors import ConfigError, DataError
from scarceseg.types import ImageBatch, Logits, Prompt

Net = TypeVar("Net", bound=nn.Module)
PromptKind = Literal["point", "box", "mask"]
Strategy = Literal["lora", "decoder", "adapter"]
Sees = Literal["volume", "patch"]
Spacing = tuple[float, float, float]


@dataclass(frozen=True)
class Embedding:
    """What a model keeps of a batch of volumes, so that each further prompt is cheap.

    Attributes:
        features: tensors of the adapter, each with the batch as first axis.
        size: voxels ``(X, Y, Z)`` of the volumes embedded; prompts and masks live in this frame.
        frame: what the adapter needs to know besides, equal for all rows (grid of a mosaic, crop, scale).
    """

    features: dict[str, torch.Tensor]
    size: tuple[int, int, int]
    frame: Any = None

    def __len__(self) -> int:
        return next(iter(self.features.values())).shape[0]

    def select(self, rows: Sequence[int]) -> Embedding:
        """The embedding with these rows, in this order; a row may come several times (several prompts on one volume)."""
        index = torch.as_tensor(list(rows), device=next(iter(self.features.values())).device)
        return Embedding({name: value[index] for name, value in self.features.items()}, self.size, self.frame)


@dataclass(frozen=True)
class Masks:
    """The answer to a batch of prompts, in the voxel frame of the embedded volumes.

    Attributes:
        logits: ``[B, X, Y, Z]`` foreground logit; positive is inside.
        quality: ``[B]`` the model's own estimate of the mask's IoU, in [0, 1].
        memory: tensors (batch first) the model wants back in the next round of clicks, e.g. its low-resolution logits.
    """

    logits: torch.Tensor
    quality: torch.Tensor
    memory: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def probability(self) -> torch.Tensor:
        """Foreground probability ``[B, X, Y, Z]`` in [0, 1]."""
        return torch.sigmoid(self.logits)


class Promptable(ABC):
    """A frozen model that segments what a prompt points at.

    An implementation keeps its network in evaluation mode without gradients (`freeze`) and is built once a run.

    Attributes:
        name: as registered, for messages and results.
        prompt_kinds: what `segment` understands.
        views: ways of looking at a volume it offers, see `seen_as`; empty when there is only one.
        channels: numbers of image channels it takes; empty when it takes any.
    """

    name: str
    prompt_kinds: frozenset[PromptKind]
    views: frozenset[str] = frozenset()
    channels: frozenset[int] = frozenset()

    @abstractmethod
    def embed(self, image: ImageBatch, spacing_mm: Spacing) -> Embedding:
        """Do the expensive part once; it may be called under autocast, `segment` is not.

        Args:
            image: ``[B, C, X, Y, Z]`` intensities of any affine scale (raw or z-scored); the adapter normalises.
            spacing_mm: distance of voxel centres along X, Y, Z.

        Raises:
            DataError: a number of channels or a size the model cannot take.
        """

    @abstractmethod
    def segment(self, embedding: Embedding, prompts: Sequence[Prompt], previous: Masks | None = None) -> Masks:
        """Answer one prompt per row of the embedding; frozen weights leave nothing to differentiate.

        Args:
            embedding: of `embed`; use `Embedding.select` for several prompts on one volume.
            prompts: one per row, all clicks so far (clicks accumulate), in voxel indices of the embedded volume.
            previous: answer of the last round for the same rows, for models that refine their own mask.

        Raises:
            DataError: wrong number of prompts, a kind the model does not know, or a prompt outside the volume.
        """

    @abstractmethod
    def to(self, device: torch.device) -> Promptable:
        """Move the weights; returns itself."""

    def seen_as(self, view: str) -> Promptable:
        """The same weights with another view of the volume, one of `views`.

        Raises:
            ConfigError: no such view.
        """
        raise ConfigError(f"{self.name}: expected a view of {', '.join(sorted(self.views)) or 'none'}, got {view!r}")


class HeadTunable(Promptable):
    """A promptable model whose head, which answers prompts, may be tuned while what embeds volumes stays as it is.

    Its `segment` hands a gradient back where its head has one.
    """

    @property
    @abstractmethod
    def head(self) -> nn.ModuleDict:
        """What answers prompts; the live modules."""

    @abstractmethod
    def with_own_head(self) -> HeadTunable:
        """The same model with a copy of its head; the embedding part is shared."""


@dataclass(frozen=True)
class Tuning:
    """How a `Tunable` is opened for training.

    Attributes:
        strategy: ``lora`` (low-rank q and v, prompt encoder and decoder trained), ``decoder`` (the decoder alone) or
            ``adapter`` (bottlenecks behind the frozen blocks, and the decoder).
        rank: rank of LoRA, or width of the adapters' bottleneck.
    """

    strategy: Strategy = "lora"
    rank: int = 4

    def check(self, name: str, channels: int, classes: int) -> None:
        """Refuse what no model can be opened for.

        Args:
            name: of the model, for messages.
            channels: of the images.
            classes: K, background included.

        Raises:
            ConfigError: a strategy, rank or number of channels or classes that is not possible.
        """
        if channels < 1 or classes < 2:
            raise ConfigError(
                f"{name}: expected at least 1 channel and 2 classes with background, got {channels} and {classes}"
            )
        if self.strategy not in get_args(Strategy):
            raise ConfigError(f"{name} is tuned by {', '.join(get_args(Strategy))}, not by {self.strategy!r}")
        if self.strategy != "decoder" and self.rank < 1:
            raise ConfigError(f"{name}: the rank of {self.strategy} starts at 1, got {self.rank}")


class TunedModel(nn.Module, ABC):
    """A foundation model opened for some classes: a network like a student, with most of its weights frozen.

    ``forward`` takes ``[B, C, X, Y, Z]`` normalised intensities and gives logits ``[B, K, X, Y, Z]`` in the same frame.
    """

    @abstractmethod
    def forward(self, image: ImageBatch) -> Logits:
        """Class logits of a batch of volumes or patches."""

    @abstractmethod
    def tuned_state(self) -> dict[str, torch.Tensor]:
        """Only what tuning changed, under published names where there are any: what a stage saves."""

    @abstractmethod
    def load_tuned_state(self, state: dict[str, torch.Tensor]) -> None:
        """Put back what `tuned_state` gave.

        Raises:
            DataError: missing or unexpected names, or other shapes.
        """


class Tunable(ABC):
    """A model that can be fine-tuned on a few labelled volumes.

    Attributes:
        name: as registered, for messages and results.
        sees: what its networks want to be shown. ``volume``: whole volumes in a fixed frame, without turns or flips, because the
            place in the volume tells the model much. ``patch``: patches of the size given to `tunable`.
        slices: whether its networks look at slices, each of which may get an intensity curve of its own (SFR), or at volumes.
        usual_rank, usual_lr: of the tuning when the user says nothing: the rank of `Tuning`, and the learning rate of AdamW. 4
            and 0.001 are SFR's for SAM.
    """

    name: str
    sees: Sees = "patch"
    slices: bool = True
    usual_rank: int = 4
    usual_lr: float = 1e-3

    def shown(self, sees: Sees) -> Tunable:
        """The same model for networks that are shown whole volumes, or patches.

        Raises:
            ConfigError: it takes only the other.
        """
        if sees != self.sees:
            raise ConfigError(f"{self.name} can only be tuned on a {self.sees} at a time, got {sees!r}: take 'auto'")
        return self

    @abstractmethod
    def tunable(self, channels: int, classes: int, tuning: Tuning, size: tuple[int, int, int]) -> TunedModel:
        """A fresh network to tune; the frozen original is never changed.

        Args:
            channels: image channels C.
            classes: K, background included.
            tuning: strategy and rank.
            size: voxels (X, Y, Z) of the patches or volumes it will see; fixes the mosaic's grid.

        Raises:
            ConfigError: a strategy the model does not offer.
        """


def freeze(network: nn.Module) -> nn.Module:
    """Evaluation mode and no gradient, for good; returns the network."""
    return network.eval().requires_grad_(False)


def with_own(network: Net, shared: nn.Module) -> Net:
    """A copy of a network that keeps one of its parts in common with it."""
    return copy.deepcopy(network, {id(shared): shared})


def check_image(model: Promptable, image: ImageBatch) -> None:
    """Refuse what is no batch of volumes.

    Raises:
        DataError: another number of axes, or values that are not finite.
    """
    if image.ndim != 5:
        raise DataError(f"{model.name}: expected volumes [B, C, X, Y, Z], got {list(image.shape)}")
    if not torch.isfinite(image).all():
        raise DataError(f"{model.name}: the image holds values that are not finite (NaN or infinite): repair it first")


def check_prompts(model: Promptable, embedding: Embedding, prompts: Sequence[Prompt]) -> None:
    """Refuse prompts a model cannot answer, in one clear message.

    Raises:
        DataError: count, kind, shape, or a place outside the volume.
    """
    if len(prompts) != len(embedding):
        raise DataError(f"{model.name}: expected {len(embedding)} prompts, one per embedded row, got {len(prompts)}")
    for prompt in prompts:
        _check_kinds(model, prompt)
        for what, points in (("point", prompt.points_voxel), ("box corner", prompt.box_voxel)):
            if points is not None:
                _check_inside(what, points, embedding.size)
        if prompt.box_voxel is not None and (
            len(prompt.box_voxel) != 2 or bool(prompt.box_voxel.diff(dim=0).lt(0).any())
        ):
            raise DataError(f"box: expected its lowest corner, then its highest, got {prompt.box_voxel.tolist()}")
        if prompt.mask is not None and tuple(prompt.mask.shape) != embedding.size:
            raise DataError(f"mask prompt: expected the volume's size {embedding.size}, got {tuple(prompt.mask.shape)}")
        if prompt.mask is not None and not torch.isfinite(prompt.mask).all():
            raise DataError("mask prompt: expected probabilities in [0, 1], got values that are not finite")


def _check_kinds(model: Promptable, prompt: Prompt) -> None:
    parts = {"point": prompt.points_voxel, "box": prompt.box_voxel, "mask": prompt.mask}
    given = [kind for kind, value in parts.items() if value is not None]
    unknown = [kind for kind in given if kind not in model.prompt_kinds]
    if unknown:
        known = ", ".join(sorted(model.prompt_kinds))
        raise DataError(f"{model.name} does not understand a {unknown[0]} prompt: use {known}")
    if not given:
        raise DataError(f"{model.name}: an empty prompt; give at least one of {', '.join(sorted(model.prompt_kinds))}")
    if prompt.points_voxel is not None:
        labels = prompt.point_labels
        if labels is None or len(labels) != len(prompt.points_voxel):
            raise DataError(f"expected one label (1 inside, 0 outside) for each of {len(prompt.points_voxel)} points")
        if ((labels != 0) & (labels != 1)).any():
            raise DataError(f"expected click labels 1 (inside) or 0 (outside), got {sorted(set(labels.tolist()))}")


def _check_inside(what: str, points: torch.Tensor, size: tuple[int, int, int]) -> None:
    if points.ndim != 2 or points.shape[1] != 3:
        raise DataError(f"{what}: expected voxel indices [N, 3] (x, y, z), got {list(points.shape)}")
    limit = torch.tensor(size, device=points.device)
    outside = ~((points >= 0) & (points < limit)).all(dim=-1)  # NaN counts as outside
    if outside.any():
        first = tuple(round(float(value), 2) for value in points[outside][0])
        highest = tuple(side - 1 for side in size)
        raise DataError(f"{what} {first} lies outside the volume: expected voxel indices from (0, 0, 0) to {highest}")
