"""What terms with guessed labels and terms that ask leave in a run folder, made up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from scarceseg.data.phantoms import PhantomConfig, make_phantom
from scarceseg.foundation.stitching import Stitch
from scarceseg.report.figures import grey

SHAPE = (20, 18, 16)
RANKS = ("least confident", "median", "most confident")


def add_pool(run: Path, cases: Sequence[str], terms: Sequence[str] = ("sfr",), classes: int = 2) -> None:
    """Pseudo-labels of three unlabelled cases, the mosaic of one, the tables of confidences."""
    (run / "figures" / "unlabelled").mkdir(parents=True)
    (run / "figures" / "mosaic").mkdir()
    for number, (case, rank) in enumerate(zip(cases, RANKS, strict=True)):
        volume, label, geometry = make_phantom(number, PhantomConfig(shape=SHAPE, classes=classes))
        sure = {term: 0.6 + 0.1 * number + 0.02 * k for k, term in enumerate(terms)}
        guesses = {f"guess_{k}": np.roll(label, 1 + k, 0) for k in range(len(terms))}
        np.savez_compressed(
            run / "figures" / "unlabelled" / f"{number}_case.npz",
            title=f"{case} ({rank})",
            about=json.dumps({"terms": list(terms), "confidence": sure}),
            image=grey(volume[0]),
            prediction=np.roll(label, -1, 1),
            uncertainty=(label > 0).astype(np.float16) / 2,
            spacing_mm=np.array(geometry.spacing_mm),
            direction=np.array(geometry.direction),
            **guesses,
        )
    for term in terms:
        folder = run / "stages" / f"{term}-label"
        folder.mkdir(parents=True)
        rows = {case: {"confidence": 0.9, "foreground_confidence": 0.6 + 0.1 * k} for k, case in enumerate(cases)}
        table = {"foundation": "tiny-sam", "view": "whole volumes", "tune_iterations": 300, "cases": rows}
        (folder / "confidence.json").write_text(json.dumps(table))
        add_mosaic(run, term, cases[1])


def add_mosaic(run: Path, term: str, case: str) -> None:
    """A layout of 16 slices on a canvas of 96 pixels."""
    size = (20, 18, 16)
    stitch = Stitch.fit(size, 96)
    label = np.zeros(stitch.canvas, np.uint8)
    label[30:40, 30:40] = 1
    about = {
        "term": term,
        "model": "tiny-sam",
        "slices": 16,
        "grid": stitch.grid,
        "tile": stitch.tile,
        "canvas": stitch.canvas,
        "number": 1,
        "canvases": 1,
        "axis": "z",
        "whole": True,
    }
    np.savez_compressed(
        run / "figures" / "mosaic" / f"{len(list((run / 'figures' / 'mosaic').iterdir()))}.npz",
        title=case,
        about=json.dumps(about),
        image=np.full(stitch.canvas, 90, np.uint8),
        label=label,
    )


def add_pictures(run: Path, count: int, name: str = "semisam") -> None:
    """Pictures of prompts, the number of the iteration in their grey value, and what was logged of the questions."""
    (run / "pictures").mkdir()
    for number in range(count):
        image = np.full((40, 160, 3), 20 * number, np.uint8)
        Image.fromarray(image).save(run / "pictures" / f"train-{name}-{number * 50:06d}.png")
    asked = {f"{key}/{name}": 0.5 for key in ("asked", "agreement", "quality", "gate")}
    with (run / "metrics.jsonl").open("a") as file:
        for iteration in (0, 50, 100):
            file.write(json.dumps({"iteration": iteration, "stage": "train", **asked}) + "\n")
