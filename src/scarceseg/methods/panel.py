"""Promptable models that are asked about a student's prediction, and what of their answers counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from scarceseg.foundation.base import Promptable, Spacing
from scarceseg.foundation.dialogue import Answers, Asking, converse, first_prompts
from scarceseg.foundation.memory import EmbeddingMemory
from scarceseg.functional.reliability import mask_gate, merge_masks, soft_dice, voxel_gate
from scarceseg.types import ImageBatch, Prompt


@dataclass(frozen=True)
class Opinion:
    """What the models think of the unlabelled rows.

    Attributes:
        probability: ``[U, K-1, X, Y, Z]`` of the foreground classes, the models' mean by their weights.
        masks: the same shape, their plain mean; 0 where nothing was asked.
        weight: the same shape, in [0, 1]; 0 where nothing was asked.
        asked: ``[U, K-1]`` bool.
        agreement, quality: means over what was asked, in [0, 1], of each model.
        prompts: of the first model, by row and class.
    """

    probability: torch.Tensor
    masks: torch.Tensor
    weight: torch.Tensor
    asked: torch.Tensor
    agreement: tuple[float, ...]
    quality: tuple[float, ...]
    prompts: Mapping[tuple[int, int], Sequence[Prompt]]


@dataclass(frozen=True)
class Gate:
    """How far masks and voxels count, see `scarceseg.functional.reliability`.

    Attributes:
        agreement: soft Dice of student and model below which a mask counts for nothing, and from which on it may count for all.
        quality: the same for the IoU the model estimates.
        doubt: share of a voxel's weight that is left to voxels in which the student is unsure.
    """

    agreement: tuple[float, float]
    quality: tuple[float, float]
    doubt: float


class Panel:
    """Models that are asked the same.

    Args:
        models: frozen.
        asking: what is asked.
        spacing_mm: of the patches' voxels.
        gate: None counts every mask in full.
        channel: of the image that they are shown; None shows all.
        remember: embeddings each keeps for patches that come again.
    """

    def __init__(
        self,
        models: Sequence[Promptable],
        asking: Asking,
        spacing_mm: Spacing,
        gate: Gate | None,
        channel: int | None = None,
        remember: int = 0,
    ) -> None:
        self.models, self.asking, self.spacing_mm, self.gate, self.channel = (
            tuple(models),
            asking,
            spacing_mm,
            gate,
            channel,
        )
        self._memories = tuple(EmbeddingMemory(remember) for _ in models)

    @torch.no_grad()
    def ask(self, image: ImageBatch, foreground: torch.Tensor, generator: torch.Generator) -> Opinion:
        """What the models say to these patches, weighed by what they say alone.

        Args:
            image: patches ``[U, C, X, Y, Z]``.
            foreground: a student's probabilities ``[U, K-1, X, Y, Z]``; classes that it does not find are not asked for.
            generator: of the clicks.
        """
        if self.channel is not None:
            image = image[:, self.channel : self.channel + 1]
        prompts = {
            (row, index): found
            for row in range(foreground.shape[0])
            for index in range(foreground.shape[1])
            if (found := first_prompts(foreground[row, index], self.asking, self.spacing_mm, generator))
        }
        asked = torch.zeros(foreground.shape[:2], dtype=torch.bool, device=foreground.device)
        for key in prompts:
            asked[key] = True
        target, masks, total = (torch.zeros_like(foreground) for _ in range(3))
        agreement, quality = [0.0] * len(self.models), [0.0] * len(self.models)
        if prompts:
            agreement, quality = [], []
            for model, memory in zip(self.models, self._memories, strict=True):
                answers = self._answers(model, memory, image, foreground, prompts, generator)
                merged = self._merged(answers, prompts, asked, foreground)
                alike = soft_dice(foreground[asked], merged[asked])
                weight = self._weight(answers, alike, foreground[asked], merged[asked])
                target[asked] += weight * merged[asked]
                masks[asked] += merged[asked] / len(self.models)
                total[asked] += weight
                agreement.append(float(alike.mean()))
                quality.append(float(answers.quality.mean()))
        share = total.clamp_min(1e-8)
        return Opinion(
            target / share,
            masks,
            total / len(self.models),
            asked,
            tuple(agreement),
            tuple(quality),
            prompts,
        )

    def _answers(
        self,
        model: Promptable,
        memory: EmbeddingMemory,
        image: ImageBatch,
        foreground: torch.Tensor,
        prompts: Mapping[tuple[int, int], Sequence[Prompt]],
        generator: torch.Generator,
    ) -> Answers:
        """Of one model to all prompts; in the order of `prompts`, which is that of ``asked.nonzero()``."""
        embedding, known = memory.embed(model, image, sorted({row for row, _ in prompts}), self.spacing_mm)
        wished = torch.stack([foreground[key] for key in prompts])
        rows = [known[row] for row, _ in prompts]
        with torch.autocast(wished.device.type, enabled=False):  # places and odds need more than bf16 has
            return converse(
                model, embedding, rows, wished, list(prompts.values()), self.asking, self.spacing_mm, generator
            )

    def _merged(
        self,
        answers: Answers,
        prompts: Mapping[tuple[int, int], Sequence[Prompt]],
        asked: torch.Tensor,
        foreground: torch.Tensor,
    ) -> torch.Tensor:
        masks = torch.zeros_like(foreground)
        for key, mask in zip(prompts, answers.probability, strict=True):
            masks[key] = mask
        return merge_masks(masks, asked)

    def _weight(
        self, answers: Answers, agreement: torch.Tensor, student: torch.Tensor, model: torch.Tensor
    ) -> torch.Tensor:
        """``[N, X, Y, Z]``; 1 without a gate, but for the spread when that was asked for."""
        if self.gate is None:
            alike = 1 - 4 * answers.spread if "uncertainty" in self.asking.kinds else torch.ones_like(model)
            return alike.clamp(0, 1)
        voxels = voxel_gate(student, model, answers.spread, self.gate.doubt)
        masks = mask_gate(agreement, answers.quality, self.gate.agreement, self.gate.quality)
        return masks[:, None, None, None] * voxels
