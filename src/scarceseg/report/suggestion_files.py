"""Where a run keeps its suggestions, and which weights they belong to."""

from __future__ import annotations

import hashlib
from pathlib import Path

RESULT = "suggestions.json"
FOLDER = "suggestions"

SHOWN = 6
"""So many suggested volumes are drawn in the report."""


def model_hash(run: Path) -> str:
    """Hash of a run's network, the way it prepares volumes included; empty when the run has none."""
    digest = hashlib.sha256()
    for name in ("model.safetensors", "model.json"):
        try:
            digest.update((run / name).read_bytes())
        except OSError:
            return ""
    return digest.hexdigest()[:32]


def measured_path(run: Path, case: str) -> Path:
    """Entry (in the cache's format) with the numbers of one case."""
    return run / FOLDER / f"{case}.npy"


def figure_path(run: Path, case: str) -> Path:
    """Picture data of a suggested case, in the form of ``figures/*.npz``."""
    return run / FOLDER / f"{case}.npz"
