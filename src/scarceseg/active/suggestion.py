"""What `suggest` returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
"""Of ``suggestions.json``; raised when an older program would misread it."""


@dataclass(frozen=True)
class Suggestion:
    """One unlabelled volume.

    Attributes:
        case: its name.
        score: what the ranking goes by when the volume's turn comes, in [0, 1]; see `scarceseg.active.scores`.
        uncertainty: mean entropy of the student's structures and their rims, in [0, 1].
        disagreement: one minus the Dice with the run's other teachers (their mean), in [0, 1]; None without any.
        distance: to the nearest labelled volume, in the unit of the features.
        nearest: name of that volume.
        why: the reasons in plain words.
    """

    case: str
    score: float
    uncertainty: float
    disagreement: float | None
    distance: float
    nearest: str
    why: str


@dataclass(frozen=True)
class Suggestions:
    """Answer of `suggest`.

    Attributes:
        run: the run folder.
        weights: hash of the network the numbers belong to.
        count: how many were asked for, or the whole pool when it is smaller.
        ranking: all unlabelled volumes, the one to label first comes first.
        teachers: whom the student was compared with.
        features: "encoder" or "statistics", what distances are measured in.
        labelled: names of the labelled volumes.
        notes: what the user should know.
    """

    run: Path
    weights: str
    count: int
    ranking: tuple[Suggestion, ...]
    teachers: tuple[str, ...]
    features: str
    labelled: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def suggestions(self) -> tuple[Suggestion, ...]:
        """The first `count` of the ranking."""
        return self.ranking[: self.count]

    def to_json(self) -> dict[str, Any]:
        """Content of ``suggestions.json``."""
        return {
            "format": FORMAT,
            "weights": self.weights,
            "count": self.count,
            "teachers": list(self.teachers),
            "features": self.features,
            "labelled": list(self.labelled),
            "notes": list(self.notes),
            "ranking": [asdict(one) for one in self.ranking],
        }
