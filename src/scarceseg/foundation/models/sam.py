"""SAM and MedSAM."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from scarceseg.foundation import FOUNDATIONS, FoundationModel
from scarceseg.foundation.weights import find


def build_sam(name: str, /, *, path: Path | None = None, **options: Any) -> FoundationModel:
    """A SAM or MedSAM on volumes, slice by slice or as one mosaic."""
    from scarceseg.foundation.sam_volume import SamPromptable

    return SamPromptable.from_file(path or find(name), name=name, **options)


for _name in ("sam-vit-b", "sam-vit-l", "sam-vit-h", "medsam"):
    FOUNDATIONS.register(_name)(partial(build_sam, _name))
