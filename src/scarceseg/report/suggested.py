"""The volumes to label next, when `scarceseg suggest` was asked: the ranking, and pictures of its first ones."""

from __future__ import annotations

import json
from typing import Any

from scarceseg.errors import DataError
from scarceseg.report.folder import RunRecord, ShownCase, read_case
from scarceseg.report.suggestion_files import RESULT, SHOWN, figure_path, model_hash
from scarceseg.report.viewers import Viewer, planes_viewer, within_budget

BUDGET = 2_500_000
"""Characters of the images of this section: there are others on the page."""

WORDS = (
    "Unlabelled volumes in the order in which their labels promise most. Uncertainty: mean entropy of the structures the "
    "network finds and of their rims, 0 certain, 1 undecided. Disagreement: one minus the Dice with another teacher of the run. "
    "Distance: to the most similar labelled volume. Score: rank of the first two in the pool, times rank of the distance to what "
    "is labelled or stands above. Pictures: first channel, mask and uncertainty of the network, as prepared for it. Which "
    "volume helps most is not known before it is labelled; look at them."
)


def suggested_section(record: RunRecord) -> dict[str, Any] | None:
    """What the template shows, or None without suggestions; those of older weights are left out with a note."""
    path = record.folder / RESULT
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["weights"] != model_hash(record.folder):
            record.notes.append(
                f"{RESULT} belongs to other weights than the run has now: ask 'scarceseg suggest' again"
            )
            return None
        ranking, count = list(values["ranking"]), int(values["count"])
        return {
            "words": WORDS,
            "notes": [str(note) for note in values["notes"]],
            "heads": ["case", "score", "uncertainty", "disagreement", "distance"],
            "first": [_row(one) for one in ranking[:count]],
            "why": [(str(one["case"]), str(one["why"])) for one in ranking[:count]],
            "rest": [_row(one) for one in ranking[count:]],
            "cases": _viewers(record, [str(one["case"]) for one in ranking[:count]]),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        record.notes.append(f"{RESULT} could not be read: ask 'scarceseg suggest' again")
        return None


def _row(one: dict[str, Any]) -> list[str]:
    other = one["disagreement"]
    return [
        str(one["case"]),
        f"{one['score']:.2f}",
        f"{one['uncertainty']:.3f}",
        "-" if other is None else f"{other:.3f}",
        f"{one['distance']:.3g}",
    ]


def _viewers(record: RunRecord, names: list[str]) -> list[Viewer]:
    cases: list[ShownCase] = []
    for name in names[:SHOWN]:
        try:
            cases.append(read_case(figure_path(record.folder, name)))
        except DataError as error:
            record.notes.append(f"{str(error).split(';')[0]}; ask 'scarceseg suggest' again")
    # The uncertainty is shown from the start: it is why these volumes are here.
    return within_budget([planes_viewer(case, "", uncertain=True) for case in cases], BUDGET)
