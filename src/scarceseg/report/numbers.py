"""Metrics, times and sizes as text for people, and the tables made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup

from scarceseg.evaluation.metrics import METRICS
from scarceseg.evaluation.published import beside, find_benchmark, row_metrics, same_sum, split_note, summands
from scarceseg.evaluation.tables import HEADERS, OVERLAPS, absent_classes, absent_words, class_average
from scarceseg.report.charts import Group, box_plot
from scarceseg.report.folder import RunRecord

PUBLISHED = ("dice", "jaccard", "asd", "hd95")
"""Metrics of the published tables, in the order of `row_metrics`."""


def metrics_section(record: RunRecord) -> dict[str, Any] | None:
    """Tables and box plots of the validation, or None without one."""
    result = record.evaluation
    if not result or not result["cases"]:
        return None
    units = result["units"]
    rows, undefined = [], False
    for name in result["mean"]:
        cells = [name]
        for metric in METRICS:
            values = [case[name][metric] for case in result["cases"].values() if name in case]
            known = [v for v in values if v is not None]
            missing = len(values) - len(known)
            undefined |= missing > 0
            spread = f" ± {show(float(np.std(known, ddof=1)), metric)}" if len(known) > 1 else ""
            cells.append(show(result["mean"][name][metric], metric) + spread + (f" ({missing})" if missing else ""))
        rows.append(cells)
    if len(result["mean"]) > 1:
        average = class_average(result)
        rows.append(["all classes", *(show(average[metric], metric) for metric in METRICS)])
    cases = [
        [case, name, *(show(values[metric], metric) for metric in METRICS)]
        for case, classes in result["cases"].items()
        for name, values in classes.items()
    ]
    failed = [f"{f['case']}{', ' + f['class'] if f['class'] else ''}: {f['reason']}" for f in result["failed"]]
    return {
        "count": len(result["cases"]),
        "heads": [heading(metric, units) for metric in METRICS],
        "rows": rows,
        "cases": cases,
        "undefined": undefined,
        "failed": failed,
        "absent": [f"{name}: {absent_words(n, len(result['cases']))}" for name, n in absent_classes(result).items()],
        "charts": [chart for chart in (_box(result, "dice"), _box(result, "hd95")) if chart],
    }


def published_section(record: RunRecord) -> dict[str, Any] | None:
    """Published rows with this number of labels below the run's own, or None where no table is about the dataset."""
    result, config = record.evaluation, record.config
    benchmark = find_benchmark(str(record.plan.get("dataset", "")), len(record.classes))
    if not result or not result["cases"] or config is None or benchmark is None:
        return None
    labels, pool = len(record.split.get("labelled", [])), len(record.split.get("unlabelled", []))
    known = beside(benchmark, [config.method], labels)
    if not known:
        return None
    average = class_average(result)
    method = "+".join(summands(config.method))
    own = [method, f"{labels} + {pool}", *(_with_unit(average[m], m, result["units"]) for m in PUBLISHED), "this run"]
    rows = []
    for row in known:
        cells = [_with_unit(value, metric, unit) for metric, (value, unit) in row_metrics(row).items()]
        source = f"{row.source}; {row.note}" if row.note else row.source
        name = row.method if same_sum(row.method, config.method) else f"best: {row.method}"
        rows.append([name, f"{row.labeled} + {row.unlabeled}", *cells, source])
    notes = [split_note(benchmark, labels + pool, list(result["cases"]))]
    spacing = record.plan.get("spacing_mm")
    if spacing:
        size = " x ".join(f"{side:g}" for side in spacing)
        notes.append(f"this run worked on voxels of {size} mm; the published rows have the voxels of their papers")
    return {
        "benchmark": benchmark.name,
        "heads": [HEADERS[metric] for metric in PUBLISHED],
        "own": own,
        "rows": rows,
        "notes": [note[0].upper() + note[1:] for note in notes],
    }


def _with_unit(value: float | None, metric: str, units: str) -> str:
    text = show(value, metric)
    return text if text == "-" else f"{text} {'%' if metric in OVERLAPS else units}"


def _box(result: Mapping[str, Any], metric: str) -> Markup:
    scale = 100 if metric in OVERLAPS else 1
    groups = [
        Group(
            name,
            {
                case: classes[name][metric] * scale
                for case, classes in result["cases"].items()
                if classes.get(name, {}).get(metric) is not None
            },
            index,
        )
        for index, name in enumerate(result["mean"])
    ]
    return box_plot(heading(metric, result["units"]), groups, x_range=(0.0, 100.0) if metric in OVERLAPS else None)


def heading(metric: str, units: str) -> str:
    """Column head of a metric, with its unit."""
    return f"{HEADERS[metric]} [{'%' if metric in OVERLAPS else units}]"


def show(value: float | None, metric: str) -> str:
    """A value for people: overlaps in percent, a dash when it is undefined."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{100 * value:.1f}" if metric in OVERLAPS else f"{value:.2f}"


def stage_rows(record: RunRecord) -> list[dict[str, Any]]:
    """Time and memory by stage."""
    longest = max((float(s.get("seconds") or 0) for s in record.stages.values()), default=0.0)
    rows = []
    for name, stage in record.stages.items():
        seconds, memory = float(stage.get("seconds") or 0), stage.get("peak_memory_mb")
        size = "-" if not memory else f"{memory / 1024:.1f} GiB" if memory >= 1024 else f"{memory:.0f} MiB"
        share = round(100 * seconds / longest) if longest else 0
        rows.append({"name": name, "time": duration(seconds), "share": share, "memory": size})
    return rows


def duration(seconds: float) -> str:
    """Time for people."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
