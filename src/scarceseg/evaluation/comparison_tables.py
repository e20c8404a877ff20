"""A comparison of runs on screen and as CSV."""

from __future__ import annotations

import csv
import io
import math

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from scarceseg.evaluation.comparison import OVERALL, Comparison, Group, Spread
from scarceseg.evaluation.metrics import METRICS
from scarceseg.evaluation.paired import PairedTest
from scarceseg.evaluation.published import row_metrics, same_sum
from scarceseg.evaluation.tables import HEADERS, OVERLAPS, ROWS_ON_SCREEN, PublishedRow

SHOWN = ("dice", "jaccard", "hd95", "asd")
TESTED = ("dice", "hd95")
"""Metrics of the two tables on screen; all are in the files."""

COLUMNS = ("kind", "method", "labels", "settings", "runs", "cases", "class", "metric", "unit", "mean", "std")
TEST_COLUMNS = ("undefined", "baseline", "pairs", "difference", "p", "p_holm", "source")


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Show mean and standard deviation over seeds, with published rows below, then the tests against the baseline."""
    console = console or Console()
    counts = {len(group.cases) for group in comparison.groups}
    cases = f"{counts.pop()} cases, " if len(counts) == 1 else ""
    _say(console, f"{comparison.dataset}: {cases}mean ± standard deviation over seeds")
    sources: list[str] = []
    console.print(_means(comparison, sources))
    for number, source in enumerate(sources, 1):
        _say(console, f"[{number}] {source}")
    if any(spread.undefined for group in comparison.groups for spread in group.metrics[OVERALL].values()):
        _say(console, "(n): undefined in n cases, counted in no mean; an empty mask has no distance")
    if any(group.baseline or group.untested for group in comparison.groups):
        _print_tests(comparison, console)
    for note in comparison.notes:
        _say(console, note)
    for warning in comparison.warnings:
        _say(console, f"warning: {warning}", "yellow")


def _say(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _means(comparison: Comparison, sources: list[str]) -> Table:
    several = len(comparison.scopes) > 1
    by_class = several and len(comparison.scopes) * len(comparison.groups) <= ROWS_ON_SCREEN
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("method")
    table.add_column("labels", justify="right")
    table.add_column("seeds", justify="right")
    if by_class:
        table.add_column("class")
    for metric in SHOWN:
        table.add_column(escape(f"{HEADERS[metric]} [{unit_of(metric, comparison)}]"), justify="right")
    for index, group in enumerate(comparison.groups):
        for scope in comparison.scopes if by_class else [OVERALL]:
            name = ["all classes" if scope is OVERALL else escape(scope)] if by_class else []
            first = scope == comparison.scopes[0] or not by_class
            lead = (
                [escape(" ".join([group.method, *group.differing])), str(group.labels), str(len(group.runs))]
                if first
                else ["", "", ""]
            )
            cells = [spread_text(group.metrics[scope][metric], metric) for metric in SHOWN]
            table.add_row(*lead, *name, *cells, style="bold" if scope is OVERALL else None)
        last = index + 1 == len(comparison.groups) or comparison.groups[index + 1].labels != group.labels
        for row in rows_for(comparison, group, last):
            if row.source not in sources:
                sources.append(row.source)
            name = ["all classes"] if by_class else []
            best = "" if same_sum(row.method, group.method) else "best "
            what = f"{best}published, {row.method} [{sources.index(row.source) + 1}]"
            cells = [published_text(row, metric, comparison) for metric in SHOWN]
            table.add_row(escape(what), str(row.labeled), "-", *name, *cells, style="dim")
    return table


def rows_for(comparison: Comparison, group: Group, last: bool) -> list[PublishedRow]:
    """Published rows that stand below a group: those of its method; the others below the last group of that number."""
    rows = [row for row in comparison.published if row.labeled == group.labels]
    same = [other for other in comparison.groups if other.labels == group.labels]
    own = [row for row in rows if same_sum(row.method, group.method)]
    if next(other for other in reversed(same) if same_sum(other.method, group.method)) is not group:
        own = []
    rest = [row for row in rows if not any(same_sum(row.method, other.method) for other in same)]
    return own + (rest if last else [])


def _print_tests(comparison: Comparison, console: Console) -> None:
    _say(console, "\nminus the baseline, paired by case (Wilcoxon signed-rank, two-sided)")
    corrected = sum(bool(group.tests) for group in comparison.groups) > 1
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("method", "labels", "baseline"):
        table.add_column(heading)
    table.add_column("pairs", justify="right")
    for metric in TESTED:
        table.add_column(escape(f"{HEADERS[metric]} [{unit_of(metric, comparison)}]"), justify="right")
        table.add_column("p (Holm)" if corrected else "p", justify="right")
    for group in comparison.groups:
        if not group.tests:
            continue
        tests = [group.tests[OVERALL][metric] for metric in TESTED]
        cells = [cell for metric, test in zip(TESTED, tests, strict=True) for cell in difference_and_p(test, metric)]
        pairs = "/".join(dict.fromkeys(str(test.cases) for test in tests))
        table.add_row(
            escape(" ".join([group.method, *group.differing])),
            str(group.labels),
            escape(group.baseline or ""),
            pairs,
            *cells,
        )
    if table.row_count:
        console.print(table)
    for group in comparison.groups:
        if group.untested:
            _say(console, f"not tested: {group.title}: {group.untested}")


def difference_and_p(test: PairedTest, metric: str) -> tuple[str, str]:
    """Difference and p for people."""
    scale = 100 if metric in OVERLAPS else 1
    difference = "-" if math.isnan(test.difference) else f"{scale * test.difference:+.2f}"
    p = test.p_holm
    return difference, "too few" if p is None else "<0.0001" if p < 1e-4 else f"{p:.4f}"


def to_csv(comparison: Comparison) -> str:
    """One row a group, class and metric, then the published rows; overlaps in [0, 1], undefined values empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*COLUMNS, *TEST_COLUMNS))
    whole = "all" if len(comparison.classes) > 1 else comparison.classes[0]
    for group in comparison.groups:
        settings = "; ".join(f"{key}={value}" for key, value in group.settings.items())
        head = ("runs", group.method, group.labels, settings, len(group.runs), len(group.cases))
        for scope in comparison.scopes:
            for metric in METRICS:
                spread, test = group.metrics[scope][metric], group.tests.get(scope, {}).get(metric)
                unit = "" if metric in OVERLAPS else comparison.units
                name = whole if scope is OVERALL else scope
                values = (name, metric, unit, spread.mean, spread.std, spread.undefined)
                tested = (group.baseline, test.cases, test.difference, test.p, test.p_holm) if test else ("",) * 5
                writer.writerow([_plain(value) for value in (*head, *values, *tested, "")])
    for row in comparison.published:
        for metric, (value, measured_in) in row_metrics(row).items():
            known = ("published", row.method, row.labeled, "", "", "")
            writer.writerow([_plain(v) for v in (*known, whole, metric, measured_in, value, *("",) * 7, row.source)])
    return text.getvalue()


def unit_of(metric: str, comparison: Comparison) -> str:
    """Unit that values of a metric are shown in."""
    return "%" if metric in OVERLAPS else comparison.units


def spread_text(spread: Spread, metric: str) -> str:
    """Mean and deviation over seeds; in brackets how many values are undefined."""
    if math.isnan(spread.mean):
        return "-"
    scale = 100 if metric in OVERLAPS else 1
    deviation = "" if math.isnan(spread.std) else f" ± {scale * spread.std:.2f}"
    return f"{scale * spread.mean:.2f}{deviation}" + (f" ({spread.undefined})" if spread.undefined else "")


def published_text(row: PublishedRow, metric: str, comparison: Comparison) -> str:
    """Published value for people; a dash where there is none in the units of the comparison."""
    value, unit = row_metrics(row)[metric]
    if value is None or unit not in ("", comparison.units):
        return "-"
    return f"{100 * value:.2f}" if metric in OVERLAPS else f"{value:.2f}"


def _plain(value: object) -> object:
    """A value for CSV: NaN and None are empty."""
    if isinstance(value, float):
        return "" if math.isnan(value) else repr(value)
    return "" if value is None else value
