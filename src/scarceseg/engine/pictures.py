"""What a run keeps of its unlabelled volumes for the report: guesses beside the student's masks, and one mosaic.

Everything lies on the prepared grid and is made of images and of what models said. No label file is opened here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import entr

from scarceseg.data.prepare import PreparedCase
from scarceseg.engine.workspace import Workspace
from scarceseg.errors import ScarceSegError
from scarceseg.files import write_text
from scarceseg.foundation.stitching import Stitch
from scarceseg.inference.predictor import Predictor, Prepared
from scarceseg.methods.base import Term
from scarceseg.methods.fine_tuning import TuningOptions
from scarceseg.methods.pseudo_labels import PseudoLabels, PseudoLabelTerm
from scarceseg.report.figures import grey
from scarceseg.types import IGNORE_LABEL, LabelMap

POOL, MOSAIC = "unlabelled", "mosaic"
"""Folders in the run's ``figures``."""

LEARNT = "learnt.json"
"""In the folder `POOL`: of each stage some of whose guesses are not learnt, the cases whose guesses are."""

CONFIDENCE = "foreground_confidence"
"""What volumes are ranked by: over all voxels, easy background would hide the rest."""

Size = tuple[int, int, int]


def keep_pool(work: Workspace, terms: Mapping[str, Term]) -> None:
    """Keep pictures of up to three unlabelled volumes, if a term has guessed labels for them.

    The least, the median and the most confident volume of the first such term go to ``figures/unlabelled``, each with the
    guesses of all terms and the mask of the trained network, with `LEARNT` beside them. For each term that tuned a 2D
    foundation model the median one goes to ``figures/mosaic`` as that model saw it. The run must hold its network already.
    """
    guesses = {name: labels for name, term in terms.items() if (labels := _guesses(term, work)) is not None}
    if not guesses:
        return
    cases = {case.name: case for case in work.unlabelled}
    chosen = ranked(next(iter(guesses.values())), list(cases))
    if not chosen:
        return
    silent = {name: _silent(terms[name], work, labels) for name, labels in guesses.items()}
    table = {guesses[name].folder.name: sorted(cases.keys() - out) for name, out in silent.items() if out}
    write_text(_made(work.run / "figures" / POOL / LEARNT), json.dumps(table, indent=1) + "\n")
    predictor = Predictor(work.run, device=str(work.fabric.device))
    for number, (rank, name) in enumerate(chosen):
        path = work.run / "figures" / POOL / f"{number}_{name}.npz"
        _keep_case(path, rank, cases[name], guesses, [term for term, out in silent.items() if name in out], predictor)
    shown = cases[chosen[len(chosen) // 2][1]]
    for name, labels in guesses.items():
        options = terms[name].options
        if not isinstance(options, TuningOptions) or not labels.has(shown.name):
            continue
        model = work.foundation_of(terms[name])
        try:
            layout = _layout(work, model, options.axes[0])
        except ScarceSegError as error:  # a resumed run has tuned its model long ago and may not find it any more
            work.warnings.append(f"there is no picture of the mosaic of {name}: {error}")
            continue
        if layout is not None:
            about = {"term": name, "model": Path(model).name}
            path = _made(work.run / "figures" / MOSAIC / f"{name}.npz")
            _keep_mosaic(path, shown, labels.label(shown.name), layout, options.axes[0], about)


def ranked(labels: PseudoLabels, names: list[str]) -> list[tuple[str, str]]:
    """(rank, case) of the least, the median and the most confident guess; fewer when there are fewer cases."""
    sure = {name: float(labels.notes(name).get(CONFIDENCE, 0.0)) for name in names if labels.has(name)}
    order = sorted(sure, key=lambda name: sure[name])
    if len(order) < 3:
        return list(zip(("least confident", "most confident"), order, strict=False))
    middle = order[len(order) // 2]
    return [("least confident", order[0]), ("median", middle), ("most confident", order[-1])]


def _guesses(term: Term, work: Workspace) -> PseudoLabels | None:
    """The labels a term has guessed for whole volumes, or None when it has not."""
    if not isinstance(term, PseudoLabelTerm) or not term.stages():
        return None
    labels = term.labels(work)
    return labels if (labels.folder / PseudoLabels.TABLE).exists() else None


def _silent(term: Term, work: Workspace, labels: PseudoLabels) -> set[str]:
    """The cases whose guesses a term does not learn: those that have no label, and all but the surest where those alone count."""
    assert isinstance(term, PseudoLabelTerm)
    names = {case.name for case in work.unlabelled if labels.has(case.name)}
    share = term.learnt(work)
    if share is not None:
        return names - labels.surest(share)
    return {name for name in names if labels.notes(name).get("left_out")}


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _keep_case(
    path: Path,
    rank: str,
    case: PreparedCase,
    guesses: Mapping[str, PseudoLabels],
    silent: list[str],
    predictor: Predictor,
) -> None:
    image = np.asarray(case.image)
    said = predictor.predict_prepared(Prepared(image, case.geometry, case.original)).prepared_probability
    known = {name: labels for name, labels in guesses.items() if labels.has(case.name)}
    arrays: dict[str, Any] = {
        f"guess_{number}": np.asarray(labels.label(case.name)) for number, labels in enumerate(known.values())
    }
    notes = {name: labels.notes(case.name) for name, labels in known.items()}
    confidence = {name: about.get(CONFIDENCE) for name, about in notes.items()}
    np.savez_compressed(
        path,
        title=f"{case.name} ({rank})",
        about=json.dumps({"terms": list(known), "confidence": confidence, "silent": silent}),
        image=grey(image[0]),
        prediction=said.argmax(0).astype(np.uint8),
        uncertainty=(entr(said).sum(0) / np.log(len(said))).clip(0, 1).astype(np.float16),
        spacing_mm=case.geometry.spacing_mm,
        direction=case.geometry.direction,
        **arrays,
    )


def _layout(work: Workspace, name: str, axis: int) -> tuple[Stitch, bool] | None:
    """How a foundation model lays a volume out, and whether it sees it whole; None for a model that sees volumes as they are."""
    from scarceseg.foundation.sam import image_size_of
    from scarceseg.foundation.sam_volume import SamPromptable
    from scarceseg.foundation.tiny_sam import TinySam

    model = work.model(name)
    if isinstance(model, TinySam):
        return Stitch.fit(model.seen, image_size_of(model.sam), resize=model.mosaic.resize), True
    if isinstance(model, SamPromptable):
        return Stitch.fit(_along(work.plan.patch, axis), image_size_of(model.sam)), False
    return None


def _along(size: Size, axis: int) -> Size:
    """Sizes with the sliced axis last, as a model that slices along another one has them."""
    sides = list(size)
    sides[axis], sides[2] = sides[2], sides[axis]
    return sides[0], sides[1], sides[2]


def _keep_mosaic(
    path: Path, case: PreparedCase, label: LabelMap, layout: tuple[Stitch, bool], axis: int, about: Mapping[str, Any]
) -> None:
    stitch, whole = layout
    image = torch.from_numpy(grey(np.asarray(case.image[0])).swapaxes(axis, 2).copy())[None, None].float()
    guess = torch.from_numpy(np.asarray(label).swapaxes(axis, 2).copy())[None, None].float()
    if whole:
        image = F.interpolate(image, size=stitch.size, mode="trilinear", align_corners=False)
        guess = F.interpolate(guess, size=stitch.size, mode="nearest-exact")
    else:
        image, guess = _patch(image, guess, stitch.size), _patch(guess, guess, stitch.size)
    canvases = stitch.stitch(image)[:, 0].round().clamp(0, 255).byte().numpy()
    labels = stitch.stitch_label(guess[:, 0].byte()).numpy()
    best = int(((labels > 0) & (labels != IGNORE_LABEL)).sum((1, 2)).argmax())
    facts = {
        "slices": stitch.size[2],
        "grid": stitch.grid,
        "tile": stitch.tile,
        "canvas": stitch.canvas,
        "number": best + 1,
        "canvases": stitch.canvases,
        "axis": "xyz"[axis],
        "whole": whole,
    }
    np.savez_compressed(
        path, title=case.name, about=json.dumps({**about, **facts}), image=canvases[best], label=labels[best]
    )


def _patch(volume: torch.Tensor, guess: torch.Tensor, size: Size) -> torch.Tensor:
    """The patch ``[1, 1, *size]`` around the middle of the guess; zeros where the volume ends."""
    found = (guess[0, 0] > 0).nonzero().float()
    middle = found.mean(0) if len(found) else torch.tensor(guess.shape[2:]) / 2
    for axis, side in enumerate(size):
        length = volume.shape[2 + axis]
        start = min(max(int(middle[axis]) - side // 2, 0), max(length - side, 0))
        volume = volume.narrow(2 + axis, start, min(side, length))
    missing = [side - have for side, have in zip(size, volume.shape[2:], strict=True)]
    return F.pad(volume, [pad for short in reversed(missing) for pad in (0, short)])
