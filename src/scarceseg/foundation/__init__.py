"""Foundation models: volumes and prompts (or a few labels) come in, probabilities in the same voxel frame go out.

One file a part; `FOUNDATIONS` finds the models in ``models``. They stand behind `Promptable` and `Tunable` (`base`), so that
the terms built on them never know which one it is.
"""

from __future__ import annotations

from collections.abc import Callable

from scarceseg.foundation.base import Embedding, HeadTunable, Masks, Promptable, Tunable, TunedModel, Tuning
from scarceseg.registry import Registry

FoundationModel = Promptable | Tunable
FOUNDATIONS: Registry[Callable[[], FoundationModel]] = Registry("foundation model", "scarceseg.foundation.models")

__all__ = [
    "FOUNDATIONS",
    "Embedding",
    "FoundationModel",
    "HeadTunable",
    "Masks",
    "Promptable",
    "Tunable",
    "TunedModel",
    "Tuning",
]
