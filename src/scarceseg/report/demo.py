"""Several runs on one dataset -> one page that shows them side by side."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from scarceseg.data.images import image_suffix, list_images, read_image
from scarceseg.errors import DataError, RunError
from scarceseg.evaluation.tables import class_average, read_evaluation
from scarceseg.report.build import class_legend, write_page
from scarceseg.report.charts import Group, Line, box_plot, line_chart
from scarceseg.report.folder import RunRecord, ShownCase, read_case, read_run, without_rank
from scarceseg.report.numbers import duration, heading, show
from scarceseg.report.viewers import compare_viewer, within_budget

MOST_CASES = 4

Predictions = dict[str, Any]


def build_demo_report(folder: Path, runs: dict[str, Path]) -> Path:
    """Write ``folder/report.html``: runs in one table, and their predictions of the same slices next to each other.

    Results are ``RUN/test.json`` (or else ``RUN/evaluation.json``), in the form `evaluate` writes. Pictures are of
    ``folder/data/imagesTs`` with the references in ``labelsTs`` and the predictions in ``folder/predictions/NAME``;
    where these are missing, of the cases all runs kept in ``RUN/figures``. Missing parts are left out.

    Args:
        folder: where the page goes; it must exist.
        runs: run folders by name, in the order of the table.

    Returns:
        Path of the page.

    Raises:
        RunError: no runs, or a folder is none (see `read_run`).
    """
    if not runs:
        raise RunError("nothing to compare: expected at least one run folder, got none")
    records = {name: read_run(path) for name, path in runs.items()}
    warnings: list[str] = []
    results = {name: result for name, record in records.items() if (result := _result(record, warnings)) is not None}
    channels = max((len(record.plan.get("channels", [])) for record in records.values()), default=1) or 1
    cases = _test_cases(folder, list(runs), channels, warnings) or _kept_cases(records, warnings)
    classes = next((record.classes for record in records.values() if record.classes), [])
    page = {
        "title": f"{len(runs)} methods on the same volumes" if len(runs) > 1 else "One method on synthetic volumes",
        "sentence": _sentence(records, classes),
        "heads": _heads(results),
        "rows": _rows(folder, records, results) if results else [],
        "charts": [chart for chart in (_box(results, "dice", 100.0), _box(results, "hd95")) if chart],
        "warnings": [*warnings, *_of_runs(records)],
        "cases": within_budget(
            compare_viewer(case, predictions, _notes(case.title, results)) for case, predictions in cases
        ),
        "legend": class_legend(classes),
        "curves": _curves(records),
    }
    return write_page("demo.html", page, folder / "report.html")


def _result(record: RunRecord, warnings: list[str]) -> dict[str, Any] | None:
    path = record.folder / "test.json"
    if not path.exists():
        return record.evaluation
    try:
        return read_evaluation(path)
    except DataError as error:
        warnings.append(str(error))
        return None


def _of_runs(records: Mapping[str, RunRecord]) -> list[str]:
    """What the runs warned of, each once, with the names of the runs."""
    by_text: dict[str, list[str]] = {}
    for name, record in records.items():
        for text in (*record.warnings, *record.notes):
            by_text.setdefault(text, []).append(name)
    return [f"{', '.join(names)}: {text}" for text, names in by_text.items()]


def _sentence(records: Mapping[str, RunRecord], classes: list[str]) -> str:
    split = next((record.split for record in records.values() if record.split), {})
    words = "Each network was trained"
    if split:
        words += f" on {len(split.get('labelled', []))} labelled"
        words += f" and up to {len(split['unlabelled'])} unlabelled" if split.get("unlabelled") else ""
        words += " volumes"
    return f"{words} and tested on volumes that none of them has seen{': ' + ', '.join(classes) if classes else ''}."


def _heads(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    result = next(iter(results.values()), None)
    if result is None:
        return []
    several = len(result["mean"]) > 1
    by_class = [f"Dice {name} [%]" for name in result["mean"]] if several else []
    return [heading("dice", result["units"]), *by_class, heading("hd95", result["units"]), "cases", "time"]


def _rows(
    folder: Path, records: Mapping[str, RunRecord], results: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    classes = list(next(iter(results.values()))["mean"])
    columns: dict[str, list[tuple[float, str]]] = {}
    for name, record in records.items():
        result = results.get(name)
        average = class_average(result) if result else {"dice": np.nan, "hd95": np.nan}
        cells = [(average["dice"], show(average["dice"], "dice"))]
        for label in classes if len(classes) > 1 else []:
            dice = (result or {}).get("mean", {}).get(label, {}).get("dice")
            cells.append((np.nan if dice is None else dice, show(dice, "dice")))
        cells.append((-average["hd95"], show(average["hd95"], "hd95")))
        cells.append((np.nan, str(len(result["cases"])) if result else "-"))
        cells.append((np.nan, duration(record.seconds) if record.stages else "-"))
        columns[name] = cells
    table = np.array([[value for value, _ in cells] for cells in columns.values()], dtype=float)
    filled = np.where(np.isnan(table), -np.inf, table)
    best = np.where(filled.max(axis=0) > filled.min(axis=0), filled.max(axis=0), np.inf)  # equal everywhere: no best
    rows = []
    for name, cells in columns.items():
        page = records[name].folder / "report.html"
        rows.append(
            {
                "name": name,
                "link": Path(os.path.relpath(page, folder)).as_posix() if page.exists() else "",
                "cells": [
                    {"text": text, "best": bool(value == best[index])} for index, (value, text) in enumerate(cells)
                ],
            }
        )
    return rows


def _box(results: Mapping[str, Mapping[str, Any]], metric: str, scale: float = 1.0) -> Markup:
    """One row a method; a case counts by its mean over classes."""
    groups = []
    for index, (name, result) in enumerate(results.items()):
        values = {}
        for case, classes in result["cases"].items():
            known = [v[metric] for v in classes.values() if v[metric] is not None]
            if known:
                values[case] = scale * float(np.mean(known))
        groups.append(Group(name, values, index))
    units = next((result["units"] for result in results.values()), "mm")
    return box_plot(heading(metric, units), groups, "by case", (0.0, 100.0) if metric == "dice" else None)


def _notes(case: str, results: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    notes = {}
    for name, result in results.items():
        known = [v["dice"] for v in result["cases"].get(case, {}).values() if v["dice"] is not None]
        if known:
            notes[name] = f"Dice {show(float(np.mean(known)), 'dice')}\N{NO-BREAK SPACE}%"
    return notes


def _test_cases(
    folder: Path, names: list[str], channels: int, warnings: list[str]
) -> list[tuple[ShownCase, Predictions]]:
    """The first test cases that every run has predicted, read from their files."""
    images, references = folder / "data" / "imagesTs", folder / "data" / "labelsTs"
    if not images.is_dir():
        return []
    predicted = {name: _by_case(folder / "predictions" / name) for name in names}
    known = _by_case(references)
    found: list[tuple[ShownCase, Predictions]] = []
    try:
        for case, paths in list_images([images], channels):
            if len(found) == MOST_CASES or not all(case in files for files in predicted.values()):
                continue
            image, grid = read_image(paths[0])
            predictions = {name: read_image(files[case])[0] for name, files in predicted.items()}
            reference = read_image(known[case])[0] if case in known else None
            first = next(iter(predictions.values()))
            shown = ShownCase(case, image, first, reference, None, grid.spacing_mm, grid.direction)
            found.append((_checked(shown, predictions), predictions))
    except DataError as error:
        warnings.append(f"no pictures of the test cases: {error}")
    return found


def _checked(case: ShownCase, predictions: Predictions) -> ShownCase:
    for name, mask in predictions.items():
        if mask.shape != case.image.shape:
            raise DataError(
                f"{case.title}: the prediction of {name} has {mask.shape} voxels, the image {case.image.shape}"
            )
    if case.reference is not None and case.reference.shape != case.image.shape:
        return replace(case, reference=None)
    return case


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if image_suffix(p) is not None) if folder.is_dir() else []


def _by_case(folder: Path) -> dict[str, Path]:
    return {path.name[: -len(image_suffix(path) or "")]: path for path in _files(folder)}


def _kept_cases(records: Mapping[str, RunRecord], warnings: list[str]) -> list[tuple[ShownCase, Predictions]]:
    """Cases that all runs kept for pictures, by title without the rank."""
    by_run: dict[str, dict[str, ShownCase]] = {}
    for name, record in records.items():
        by_run[name] = {}
        for path in record.figures:
            try:
                case = read_case(path)
            except DataError as error:
                warnings.append(str(error))
                continue
            by_run[name][without_rank(case.title)] = case
    first = next(iter(by_run.values()))
    common = [title for title in first if all(title in cases for cases in by_run.values())]
    return [
        (replace(first[title], title=title), {name: cases[title].prediction for name, cases in by_run.items()})
        for title in common[:MOST_CASES]
    ]


def _curves(records: Mapping[str, RunRecord]) -> list[Markup]:
    charts = []
    for key, title in (("loss/supervised", "supervised loss"), ("loss", "loss, weighted sum")):
        lines = []
        for index, (name, record) in enumerate(records.items()):
            x, y = record.curves.get("train", {}).get(key, ([], []))
            if x:
                lines.append(Line(name, x, y, index, smooth=True))
        if lines:
            charts.append(line_chart(title, lines))
    return [chart for chart in charts if chart]
