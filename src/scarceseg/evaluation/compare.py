"""Finished runs side by side: mean and spread over seeds, a paired test against a baseline, the published rows."""

from __future__ import annotations

import json as jsonlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np

from scarceseg.errors import ConfigError, DataError, RunError
from scarceseg.evaluation.comparison import OVERALL, Comparison, Group, Scope, Spread, matched, pick
from scarceseg.evaluation.comparison_tables import to_csv
from scarceseg.evaluation.metrics import METRICS
from scarceseg.evaluation.paired import MIN_CASES, corrected, paired_test
from scarceseg.evaluation.published import beside, find_benchmark, same_sum, split_note
from scarceseg.evaluation.result import Units, mean_metrics
from scarceseg.evaluation.runs import EVALUATION, MeasuredRun, in_units, read_run
from scarceseg.files import write_text


def compare(
    runs: Sequence[Path | str],
    *,
    baseline: Path | str | None = None,
    json: Path | str | None = None,
    csv: Path | str | None = None,
    html: Path | str | None = None,
    units: Units | None = None,
    scores: str = EVALUATION,
) -> Comparison:
    """Compare finished runs on one dataset.

    Runs whose settings differ in the seed alone form a group. A value of a run is that `evaluate` prints, the mean over
    its cases; mean and standard deviation of a group are over its runs. A test pairs the cases of a group with those of
    its baseline: a case's value is averaged over the seeds first, so that cases and not runs are counted.

    Args:
        runs: run folders; runs that have not come to their end are left out with a warning.
        baseline: run folder, or method; a method stands for its group with the same number of labels.
        json, csv: files to write all numbers to.
        html: page to write: tables, box plots, and masks of the same cases side by side.
        units: of distances; None takes those the runs were measured in.
        scores: file in each run folder with a result of `evaluate`, for cases other than the validation cases.

    Raises:
        RunError: a folder is no run, has no metrics, or no run is left.
        DataError: runs on different datasets, or a damaged file.
        ConfigError: unknown units or baseline, or distances that cannot be given in these units.
    """
    if units is not None and units not in get_args(Units):
        raise ConfigError(f"units: expected {' or '.join(get_args(Units))}, got {units!r}")
    folders = [Path(run) for run in runs]
    baseline = None if baseline is None else str(baseline)
    measured, warnings = _read(folders, scores)
    if baseline is not None and not any(same_sum(run.method, baseline) for run in measured) and _is_run(baseline):
        measured, warnings = _read([*folders, Path(baseline)], scores)
    chosen = _one_unit(measured, units)
    groups = _group(measured, chosen)
    comparison = Comparison(measured[0].dataset, measured[0].classes, chosen, groups, warnings=warnings)
    if baseline is not None:
        _test(comparison, baseline)
    _add_published(comparison)
    _add_warnings(comparison)
    if json is not None:
        write_text(Path(json), jsonlib.dumps(comparison.to_json(), indent=1, allow_nan=False) + "\n")
    if csv is not None:
        write_text(Path(csv), to_csv(comparison))
    if html is not None:
        from scarceseg.report.compare import build_compare_report

        build_compare_report(comparison, Path(html))
    return comparison


def _is_run(baseline: str) -> bool:
    return (Path(baseline) / "config.yaml").is_file()


def _read(folders: Sequence[Path], scores: str) -> tuple[list[MeasuredRun], list[str]]:
    measured, left_out = [], []
    for folder in {folder.resolve(): folder for folder in folders}.values():
        run = read_run(folder, scores)
        if isinstance(run, str):
            left_out.append(run)
        else:
            measured.append(run)
    if not measured:
        raise RunError(f"there is nothing to compare: {'; '.join(left_out) or 'no run folder was given'}")
    first = measured[0]
    for run in measured[1:]:
        if (run.dataset, run.classes) != (first.dataset, first.classes):
            raise DataError(
                f"expected runs on one dataset, got {first.dataset!r} ({', '.join(first.classes)}) in {first.folder} and "
                f"{run.dataset!r} ({', '.join(run.classes)}) in {run.folder}; compare them separately"
            )
    return measured, left_out


def _one_unit(runs: Sequence[MeasuredRun], units: Units | None) -> Units:
    known = {run.units for run in runs}
    if units is None and len(known) > 1:
        raise ConfigError("the runs were measured in different units of distance: choose one, --units mm or voxel")
    return units or runs[0].units


def _group(runs: Sequence[MeasuredRun], units: Units) -> list[Group]:
    found: dict[str, list[MeasuredRun]] = {}
    for run in runs:
        cases = in_units(run, units)
        missing = [case for case, classes in cases.items() if set(classes) != set(run.classes)]
        if missing:
            raise DataError(
                f"{run.folder}: case {missing[0]!r} has the classes {', '.join(cases[missing[0]])}, expected those of the "
                f"run, {', '.join(run.classes)}; evaluate it again beside the dataset.json of the references"
            )
        key = jsonlib.dumps([sorted(run.method.split("+")), run.settings, sorted(cases)], sort_keys=True)
        found.setdefault(key, []).append(replace(run, cases=cases, units=units))
    differing = _differing([members[0] for members in found.values()])
    groups = [
        Group(
            members[0].method,
            len(members[0].labelled),
            {key: value for key in differing if (value := members[0].settings.get(key)) is not None},
            members,
            _metrics(members),
        )
        for members in found.values()
    ]
    return sorted(groups, key=lambda group: group.labels)


def _differing(runs: Sequence[MeasuredRun]) -> list[str]:
    """Settings that tell the groups apart, beside the method and the number of labels."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    return [key for key in keys if _differs(key, runs)]


def _differs(key: str, runs: Sequence[MeasuredRun]) -> bool:
    values = {(len(run.labelled), jsonlib.dumps(run.settings.get(key))) for run in runs}
    if key == "labelled cases":  # of different numbers, they differ anyway
        return len(values) > len({labels for labels, _ in values})
    found = {value for _, value in values}
    if key == "foundation" or key.startswith("terms."):  # not every method has one
        found.discard("null")
    return len(found) > 1


def _metrics(runs: Sequence[MeasuredRun]) -> dict[Scope, dict[str, Spread]]:
    means = [mean_metrics(run.cases) for run in runs]
    scopes: list[Scope] = [*runs[0].classes, OVERALL]
    found: dict[Scope, dict[str, Spread]] = {}
    for scope in scopes:
        found[scope] = {}
        names = runs[0].classes if scope is OVERALL else (scope,)
        for metric in METRICS:
            values = [value for mean in means if math.isfinite(value := pick(mean, scope, metric))]
            undefined = sum(
                math.isnan(classes[name][metric]) for run in runs for classes in run.cases.values() for name in names
            )
            mean = math.fsum(values) / len(values) if values else math.nan
            std = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
            found[scope][metric] = Spread(mean, std, undefined)
    return found


def _test(comparison: Comparison, baseline: str) -> None:
    groups = comparison.groups
    by_method = any(same_sum(group.method, baseline) for group in groups)
    chosen = None if by_method else _baseline_run(comparison, baseline)
    pairs: list[tuple[Group, Group]] = []
    for group in groups:
        reference = chosen or _baseline_method(groups, group, baseline)
        if isinstance(reference, str):
            group.untested = reference
        elif reference is not group:
            group.baseline = reference.title
            group.untested = _obstacle(group, reference)
            pairs += [(group, reference)] if not group.untested else []
    for scope in comparison.scopes:
        for metric in METRICS:
            tests = [paired_test(*matched(a, b, scope, metric)) for a, b in pairs]
            for (group, _), test in zip(pairs, corrected(tests), strict=True):
                group.tests.setdefault(scope, {})[metric] = test
    if len(pairs) > 1:
        comparison.notes.append(
            f"p after Holm's correction for {len(pairs)} comparisons, each metric and class by itself"
        )


def _baseline_run(comparison: Comparison, baseline: str) -> Group:
    folder = Path(baseline).resolve()
    for group in comparison.groups:
        if any(run.folder.resolve() == folder for run in group.runs):
            return group
    if _is_run(baseline):
        about = [note for note in comparison.warnings if str(Path(baseline)) in note] or comparison.warnings
        raise RunError(f"--baseline: {'; '.join(about)}")
    raise ConfigError(
        f"--baseline {baseline!r}: expected a run folder, or a method of the runs compared, which are "
        f"{', '.join(dict.fromkeys(group.method for group in comparison.groups))}"
    )


def _baseline_method(groups: Sequence[Group], group: Group, baseline: str) -> Group | str:
    """The group of the baseline method that differs least from this one, or why there is none."""
    if same_sum(group.method, baseline):
        return group
    found = [other for other in groups if same_sum(other.method, baseline) and other.labels == group.labels]
    if not found:
        return f"no run of {baseline} has the same number of labels"
    distance = [
        sum(other.settings.get(key, value) != value for key, value in group.settings.items()) for other in found
    ]
    nearest = [other for other, steps in zip(found, distance, strict=True) if steps == min(distance)]
    if len(nearest) > 1:
        return f"there are {len(nearest)} groups of {baseline} to choose from: name a run folder as --baseline"
    return nearest[0]


def _obstacle(group: Group, baseline: Group) -> str:
    if group.cases != baseline.cases:
        common = len(set(group.cases) & set(baseline.cases))
        return f"measured on other cases than the baseline ({len(group.cases)} and {len(baseline.cases)}, {common} in common)"
    if len(group.cases) < MIN_CASES:
        return f"{len(group.cases)} cases are too few, the test needs {MIN_CASES}"
    return ""


def _add_published(comparison: Comparison) -> None:
    comparison.benchmark = find_benchmark(comparison.dataset, len(comparison.classes))
    if comparison.benchmark is None:
        return
    for labels in dict.fromkeys(group.labels for group in comparison.groups):
        methods = [group.method for group in comparison.groups if group.labels == labels]
        comparison.published += beside(comparison.benchmark, methods, labels)
    if comparison.published:
        kinds = dict.fromkeys((group.runs[0].training, tuple(group.cases)) for group in comparison.groups)
        comparison.notes += [split_note(comparison.benchmark, training, cases) for training, cases in kinds]
        if comparison.units == "mm" and any(row.hd95_voxel is not None for row in comparison.published):
            comparison.notes.append("published distances are in voxels and not shown beside mm: see --units voxel")


def _add_warnings(comparison: Comparison) -> None:
    for group in comparison.groups:
        seeds: dict[int, list[str]] = {run.config.seed: [] for run in group.runs}
        for run in group.runs:
            seeds[run.config.seed].append(str(run.folder))
        comparison.warnings += [
            f"{' and '.join(folders)} have the same settings and seed {seed}: their deviation is not one over seeds"
            for seed, folders in seeds.items()
            if len(folders) > 1
        ]
    if len({tuple(group.cases) for group in comparison.groups}) > 1:
        comparison.warnings.append("the groups were measured on different cases: their means are not comparable")
