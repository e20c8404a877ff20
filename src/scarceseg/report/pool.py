"""What a run guessed for its unlabelled volumes, as sections of its page: mosaics, pseudo-labels, prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scarceseg.errors import DataError
from scarceseg.report.charts import Group, Line, box_plot, line_chart
from scarceseg.report.encode import jpeg_uri
from scarceseg.report.folder import RunRecord, case_of, read_arrays
from scarceseg.report.viewers import Viewer, mosaic_viewer, pool_viewer, within_budget
from scarceseg.types import IGNORE_LABEL

POOL_BUDGET = 2_500_000
MOST_MOSAICS, MOST_CASES, MOST_PICTURES = 2, 3, 8
PICTURE_WIDTH = 800
"""Pixels of a picture of prompts at most."""

NOT_LEARNT = ", not learnt"

ASKED = ("asked", "agreement", "quality", "gate")
"""What a prompting term logs beside its loss, each in [0, 1]."""

Section = dict[str, Any]


def mosaic_section(record: RunRecord) -> Section | None:
    """Unlabelled volumes the way a 2D foundation model saw them, or None without any."""
    viewers = []
    for path in sorted((record.folder / "figures" / "mosaic").glob("*.npz"))[:MOST_MOSAICS]:
        try:
            arrays = read_arrays(path)
            about, image, label = _about(arrays), arrays["image"], _shown(arrays["label"])
            if image.ndim != 2 or image.shape != label.shape or image.dtype != np.uint8:
                raise ValueError(f"expected two pictures of one size, got {image.shape} and {label.shape}")
            viewers.append(mosaic_viewer(str(arrays["title"]), _layout_words(about), image, label))
        except (DataError, KeyError, TypeError, ValueError) as error:
            record.notes.append(_unreadable(path, error))
    return {"viewers": viewers} if viewers else None


def _layout_words(about: Mapping[str, Any]) -> str:
    rows, columns = about["grid"]
    height, width = about["tile"]
    high, wide = about["canvas"]
    what = "the whole volume, resampled to" if about["whole"] else "one patch,"
    part = f", canvas {about['number']} of {about['canvases']}" if about["canvases"] > 1 else ""
    return (
        f"{about['model']}, for {about['term']}: {what} {about['slices']} slices along {about['axis']}, {rows} x {columns} "
        f"tiles of {width} x {height} pixels on a canvas of {wide} x {high}{part}"
    )


def pool_section(record: RunRecord) -> Section | None:
    """Pseudo-labels beside the student's masks and how sure the guesses are, or None when nothing was guessed."""
    tables = _tables(record)
    makers = []
    for path in sorted((record.folder / "figures" / "unlabelled").glob("*.npz"))[:MOST_CASES]:
        try:
            arrays = read_arrays(path)
            about, case = _about(arrays), case_of(arrays, path)
            guesses = {str(term): _shown(arrays[f"guess_{k}"]) for k, term in enumerate(about["terms"])}
            if any(guess.shape != case.image.shape for guess in guesses.values()):
                raise ValueError(f"expected guesses of the image's size {case.image.shape}")
            silent = about.get("silent", [])
            note = ", ".join(
                f"{term}: {_percent(value)} sure{NOT_LEARNT if term in silent else ''}"
                for term, value in about["confidence"].items()
            )
        except (DataError, KeyError, TypeError, ValueError) as error:
            record.notes.append(_unreadable(path, error))
            continue
        makers.append(pool_viewer(case, guesses, note))
    viewers: list[Viewer] = within_budget(makers, POOL_BUDGET)
    if not tables and not viewers:
        return None
    values = {name: {case: 100 * row for case, row in rows.items()} for name, (rows, _) in tables.items()}
    low = min((v for rows in values.values() for v in rows.values()), default=0.0)
    groups = [Group(name, rows, index) for index, (name, rows) in enumerate(values.items())]
    cases = sorted({case for rows in values.values() for case in rows})
    learnt = _learnt(record)
    return {
        "viewers": viewers,
        "chart": box_plot(
            "Confidence of the guesses [%]", groups, "each dot is a volume", (max(10 * ((low - 1) // 10), 0.0), 100.0)
        ),
        "about": [(name, words) for name, (_, words) in tables.items() if words],
        "heads": list(values),
        "rows": [
            [case, *(_percent(rows.get(case)) + _word(case, learnt.get(name)) for name, (rows, _) in tables.items())]
            for case in cases
        ],
    }


def _tables(record: RunRecord) -> dict[str, tuple[dict[str, float], str]]:
    """By stage: confidence over the foreground of each case, and what the table says of how the labels were made.

    A round of SFR+ has the student's confidence besides, by its own measure.
    """
    found = {}
    for path in sorted((record.folder / "stages").glob("*/confidence.json")):
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            cases = table.pop("cases").items()
            rows = {str(case): float(row["foreground_confidence"]) for case, row in cases}
            key = "student_confidence" if table.get("measure") == "volume" else "student_foreground_confidence"
            students = {str(case): float(row[key]) for case, row in cases if key in row}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            record.notes.append(_unreadable(path, error))
            continue
        plain = {key: value for key, value in table.items() if isinstance(value, str | int | float)}
        words = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in plain.items())
        found[path.parent.name] = (rows, words)
        if students:
            found[f"{path.parent.name}, student"] = (students, "")
    return found


def _learnt(record: RunRecord) -> dict[str, set[str]]:
    """By stage: the cases whose guesses are learnt, where not all are."""
    path = record.folder / "figures" / "unlabelled" / "learnt.json"
    if not path.exists():
        return {}
    try:
        return {str(stage): set(cases) for stage, cases in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        record.notes.append(_unreadable(path, error))
        return {}


def _word(case: str, learnt: set[str] | None) -> str:
    return NOT_LEARNT if learnt is not None and case not in learnt else ""


def prompt_section(record: RunRecord) -> Section | None:
    """Pictures that terms left during training and what they logged of their questions, or None without pictures."""
    paths = sorted((record.folder / "pictures").glob("*.png"), key=_iteration)
    if len(paths) > MOST_PICTURES:
        paths = [paths[round(k)] for k in np.linspace(0, len(paths) - 1, MOST_PICTURES)]
    pictures = []
    for path in paths:
        try:
            pictures.append({"uri": _embedded(path), "title": f"iteration {_iteration(path)}", "name": path.stem})
        except (OSError, ValueError) as error:
            record.notes.append(_unreadable(path, error))
    if not pictures:
        return None
    return {"pictures": pictures, "charts": _asked_charts(record)}


def _asked_charts(record: RunRecord) -> list[Any]:
    curves = record.curves.get("train", {})
    charts = []
    for term in dict.fromkeys(key.partition("/")[2] for key in curves if key.startswith("asked/")):
        lines = [
            Line(name, *curves[f"{name}/{term}"], colour, smooth=True)
            for colour, name in enumerate(ASKED)
            if f"{name}/{term}" in curves
        ]
        charts.append(line_chart(f"questions of {term}", lines, "shares and means, from 0 to 1", (0.0, 1.0)))
    return [chart for chart in charts if chart]


def _iteration(path: Path) -> int:
    number = path.stem.rpartition("-")[2]
    return int(number) if number.isdigit() else 0


def _embedded(path: Path) -> str:
    with Image.open(path) as image:
        shown = image.convert("RGB")
    if shown.width > PICTURE_WIDTH:
        shown = shown.resize((PICTURE_WIDTH, max(round(shown.height * PICTURE_WIDTH / shown.width), 1)))
    return jpeg_uri(shown, subsampling=0)


def _about(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    about = json.loads(str(arrays["about"]))
    if not isinstance(about, dict):
        raise ValueError(f"expected a JSON object, got {type(about).__name__}")
    return about


def _shown(label: NDArray[Any]) -> NDArray[np.uint8]:
    """Without the voxels that training ignores."""
    return np.where(label == IGNORE_LABEL, 0, label).astype(np.uint8)


def _unreadable(path: Path, error: Exception) -> str:
    words = (str(error).splitlines() or [type(error).__name__])[0]
    return words if isinstance(error, DataError) else f"{path} could not be read: {words}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
