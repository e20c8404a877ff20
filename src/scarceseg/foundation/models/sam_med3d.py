"""SAM-Med3D."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from scarceseg.foundation import FOUNDATIONS, FoundationModel
from scarceseg.foundation.models import check_options
from scarceseg.foundation.weights import find


def build_sam_med3d(name: str, /, *, path: Path | None = None, **options: Any) -> FoundationModel:
    """SAM-Med3D on volumes."""
    from scarceseg.foundation.sam_med3d_tuned import SamMed3DModel

    check_options(name, options, SamMed3DModel)
    return SamMed3DModel.from_file(path or find(name), name=name, **options)


for _name in ("sam-med3d", "sam-med3d-turbo"):
    FOUNDATIONS.register(_name)(partial(build_sam_med3d, _name))
