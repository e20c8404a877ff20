"""Embeddings of the last patches, for patches that come again."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from scarceseg.foundation.base import Embedding, Promptable, Spacing
from scarceseg.types import ImageBatch


class EmbeddingMemory:
    """The last patches one model embedded; one that comes again is not embedded again.

    Args:
        size: patches that are kept; 0 keeps none.
    """

    def __init__(self, size: int) -> None:
        self.kept: deque[tuple[torch.Tensor, Embedding, int]] = deque(maxlen=size)

    def embed(
        self, model: Promptable, image: ImageBatch, rows: Sequence[int], spacing_mm: Spacing
    ) -> tuple[Embedding, dict[int, int]]:
        """The embedding of the rows asked about, new ones in one batch, and where in it each row is."""
        known = {row: found for row in rows if (found := self._recall(image[row])) is not None}
        new = [row for row in rows if row not in known]
        parts = list(known.values())
        fresh = _exact(model.embed(image[new], spacing_mm)) if new else None
        frames = [part.frame for part in (*parts, fresh) if part is not None]
        if any(frame != frames[0] for frame in frames):  # made for their batch alone: cannot be joined
            return _exact(model.embed(image[list(rows)], spacing_mm)), {row: place for place, row in enumerate(rows)}
        if fresh is not None:
            self.kept.extend((image[row].clone(), fresh, place) for place, row in enumerate(new))
            parts.append(fresh)
        places = {row: place for place, row in enumerate([*known, *new])}
        return (parts[0] if len(parts) == 1 else _joined(parts)), places

    def _recall(self, patch: torch.Tensor) -> Embedding | None:
        return next((made.select([place]) for image, made, place in self.kept if torch.equal(image, patch)), None)


def _exact(embedding: Embedding) -> Embedding:
    """Features made under autocast, in the precision that answers need."""
    kept = {
        name: value.float() if value.dtype == torch.bfloat16 else value for name, value in embedding.features.items()
    }
    return Embedding(kept, embedding.size, embedding.frame)


def _joined(parts: Sequence[Embedding]) -> Embedding:
    features = {name: torch.cat([part.features[name] for part in parts]) for name in parts[0].features}
    return Embedding(features, parts[0].size, parts[0].frame)
