"""Checkpoints that are either whole or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from scarceseg.errors import RunError
from scarceseg.files import write_atomic


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values atomically."""
    write_atomic(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint on the CPU; no pickled code is run.

    Raises:
        RunError: missing or damaged.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(f"there is no checkpoint {path}: train first, or check the path") from None
    except Exception as error:  # on damaged bytes torch.load fails in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RunError(f"cannot read the checkpoint {path}: {reason}; delete it to start again") from None
    return state
