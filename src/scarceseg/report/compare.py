"""A comparison of runs -> one page: means over seeds, tests, published rows, every case, and the same slices side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from scarceseg.data.images import read_image
from scarceseg.errors import DataError
from scarceseg.evaluation.comparison import OVERALL, Comparison, Group, pick
from scarceseg.evaluation.comparison_tables import (
    SHOWN,
    TESTED,
    difference_and_p,
    published_text,
    rows_for,
    spread_text,
    unit_of,
)
from scarceseg.evaluation.published import same_sum
from scarceseg.evaluation.result import mean_metrics
from scarceseg.evaluation.tables import OVERLAPS
from scarceseg.report.build import class_legend, write_page
from scarceseg.report.charts import Group as Boxes
from scarceseg.report.charts import box_plot
from scarceseg.report.folder import ShownCase, read_arrays, read_case, without_rank
from scarceseg.report.numbers import heading, show
from scarceseg.report.viewers import compare_viewer, within_budget

MOST_CASES, MOST_GROUPS = 4, 6

Masks = dict[str, Any]


def build_compare_report(comparison: Comparison, path: Path) -> Path:
    """Write a comparison as a page that needs no other file.

    Pictures are of cases that a run kept for its own page (``figures``), where the first run of another group has a mask of
    the same case, in its ``figures`` or in ``validation``.

    Args:
        comparison: what `evaluation.compare.compare` gave.
        path: of the page.

    Returns:
        `path`.

    Raises:
        RunError: the page cannot be written.
    """
    names = short_names(comparison)
    warnings = list(comparison.warnings)
    shown = _shown_cases(comparison, names, warnings)
    rows, sources = _rows(comparison, names)
    several = len(comparison.classes) > 1
    counts = {len(group.cases) for group in comparison.groups}
    cases = f"{counts.pop()} cases" if len(counts) == 1 else "different cases"
    tested = [group for group in comparison.groups if group.tests]
    page = {
        "title": f"Comparison on {comparison.dataset}",
        "sentence": f"{len(names)} {'group' if len(names) == 1 else 'groups'} of runs, measured on {cases}: "
        f"{', '.join(comparison.classes)}. Runs of a group differ in the seed alone.",
        "warnings": warnings,
        "heads": [heading(metric, comparison.units) for metric in SHOWN],
        "by_class": several,
        "rows": rows,
        "undefined": any(s.undefined for group in comparison.groups for s in group.metrics[OVERALL].values()),
        "sources": sources,
        "notes": comparison.notes,
        "tests": [_test_row(group, names) for group in tested],
        "test_heads": [
            head for m in TESTED for head in (heading(m, comparison.units), "p (Holm)" if len(tested) > 1 else "p")
        ],
        "untested": [f"{group.title}: {group.untested}" for group in comparison.groups if group.untested],
        "charts": [chart for metric in TESTED if (chart := _boxes(comparison, names, metric))],
        "several": several,
        "cases": within_budget(
            compare_viewer(case, masks, _notes(comparison, names, case.title)) for case, masks in shown
        ),
        "case_words": _case_words(comparison),
        "any_reference": any(case.reference is not None for case, _ in shown),
        "legend": class_legend(comparison.classes),
        "runs": [_run_row(group, number, names) for group in comparison.groups for number in range(len(group.runs))],
    }
    return write_page("compare.html", page, path)


def short_names(comparison: Comparison) -> dict[int, str]:
    """A name for each group by its identity: the method, and what else is needed to tell it from the others."""
    names: dict[int, str] = {}
    for group in comparison.groups:
        same = [other for other in comparison.groups if other.method == group.method]
        labels = [f"{group.labels} label{'' if group.labels == 1 else 's'}"] if len(_labels(same)) > 1 else []
        settings = group.differing if len(same) > len(_labels(same)) else []
        name = ", ".join([group.method, *labels, *settings])
        taken = sum(other == name or other.startswith(f"{name} #") for other in names.values())
        names[id(group)] = f"{name} #{taken + 1}" if taken else name  # measured on other cases
    return names


def _labels(groups: Sequence[Group]) -> set[int]:
    return {group.labels for group in groups}


def _rows(comparison: Comparison, names: Mapping[int, str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Lines of the table, published ones below the groups they belong to, and the sources they number."""
    rows: list[dict[str, Any]] = []
    sources: list[str] = []
    groups = comparison.groups
    for index, group in enumerate(groups):
        name = names[id(group)]
        lines = [
            ("all classes" if scope is OVERALL else scope, [spread_text(of[metric], metric) for metric in SHOWN])
            for scope in comparison.scopes
            for of in (group.metrics[scope],)
        ]
        rows.append(
            {
                "name": name,
                "settings": [] if ", ".join(group.differing) in name else group.differing,
                "labels": group.labels,
                "seeds": len(group.runs),
                "lines": lines,
                "published": False,
            }
        )
        last = index + 1 == len(groups) or groups[index + 1].labels != group.labels
        for row in rows_for(comparison, group, last):
            if row.source not in sources:
                sources.append(row.source)
            best = "" if same_sum(row.method, group.method) else "best "
            cells = [published_text(row, metric, comparison) for metric in SHOWN]
            name = f"{best}published, {row.method} [{sources.index(row.source) + 1}]"
            rows.append(
                {
                    "name": name,
                    "settings": [],
                    "labels": row.labeled,
                    "seeds": "-",
                    "lines": [("all classes", cells)],
                    "published": True,
                }
            )
    return rows, sources


def _test_row(group: Group, names: Mapping[int, str]) -> dict[str, Any]:
    tests = {metric: group.tests[OVERALL][metric] for metric in TESTED}
    return {
        "name": names[id(group)],
        "baseline": group.baseline or "",
        "pairs": "/".join(dict.fromkeys(str(test.cases) for test in tests.values())),
        "cells": [cell for metric, test in tests.items() for cell in difference_and_p(test, metric)],
    }


def _boxes(comparison: Comparison, names: Mapping[int, str], metric: str) -> Markup:
    scale = 100 if metric in OVERLAPS else 1
    groups = [
        Boxes(names[id(group)], {case: scale * v for case, v in group.by_case(OVERALL, metric).items()}, index)
        for index, group in enumerate(comparison.groups)
    ]
    limits = (0.0, 100.0) if unit_of(metric, comparison) == "%" else None
    return box_plot(heading(metric, comparison.units), groups, x_range=limits)


def _run_row(group: Group, number: int, names: Mapping[int, str]) -> dict[str, Any]:
    run = group.runs[number]
    dice = pick(mean_metrics(run.cases), OVERALL, "dice")
    cells = [group.labels, run.config.seed, run.config.iterations, len(run.cases), show(dice, "dice")]
    return {"folder": str(run.folder), "name": names[id(group)], "cells": cells}


def _shown_cases(
    comparison: Comparison, names: Mapping[int, str], warnings: list[str]
) -> list[tuple[ShownCase, Masks]]:
    """Kept cases that at least two groups have a mask of; with one group, that one has."""
    groups = comparison.groups[:MOST_GROUPS]
    kept = {id(group): _kept(group.runs[0].folder, warnings) for group in groups}
    found: dict[str, tuple[ShownCase, Masks]] = {}
    for paths in kept.values():
        for title, path in paths.items():
            if title in found or len(found) == MOST_CASES:
                continue
            try:
                case = replace(read_case(path), title=title)
            except DataError as error:
                warnings.append(str(error))
                continue
            masks = {names[id(group)]: _mask(group, kept[id(group)].get(title), case, warnings) for group in groups}
            there = {name: mask for name, mask in masks.items() if mask is not None}
            if len(there) >= min(2, len(groups)):
                found[title] = (case, there)
    return list(found.values())


def _kept(run: Path, warnings: list[str]) -> dict[str, Path]:
    """Files of ``figures`` by case; they are opened one at a time, as each holds a whole volume."""
    paths = {}
    for path in sorted((run / "figures").glob("*.npz")):
        try:
            paths[without_rank(str(read_arrays(path, ["title"])["title"]))] = path
        except DataError as error:
            warnings.append(str(error))
    return paths


def _mask(group: Group, own: Path | None, case: ShownCase, warnings: list[str]) -> Any:
    """The mask of a group's first run for a case, from what it kept for pictures or from its validation, or None."""
    file = group.runs[0].folder / "validation" / f"{case.title}.nii.gz"
    try:
        if own is not None:
            mask = read_case(own).prediction
        elif file.is_file():
            mask = read_image(file)[0]
        else:
            return None
    except DataError as error:
        warnings.append(str(error))
        return None
    return mask if mask.shape == case.image.shape else None


def _notes(comparison: Comparison, names: Mapping[int, str], case: str) -> dict[str, str]:
    notes = {}
    for group in comparison.groups:
        row = group.runs[0].cases.get(case)
        dice = pick(row, OVERALL, "dice") if row else math.nan
        if math.isfinite(dice):
            notes[names[id(group)]] = f"Dice {show(dice, 'dice')}\N{NO-BREAK SPACE}%"
    return notes


def _case_words(comparison: Comparison) -> str:
    first = "A group is shown by its first run. " if any(len(group.runs) > 1 for group in comparison.groups) else ""
    return (
        "Cases the runs kept for their own pages: best, median and worst of each, as far as the others have masks of them. "
        f"{first}White outline: reference. The slider moves all pictures of a case."
    )
