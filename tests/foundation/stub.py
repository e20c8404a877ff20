"""A promptable model whose answers are known: a ball around every click, or the mask it was told to give."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from scarceseg.foundation.base import Embedding, Masks, Promptable, PromptKind, Spacing, check_prompts
from scarceseg.types import ImageBatch, Prompt


class Stub(Promptable):
    """Answers with `mask`, or a brighter version of the dense prompt, or a ball around the mean of the clicks inside.

    Args:
        mask: ``[X, Y, Z]`` probability, the same for all.
        radius: of the ball, in voxels.
        echo: answer with the root of the dense prompt.
        quality: it claims.
    """

    name = "stub"
    prompt_kinds: frozenset[PromptKind] = frozenset({"point", "box", "mask"})

    def __init__(
        self, mask: torch.Tensor | None = None, radius: float = 3.0, quality: float = 0.9, echo: bool = False
    ) -> None:
        self.mask, self.radius, self.quality, self.echo = mask, radius, quality, echo
        self.embedded: list[torch.Tensor] = []
        self.asked: list[tuple[torch.Tensor, list[Prompt]]] = []

    def to(self, device: torch.device) -> Stub:
        return self

    def embed(self, image: ImageBatch, spacing_mm: Spacing) -> Embedding:
        assert not image.requires_grad
        self.embedded.append(image)
        x, y, z = image.shape[2:]
        return Embedding({"mean": image.flatten(1).mean(1)}, (x, y, z))

    def segment(self, embedding: Embedding, prompts: Sequence[Prompt], previous: Masks | None = None) -> Masks:
        check_prompts(self, embedding, prompts)
        self.asked.append((embedding.features["mean"], list(prompts)))
        masks = torch.stack([self._one(embedding, prompt) for prompt in prompts])
        return Masks(torch.logit(masks, eps=1e-4), torch.full((len(prompts),), self.quality))

    def _one(self, embedding: Embedding, prompt: Prompt) -> torch.Tensor:
        if self.mask is not None:
            return self.mask
        if self.echo and prompt.mask is not None:
            return prompt.mask.sqrt()
        assert prompt.points_voxel is not None and prompt.point_labels is not None
        centre = prompt.points_voxel[prompt.point_labels == 1].float().mean(0)
        axes = torch.meshgrid(*(torch.arange(n) for n in embedding.size), indexing="ij")
        squared = sum((axis - middle) ** 2 for axis, middle in zip(axes, centre, strict=True))
        return (squared <= self.radius**2).float()
