"""Our small SAM for stitched mosaics."""

from __future__ import annotations

from pathlib import Path

from scarceseg.foundation import FOUNDATIONS, FoundationModel
from scarceseg.foundation.weights import find


@FOUNDATIONS.register("tiny-sam")
def build_tiny_sam(*, path: Path | None = None, augment: bool = False) -> FoundationModel:
    """The packaged weights, or those of another file of the same kind."""
    from scarceseg.foundation.tiny_sam import TinySam

    return TinySam.from_file(path or find("tiny-sam"), augment=augment)
