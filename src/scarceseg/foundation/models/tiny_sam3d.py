"""Our small promptable 3D model."""

from __future__ import annotations

from pathlib import Path

from scarceseg.foundation import FOUNDATIONS, FoundationModel
from scarceseg.foundation.weights import find


@FOUNDATIONS.register("tiny-sam3d")
def build_tiny_sam3d(
    *,
    path: Path | None = None,
    longest: int = 112,
    channel: int | None = None,
    reach: float = 1.2,
    tuned_longest: int = 64,
    placed: bool = False,
) -> FoundationModel:
    """The packaged weights, or those of another file of the same kind."""
    from scarceseg.foundation.tiny_sam3d_tuned import TinySam3DModel

    return TinySam3DModel.from_file(
        path or find("tiny-sam3d"),
        longest=longest,
        channel=channel,
        reach=reach,
        tuned_longest=tuned_longest,
        placed=placed,
    )
