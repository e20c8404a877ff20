"""Our small promptable 3D model."""

from __future__ import annotations

from pathlib import Path

from scarceseg.foundation import FOUNDATIONS, FoundationModel
from scarceseg.foundation.weights import find


@FOUNDATIONS.register("tiny-sam3d")
def build_tiny_sam3d(
    *, path: Path | None = None, longest: int = 112, channel: int | None = None, reach: float = 1.2
) -> FoundationModel:
    """The packaged weights, or those of another file of the same kind."""
    from scarceseg.foundation.tiny_sam3d import TinySam3D

    return TinySam3D.from_file(path or find("tiny-sam3d"), longest=longest, channel=channel, reach=reach)
