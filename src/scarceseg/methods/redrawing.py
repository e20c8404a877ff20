"""Teaching the head of a promptable model, on the labelled volumes of a run, to redraw what a student drew."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from scarceseg.config import OptimConfig
from scarceseg.data.drawings import Drawings
from scarceseg.data.sampling import PatchSampler, Source
from scarceseg.errors import DataError, RunError
from scarceseg.foundation.redrawing import Redrawing
from scarceseg.foundation.weights import read_tensors
from scarceseg.methods.base import build_terms

if TYPE_CHECKING:
    from scarceseg.engine.workspace import Workspace

STEPS = 300
ROWS = 2
FOREGROUND = 0.5
"""Share of the patches around a voxel of some structure; the others lie anywhere, as the unlabelled ones do."""


def train_to_redraw(work: Workspace, stage: str, opened: Redrawing, iterations: int, lr: float) -> None:
    """Tune a model's head by ``0.5 (CE + Dice)`` of what it makes of spoilt references of the labelled volumes.

    Args:
        work: the run.
        stage: names checkpoints, logs and draws.
        opened: is trained in place.
        iterations, lr: of AdamW with a poly schedule.
    """
    seed, plan = work.seed(stage), work.plan
    patches = PatchSampler(
        [Source(case.name, case.image, case.label) for case in work.labelled],
        [],
        plan.patch,
        ROWS,
        0,
        seed,
        augment=work.config.augment,
        foreground=FOREGROUND,
        spacing_mm=plan.spacing_mm,
    )
    optim = OptimConfig(
        name="adamw", lr=lr, weight_decay=0.1, schedule="poly", power=0.9, warmup=min(20, iterations), clip_norm=1.0
    )
    terms = build_terms("supervised", {}, 2)
    work.fit(stage, opened, terms, Drawings(patches, seed), iterations, optim, "contiguous")


def load_tuned(opened: Redrawing, file: Path) -> None:
    """Put back what the stage left.

    Raises:
        RunError: it is missing or does not fit.
    """
    try:
        opened.load_tuned_state(read_tensors(file).state)
    except DataError as error:
        raise RunError(f"cannot use the tuned head {file}: {error}; remove that folder and --resume") from None
