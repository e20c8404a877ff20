"""Validation cases: Dice during training, checkpoint choice, and the full metrics at the end.

Their labels serve these alone; planning reads them once before, to refuse what could not be used.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_model, save_model
from torch import nn

from scarceseg.config import Config
from scarceseg.data.dataset import Case, Split
from scarceseg.data.images import read_volume, write_image
from scarceseg.data.plan import Plan
from scarceseg.data.prepare import PreparedCase, prepare_cases
from scarceseg.engine.folder import read_json, write_json
from scarceseg.engine.logging import Display, RunLog
from scarceseg.errors import Interrupted
from scarceseg.files import write_atomic
from scarceseg.functional.sliding import sliding_window
from scarceseg.inference.predictor import Prediction, Predictor
from scarceseg.types import Geometry


class Validation:
    """Dice on the validation cases every so many iterations, on the prepared grid, and the best weights so far."""

    def __init__(
        self,
        config: Config,
        cases: tuple[Case, ...],
        plan: Plan,
        folder: Path,
        log: RunLog,
        fabric: Fabric,
        cache: Path | None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self.cases, self.plan, self.stop = config, cases, plan, stop
        self.folder, self.log, self.fabric, self.cache = folder, log, fabric, cache
        self.every = config.validate_every or (max(config.iterations // 10, 1) if config.select == "best" else 0)
        self._prepared: dict[str, PreparedCase] | None = None

    @property
    def best_file(self) -> Path:
        """Weights of the best validation so far."""
        return self.folder / "checkpoints" / "best.safetensors"

    def hook(self, student: nn.Module) -> Callable[[int], None] | None:
        """Function for the loop's `after_step`, or None when nothing is to be validated during training."""
        if not self.cases or not self.every or not self.fabric.is_global_zero:
            return None

        def after_step(finished: int) -> None:
            last = finished == self.config.iterations and self.config.select == "best"
            if (finished % self.every == 0 or last) and not self.log.has("validation", finished):
                self.validate(student, finished)

        return after_step

    def validate(self, student: nn.Module, finished: int) -> None:
        """Measure, log, and keep the weights if they are the best; when asked to stop in between, nothing of it."""
        if self._prepared is None:
            self._prepared = prepare_cases(self.cases, (), self.plan, self.cache, None)
        scores = []
        for case in self._prepared.values():
            if self.stop():
                return
            scores.append(self._dice(student, case))
        dice = np.nanmean(scores, axis=0)
        names = list(self.plan.classes)[1:]
        mean = float(np.mean(dice))
        self.log.record("validation", finished, {f"dice/{n}": float(d) for n, d in zip(names, dice, strict=True)})
        record = self.folder / "checkpoints" / "best.json"
        if self.config.select == "best" and mean > read_json(record, {"dice": -1.0})["dice"]:
            write_atomic(self.best_file, lambda path: save_model(student, str(path)))
            write_json(record, {"iteration": finished, "dice": mean})

    def _dice(self, student: nn.Module, case: PreparedCase) -> list[float]:
        assert case.label is not None
        student.eval()
        with torch.inference_mode(), self.fabric.autocast():
            probability = sliding_window(
                torch.from_numpy(np.array(case.image)), student, self.plan.patch, device=self.fabric.device
            )
        predicted = probability.argmax(0).cpu().numpy()
        label = np.asarray(case.label)
        scores = []
        for index in range(1, len(self.plan.classes)):
            p, r = predicted == index, label == index
            total = int(p.sum()) + int(r.sum())
            scores.append(2.0 * int((p & r).sum()) / total if total else 1.0)
        return scores

    def load_best(self, student: nn.Module) -> None:
        """Put the chosen weights into the student: the last, or with `select: best` the best."""
        if self.config.select == "best" and self.best_file.exists():
            load_model(student, self.best_file)


SHOWN = 3
"""Cases with a picture in the report."""

Seen = tuple[np.ndarray, Prediction, Geometry]
"""First channel of a case, what the network says of it, and the grid of both."""


def finish(folder: Path, split: Split, device: str, stop: Callable[[], bool] | None = None) -> list[str]:
    """Predict the validation cases as `predict` would, evaluate them, and keep pictures of a few cases.

    Without validation cases, three unlabelled ones are predicted for the pictures.

    Returns:
        Cases for which the network's output is not a number everywhere.

    Raises:
        Interrupted: `stop` said so.
    """
    predictor = Predictor(folder, device=device)
    shown: list[tuple[Any, Path | None]] = [(case, case.label) for case in split.val]
    if not shown:
        shown = [(case, None) for case in split.unlabelled[:SHOWN]]
    target = folder / "validation"
    target.mkdir(exist_ok=True)
    cases = {case.name: (case.images, reference) for case, reference in shown}
    kept: dict[str, Seen] = {}
    broken: list[str] = []

    def see(name: str) -> Seen:
        volume, geometry = read_volume(cases[name][0])
        return volume[0], predictor.predict_volume(volume, geometry), geometry

    with Display("validate", 0, len(cases)) as display:
        for number, name in enumerate(cases, 1):
            if stop is not None and stop():
                raise Interrupted("stopped while validating; --resume goes on from there")
            image, prediction, geometry = see(name)
            if not prediction.is_number:
                broken.append(name)
            if split.val:
                write_image(prediction.label, geometry, target / f"{name}.nii.gz")
            if len(cases) <= SHOWN:  # more would fill the memory; those that are shown are predicted again
                kept[name] = image, prediction, geometry
            display.update(number, note=name)
    names = _evaluate(folder, split.val, target) if split.val else list(cases)
    (folder / "figures").mkdir(exist_ok=True)
    for rank, name in names_with_rank(names):
        image, prediction, geometry = kept[name] if name in kept else see(name)
        path = folder / "figures" / f"{rank}_{name}.npz"
        _figure(path, name, rank, image, prediction, geometry, cases[name][1])
    return broken


def names_with_rank(names: list[str]) -> list[tuple[str, str]]:
    """Best, median and worst of names sorted from worst to best; with three or fewer, all of them."""
    if len(names) <= SHOWN:
        return [(f"case{i}", name) for i, name in enumerate(names)]
    return [("best", names[-1]), ("median", names[len(names) // 2]), ("worst", names[0])]


def _evaluate(folder: Path, cases: tuple[Case, ...], predictions: Path) -> list[str]:
    from scarceseg.evaluation.evaluate import evaluate

    # Their own files, as the folder of labels may hold others that no dataset knows of.
    references = {case.name: case.label for case in cases if case.label is not None}
    result = evaluate(predictions, references, json=folder / "evaluation.json").to_json()
    score = {
        name: float(np.mean([metrics["dice"] for metrics in classes.values()]))
        for name, classes in result["cases"].items()
    }
    return sorted(score, key=lambda name: score[name])


def _figure(
    path: Path,
    name: str,
    rank: str,
    image: np.ndarray,
    prediction: Prediction,
    geometry: Geometry,
    reference: Path | None,
) -> None:
    from scarceseg.data.images import read_image

    arrays: dict[str, Any] = {"image": image, "prediction": prediction.label, "uncertainty": prediction.uncertainty}
    if reference is not None:
        arrays["reference"] = read_image(reference)[0].astype(np.uint8)
    np.savez_compressed(
        path,
        title=name if rank.startswith("case") else f"{name} ({rank})",
        spacing_mm=geometry.spacing_mm,
        direction=geometry.direction,
        **arrays,
    )
