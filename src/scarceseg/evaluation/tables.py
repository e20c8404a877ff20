"""Results as tables: on screen, in CSV, in Markdown, and beside the published figures."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from scarceseg.errors import ConfigError, DataError, near_matches
from scarceseg.evaluation.metrics import METRICS
from scarceseg.evaluation.result import EvaluationResult

HEADERS = {"dice": "Dice", "jaccard": "Jaccard", "asd": "ASD", "assd": "ASSD", "hd95": "HD95"}
OVERLAPS = frozenset({"dice", "jaccard"})
ROWS_ON_SCREEN = 40

Json = Mapping[str, Any]
"""A result in the form `EvaluationResult.to_json` gives."""


def print_evaluation(result: EvaluationResult | Json, console: Console | None = None) -> None:
    """Show the metrics: one row a case and class if they fit a screen, then the means and what they do not count.

    Overlaps are shown in percent, distances in the result's units. Behind a mean stands the number of cases in which
    the value is undefined.
    """
    values = _json(result)
    console = console or Console()
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("case")
    table.add_column("class")
    for metric in METRICS:
        table.add_column(escape(f"{HEADERS[metric]} [{_unit(metric, values['units'])}]"), justify="right")
    rows = [(case, name, v) for case, classes in values["cases"].items() for name, v in classes.items()]
    if len(rows) <= ROWS_ON_SCREEN:
        for case, name, row in rows:
            table.add_row(escape(case), escape(name), *(_shown(row[metric], metric) for metric in METRICS))
    for name, mean in values["mean"].items():
        cells = [_shown(mean[metric], metric) + _undefined(values, name, metric) for metric in METRICS]
        table.add_row("mean", escape(name), *cells, style="bold")
    if len(values["mean"]) > 1:
        overall = class_average(values)
        table.add_row("mean", "all classes", *(_shown(overall[metric], metric) for metric in METRICS), style="bold")
    console.print(table)
    if len(rows) > ROWS_ON_SCREEN:
        console.print(f"{len(values['cases'])} cases; their own values are in the JSON and CSV files")
    for name, count in absent_classes(values).items():
        console.print(f"{name}: {absent_words(count, len(values['cases']))}", markup=False, highlight=False)
    _print_failures(values, console)
    if isinstance(result, EvaluationResult):
        for warning in result.warnings:
            console.print(f"warning: {warning}", style="yellow", markup=False)


def absent_classes(values: Json) -> dict[str, int]:
    """Classes that are in neither mask of some cases, and of how many; none in results that are older than this count."""
    return {name: count for name, count in values.get("absent", {}).items() if count}


def absent_words(count: int, cases: int) -> str:
    """What such cases do to a mean."""
    return (
        f"absent in {count} of {cases} cases, in the reference and the prediction; they count as Dice 1 and distance 0"
    )


def _print_failures(values: Json, console: Console) -> None:
    if values["failed"]:
        console.print(f"{len(values['failed'])} failed:", style="yellow")
    for failure in values["failed"][:ROWS_ON_SCREEN]:
        where = failure["case"] if failure["class"] is None else f"{failure['case']} {failure['class']}"
        console.print(f"  {where}: {failure['reason']}", style="yellow", markup=False)
    if (more := len(values["failed"]) - ROWS_ON_SCREEN) > 0:
        console.print(f"  and {more} more", style="yellow")


def class_average(result: EvaluationResult | Json) -> dict[str, float]:
    """Mean of the class means of each metric, over the classes in which it is defined; NaN when there is none."""
    means = _json(result)["mean"].values()
    average = {}
    for metric in METRICS:
        defined = [mean[metric] for mean in means if mean[metric] is not None]
        average[metric] = math.fsum(defined) / len(defined) if defined else math.nan
    return average


def to_csv(result: EvaluationResult | Json) -> str:
    """One row a case and class: ``case,class,dice,jaccard,asd,assd,hd95``; undefined values are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("case", "class", *METRICS))
    for case, classes in _json(result)["cases"].items():
        for name, values in classes.items():
            writer.writerow(
                (case, name, *("" if values[metric] is None else repr(values[metric]) for metric in METRICS))
            )
    return text.getvalue()


def read_evaluation(path: Path) -> dict[str, Any]:
    """Read a saved result, or the ``evaluation`` part of a larger JSON file.

    Raises:
        DataError: the file cannot be read or is no result.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values = values.get("evaluation", values)
        for mean in [*values["mean"].values(), *(v for classes in values["cases"].values() for v in classes.values())]:
            _ = [mean[metric] for metric in METRICS]
        _ = values["units"], [(f["case"], f["class"], f["reason"]) for f in values["failed"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(
            f"{path}: expected a result of 'scarceseg evaluate --json' with units, cases, mean and failed; "
            "check the path"
        ) from None
    return values


def markdown_table(rows: Sequence[Mapping[str, object]], columns: Sequence[str] | None = None) -> str:
    """Rows as a Markdown table; columns of numbers alone are set to the right, None is a dash.

    Args:
        rows: values by column.
        columns: which, in order; None takes those of the first row.
    """
    columns = list(columns if columns is not None else rows[0] if rows else ())
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    rules = ["---:" if all(_is_number(line[i]) for line in cells) else "---" for i in range(len(columns))]
    lines = [columns, rules, *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def markdown_results(results: Mapping[str, EvaluationResult | Json], title: str = "method") -> str:
    """One row a result, its class averages: overlaps in percent, distances in the results' units, number of failures.

    Raises:
        DataError: the results have different units.
    """
    units = {_json(result)["units"] for result in results.values()}
    if len(units) > 1:
        raise DataError(
            "expected results in one unit of distance, got mm and voxel; evaluate them again with one --units"
        )
    rows = []
    for name, result in results.items():
        average = class_average(result)
        row: dict[str, object] = {title: name, "cases": len(_json(result)["cases"])}
        for metric in METRICS:
            row[f"{HEADERS[metric]} [{_unit(metric, *units)}]"] = _shown(average[metric], metric)
        rows.append(row | {"failed": len(_json(result)["failed"])})
    return markdown_table(rows)


@dataclass(frozen=True)
class PublishedRow:
    """One row of a published table: test results in percent and in voxels, None where it prints none.

    Attributes:
        labeled, unlabeled: numbers of training volumes.
        source: which table of which paper.
        note: what to know before comparing.
    """

    dataset: str
    method: str
    labeled: int
    unlabeled: int
    dice: float | None
    jaccard: float | None
    asd_voxel: float | None
    hd95_voxel: float | None
    source: str
    note: str = ""


@cache
def _published() -> tuple[PublishedRow, ...]:
    text = (resources.files("scarceseg.evaluation") / "published.json").read_text(encoding="utf-8")
    return tuple(PublishedRow(**row) for row in json.loads(text)["rows"])


def published_rows(
    dataset: str | None = None, labeled: int | None = None, method: str | None = None
) -> list[PublishedRow]:
    """Rows of the published tables, in their order; None does not filter.

    Raises:
        ConfigError: a dataset that no table is about.
    """
    rows = _published()
    known = sorted({row.dataset for row in rows})
    if dataset is not None and dataset not in known:
        raise ConfigError(f"no published figures for the dataset {dataset!r}: {near_matches(dataset, known)}")
    wanted = {"dataset": dataset, "labeled": labeled, "method": method}
    return [row for row in rows if all(value is None or getattr(row, key) == value for key, value in wanted.items())]


def markdown_published(rows: Iterable[PublishedRow]) -> str:
    """Published rows as a Markdown table, each with its source."""
    return markdown_table(
        [
            {
                "dataset": row.dataset,
                "labels": row.labeled,
                "method": row.method,
                "Dice [%]": row.dice,
                "Jaccard [%]": row.jaccard,
                "ASD [voxel]": row.asd_voxel,
                "HD95 [voxel]": row.hd95_voxel,
                "source": f"{row.source}; {row.note}" if row.note else row.source,
            }
            for row in rows
        ]
    )


def _json(result: EvaluationResult | Json) -> Json:
    return result.to_json() if isinstance(result, EvaluationResult) else result


def _unit(metric: str, units: str = "mm") -> str:
    return "%" if metric in OVERLAPS else units


def _shown(value: float | None, metric: str) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{100 * value:.2f}" if metric in OVERLAPS else f"{value:.2f}"


def _undefined(values: Json, name: str, metric: str) -> str:
    missing = sum(classes[name][metric] is None for classes in values["cases"].values())
    return f" ({missing} undefined)" if missing else ""


def _cell(value: object) -> str:
    return "-" if value is None else str(value).replace("|", "\\|")


def _is_number(cell: str) -> bool:
    return cell == "-" or cell.replace(".", "", 1).removeprefix("-").isdigit()
