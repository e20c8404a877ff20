"""A suggestion in sentences and as a table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from scarceseg.active.suggestion import Suggestions

Floats = NDArray[np.float64]


def why(
    index: int,
    uncertainty: Floats,
    disagree: Floats,
    distance: Floats,
    nearest: str,
    teachers: Sequence[str],
    missing: Sequence[str],
    after: str | None,
) -> str:
    """One sentence a reason, in plain words.

    Args:
        index: of the volume in the arrays, which hold the pool: U, D (NaN for none) and the distance to the labelled ones.
        nearest: name of the labelled volume most like it.
        teachers: who the student was compared with on this volume.
        missing: structures that every labelled volume has and the student does not find here.
        after: the volume chosen before that it resembles more than any labelled one, if there is one.
    """
    size = len(uncertainty)
    parts = [
        f"The student's uncertainty is the {_place(uncertainty, index, 'highest', 'lowest')}."
        if size > 1
        else "It is the only unlabelled volume."
    ]
    if missing:
        parts.append(f"The student finds no {_list(missing, 'or')} in it, which every labelled volume has.")
    if not np.isnan(disagree[index]):
        overlap = f"Dice {100 * (1 - disagree[index]):.0f} %"
        place = f" is the {_place(disagree, index, 'lowest', 'highest')}" if size > 1 else f" is {overlap}"
        parts.append(f"Its agreement with {_list(teachers, 'and')}{f' ({overlap})' if size > 1 else ''}{place}.")
    place = (
        f"Its distance to the labelled ones is the {_place(distance, index, 'largest', 'smallest')}; "
        if size > 1
        else ""
    )
    parts.append(
        f"{place}{nearest} is the most alike." if place else f"Of the labelled volumes {nearest} is the most alike."
    )
    if after is not None:
        parts.append(f"It resembles {after}, suggested before it, more than any labelled one.")
    return " ".join(parts)


def _place(values: Floats, index: int, top: str, bottom: str) -> str:
    """Place of a volume counted from the nearer end, such as "2nd highest of 60"; equal values share one."""
    known = values[~np.isnan(values)]
    above, below = int((known > values[index]).sum()), int((known < values[index]).sum())
    same = len(known) - above - below - 1
    if same == len(known) - 1:
        return f"same in all {len(known)}"
    number, word = (above + 1, top) if above <= below else (below + 1, bottom)
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    place = f"{'' if number == 1 else f'{number}{ending} '}{word} of {len(known)}"
    return f"{place} (shared with {same} more)" if same else place


def _list(names: Sequence[str], joined: str) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {joined} {names[-1]}"


def print_suggestions(result: Suggestions, console: Console | None = None) -> None:
    """Show the suggested volumes with their numbers, why, and the notes."""
    console = console or Console()
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("label next")
    has_other = any(one.disagreement is not None for one in result.suggestions)
    heads = ["score", "uncertainty", *(["disagreement"] if has_other else []), "distance"]
    for head in heads:
        table.add_column(head, justify="right")
    for one in result.suggestions:
        cells = [f"{one.score:.2f}", f"{one.uncertainty:.3f}"]
        if has_other:
            cells.append("-" if one.disagreement is None else f"{one.disagreement:.3f}")
        table.add_row(escape(one.case), *cells, f"{one.distance:.3g}")
    console.print(table)
    for one in result.suggestions:
        console.print(f"{one.case}: {one.why}", markup=False, highlight=False)
    for note in result.notes:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False)
