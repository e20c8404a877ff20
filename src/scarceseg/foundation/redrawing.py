"""A promptable model that learns on the labelled volumes to redraw what a student has drawn. (ours)

Pre-training taught the model what regions look like in general; with a few labelled volumes its head learns what this
structure looks like, from prompts as it will get them. What embeds volumes stays as it is, so that an embedding costs what it did
and little can be overfitted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from scarceseg.foundation.base import HeadTunable, Spacing, TunedModel, freeze
from scarceseg.foundation.dialogue import Asking, first_prompts
from scarceseg.foundation.lora import copies, fill
from scarceseg.foundation.memory import EmbeddingMemory
from scarceseg.types import ImageBatch, Logits, Prompt

BLIND = 0.2
"""Share of the prompts that come without their dense mask, so that the head goes on looking at the image."""


class Redrawing(TunedModel):
    """Images with a drawing each, to logits of the structure that was drawn.

    ``forward`` takes ``[B, C+1, X, Y, Z]``, the last channel a drawing in [0, 1] (see `scarceseg.data.drawings`), and gives
    logits ``[B, 2, X, Y, Z]`` of background and structure. It asks about each drawing as a term would, with one of the
    prompts. A row with an empty drawing has logits of 0.

    Args:
        model: is not changed; its head is copied.
        asking: kinds of prompts; no corrections are asked for.
        spacing_mm: of the voxels.
        channel: of the image that the model is shown, from 0; None shows all.
    """

    def __init__(self, model: HeadTunable, asking: Asking, spacing_mm: Spacing, channel: int | None = None) -> None:
        super().__init__()
        self.model = model.with_own_head()  # no module: its embedding part is no part of this network
        self.asking, self.spacing_mm, self.channel = asking, spacing_mm, channel
        self.head = self.model.head.requires_grad_(True)

    def forward(self, image: ImageBatch) -> Logits:
        """Logits ``[B, 2, X, Y, Z]``, those of the background 0."""
        image, drawn = image[:, :-1], image[:, -1].detach().float()
        if self.channel is not None:
            image = image[:, self.channel : self.channel + 1]
        prompts = {row: prompt for row in range(len(drawn)) if (prompt := self._prompt(drawn[row])) is not None}
        logits = drawn.new_zeros(len(drawn), 2, *drawn.shape[1:])
        logits = logits + 0 * sum(p.sum() for p in self.head.parameters())  # a gradient in any case
        if prompts:
            embedding, places = EmbeddingMemory(0).embed(self.model, image, list(prompts), self.spacing_mm)
            with torch.autocast(drawn.device.type, enabled=False):  # places and odds need more than bf16 has
                chosen = embedding.select([places[row] for row in prompts])
                logits[list(prompts), 1] = self.model.segment(chosen, list(prompts.values())).logits.float()
        return logits

    def _prompt(self, drawing: torch.Tensor) -> Prompt | None:
        generator = torch.Generator(drawing.device).manual_seed(int(torch.randint(2**62, (), device="cpu")))
        prompts = first_prompts(drawing, self.asking, self.spacing_mm, generator)
        if not prompts:
            return None
        prompt = prompts[int(torch.randint(len(prompts), (), device="cpu"))]
        blind = bool(torch.rand((), device="cpu") < BLIND) and (prompt.points_voxel is not None)
        return replace(prompt, mask=None) if blind else prompt

    def frozen(self) -> HeadTunable:
        """The model with its head as it now is, for good."""
        freeze(self.head)
        return self.model

    def tuned_state(self) -> dict[str, torch.Tensor]:
        """The head."""
        return copies(self.head.state_dict())

    def load_tuned_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put back what `tuned_state` gave.

        Raises:
            DataError: missing or unexpected names, or other shapes.
        """
        fill(self.head.state_dict(), state, f"the tuned head of {self.model.name}")
