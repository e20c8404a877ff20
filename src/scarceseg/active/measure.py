"""One volume -> its numbers, kept in the run folder: a volume measured with the same weights is not predicted again."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scarceseg.active.features import Watched, volume_statistics
from scarceseg.active.scores import class_uncertainty, disagreement, entropy_map
from scarceseg.config import Config
from scarceseg.data.cache import entry_path, load, store
from scarceseg.data.dataset import Case, UnlabelledCase
from scarceseg.data.prepare import PreparedCase
from scarceseg.files import write_atomic
from scarceseg.inference.prediction import Prepared
from scarceseg.inference.predictor import Predictor
from scarceseg.methods.base import build_terms
from scarceseg.methods.pseudo_labels import PseudoLabels, PseudoLabelTerm
from scarceseg.report.suggestion_files import figure_path, measured_path, model_hash

VERSION = 1
"""Part of every stamp; raised when the numbers of a volume change."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Measured:
    """What is known of one volume.

    Attributes:
        case: name.
        by_class: mean entropy of each foreground class, None where the student finds none of it.
        whole: mean entropy of the whole volume.
        disagreement: one minus the Dice with each other teacher, by term name.
        present: classes in the label of a labelled case, background left out; None for an unlabelled one.
        kind: of the features, "encoder" or "statistics".
        features: one row.
    """

    case: str
    by_class: tuple[float | None, ...]
    whole: float
    disagreement: dict[str, float]
    present: tuple[int, ...] | None
    kind: str
    features: NDArray[np.float32]


class Measurer:
    """A run's student and other teachers, asked about one volume after the other.

    Args:
        run: a finished run.
        config: its settings.
        predictor: its network; it is wrapped, so that features come with the prediction.
    """

    def __init__(self, run: Path, config: Config, predictor: Predictor) -> None:
        self.run, self.predictor = run, predictor
        self.classes = len(predictor.classes)
        self.weights = model_hash(run)
        self.teachers = other_teachers(run, config, self.classes)
        self._watched = Watched(predictor.network)
        predictor.network = self._watched

    def stamp(self, case: Case | UnlabelledCase) -> str:
        """Changes with the weights, the teachers, and the files of the case that may be read.

        Raises:
            DataError: a file is missing.
        """
        label = (case.label,) if isinstance(case, Case) and case.label is not None else ()
        teachers = {name: labels.folder.name for name, labels in self.teachers.items()}
        how = {"version": VERSION, "weights": self.weights, "teachers": teachers}
        return entry_path(Path(), case.name, (*case.images, *label), how).stem

    def known(self, case: Case | UnlabelledCase) -> Measured | None:
        """What an earlier call has left, if it still holds."""
        found = load(measured_path(self.run, case.name))
        if found is None or found[1].get("stamp") != self.stamp(case):
            return None
        features, notes = found
        try:
            return _measured(case.name, np.array(features), notes)
        except (KeyError, TypeError, ValueError):  # somebody edited it
            return None

    def measure(self, case: PreparedCase, stamp: str, progress: Progress | None = None) -> Measured:
        """Predict a volume and keep its numbers.

        Args:
            case: its label is looked at only to see which classes it has; an unlabelled case has none.
            stamp: of `stamp`.
            progress: called with the windows done and their number.
        """
        probability = self._predict(case, progress)
        label = probability.argmax(0).astype(np.uint8)
        entropy = entropy_map(probability)
        features = self._watched.features()
        kind = "statistics" if features is None else "encoder"
        if features is None:
            features = volume_statistics(case.image, label, case.geometry.spacing_mm, self.classes)
        notes = {
            "stamp": stamp,
            "by_class": class_uncertainty(entropy, label, self.classes),
            "whole": float(entropy.mean(dtype=np.float64)),
            "disagreement": {} if case.label is not None else self._disagreements(case.name, label),
            "present": None if case.label is None else [int(c) for c in np.unique(case.label) if c > 0],
            "kind": kind,
        }
        store(measured_path(self.run, case.name), features, notes)
        return _measured(case.name, features, notes)

    def keep_figure(self, case: PreparedCase, stamp: str, progress: Progress | None = None) -> None:
        """Keep image, mask and uncertainty of a volume for the report, on the prepared grid."""
        probability = self._predict(case, progress)
        arrays: dict[str, Any] = {
            "image": np.asarray(case.image[0], dtype=np.float32),
            "prediction": probability.argmax(0).astype(np.uint8),
            "uncertainty": entropy_map(probability).astype(np.float16),
            "spacing_mm": case.geometry.spacing_mm,
            "direction": case.geometry.direction,
            "title": case.name,
            "stamp": stamp,
        }

        def write(path: Path) -> None:
            with path.open("wb") as file:  # given a path, NumPy would add its own ending
                np.savez_compressed(file, **arrays)

        write_atomic(figure_path(self.run, case.name), write)

    def has_figure(self, case: Case | UnlabelledCase) -> bool:
        """Whether the figure of a case is there and of these weights."""
        try:
            with np.load(figure_path(self.run, case.name), allow_pickle=False) as file:
                return str(file["stamp"]) == self.stamp(case)
        except Exception:  # damaged archives fail in many ways
            return False

    def _predict(self, case: PreparedCase, progress: Progress | None) -> NDArray[np.float32]:
        self._watched.reset()
        volume = Prepared(np.asarray(case.image), case.geometry, case.original)
        return self.predictor.predict_prepared(volume, progress).prepared_probability

    def _disagreements(self, case: str, label: NDArray[np.uint8]) -> dict[str, float]:
        found = {}
        for name, labels in self.teachers.items():
            value = disagreement(label, np.asarray(labels.label(case)), self.classes)
            if value is not None:
                found[name] = value
        return found


def _measured(case: str, features: NDArray[np.float32], notes: dict[str, Any]) -> Measured:
    present = notes["present"]
    return Measured(
        case,
        tuple(notes["by_class"]),
        float(notes["whole"]),
        dict(notes["disagreement"]),
        None if present is None else tuple(present),
        str(notes["kind"]),
        features,
    )


def other_teachers(run: Path, config: Config, classes: int) -> dict[str, PseudoLabels]:
    """Who else labelled the pool in a run, by term name, each with its newest guesses; empty when nobody did.

    Guesses are made before or during training, by a tuned foundation model, atlases or an earlier network, and lie in
    ``stages/<term>-<stage>``.
    """
    found = {}
    for name, term in build_terms(config.method, config.terms, classes).items():
        if isinstance(term, PseudoLabelTerm):
            stages = run / "stages"
            tables = [path.parent for path in stages.glob(f"*/{PseudoLabels.TABLE}") if _stage_of(path.parent, name)]
            if tables:
                found[name] = PseudoLabels(max(tables, key=lambda folder: _stage_of(folder, name) or (False, 0)))
    return found


def _stage_of(folder: Path, term: str) -> tuple[bool, int] | None:
    """Place of a stage of a term in time: labels come before rounds, and numbers count up; None for another's stage."""
    match = re.fullmatch(rf"{re.escape(term)}-(label|round)(\d*)", folder.name)
    return (match[1] == "round", int(match[2] or 0)) if match else None
