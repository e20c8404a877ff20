"""A run folder -> the unlabelled volumes in the order in which labelling them promises most."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from scarceseg.active.features import standardised
from scarceseg.active.measure import Measured, Measurer, Progress
from scarceseg.active.scores import greedy, informativeness, volume_uncertainty
from scarceseg.active.suggestion import Suggestion, Suggestions
from scarceseg.active.words import why
from scarceseg.config import Config
from scarceseg.data.dataset import Case, Split, UnlabelledCase, load_dataset
from scarceseg.data.plan import Plan
from scarceseg.data.prepare import PreparedCase, prepare_cases
from scarceseg.engine.folder import write_json
from scarceseg.engine.logging import Display
from scarceseg.errors import ConfigError, RunError
from scarceseg.inference.predictor import Predictor
from scarceseg.report import build_report
from scarceseg.report.suggestion_files import RESULT, SHOWN

Floats = NDArray[np.float64]

SAME = 1e-6
"""Rows of features that differ by less than this share of their largest value differ by rounding alone."""


def suggest(
    run: Path | str,
    count: int = 3,
    *,
    json: Path | str | None = None,
    device: str = "auto",
    cache: Path | None = None,
) -> Suggestions:
    """Rank the unlabelled volumes of a finished run by what their labels promise.

    A volume ranks high when the student is unsure of it, when it disagrees with another teacher of the run (a tuned
    foundation model, atlases, an earlier network), and when neither a labelled volume nor one suggested before looks like it.
    The arithmetic and its sources are in `scarceseg.active.scores`. Labels of unlabelled cases are not opened.

    Writes ``suggestions.json`` and the folder ``suggestions/`` into the run and makes its report again. Volumes measured
    before with the same weights are not predicted again, so that a stopped call goes on and a second one takes seconds.

    Args:
        run: folder of a finished run; its dataset has to be where it was.
        count: how many volumes to suggest; a pool with fewer is suggested whole, with a note.
        json: write the result here too.
        device: "auto", "cpu", "cuda" or "cuda:1".
        cache: folder of prepared volumes; None is the user's cache folder.

    Raises:
        ConfigError: `count` below 1.
        RunError: no run folder, an unfinished run, no unlabelled case, or the folder cannot be written.
        DataError: the dataset is gone or an image cannot be read.
    """
    run = Path(run)
    if count < 1:
        raise ConfigError(f"the number of volumes to suggest starts at 1, got {count}")
    config = _config(run)
    predictor = Predictor(run, device=device)
    split = Split.load(run / "split.json", load_dataset(Path(config.dataset)))
    if not split.unlabelled:
        raise RunError(f"there is nothing to suggest: every training case of the run {run} is labelled")
    measurer = Measurer(run, config, predictor)
    cases: list[Case | UnlabelledCase] = [*split.labelled, *split.unlabelled]
    stamps = {case.name: measurer.stamp(case) for case in cases}
    known = _measure(measurer, split, stamps, cache)
    result = rank(
        run,
        count,
        [known[case.name] for case in split.labelled],
        [known[case.name] for case in split.unlabelled],
        predictor.classes,
        measurer.weights,
    )
    _figures(measurer, split, stamps, result, cache)
    write_json(run / RESULT, result.to_json())
    if json is not None:
        write_json(Path(json), result.to_json())
    build_report(run)
    return result


def rank(
    run: Path, count: int, labelled: Sequence[Measured], pool: Sequence[Measured], classes: Sequence[str], weights: str
) -> Suggestions:
    """The ranking from what was measured; nothing is read.

    Args:
        run: the run folder.
        count: how many to suggest.
        labelled, pool: at least one of each.
        classes: names, background first.
        weights: hash of the network.
    """
    present = [set(one.present or ()) for one in labelled]
    expected = set.intersection(*present)
    uncertainty = np.array([volume_uncertainty(one.by_class, expected, one.whole) for one in pool])
    disagree = np.array([np.mean(list(one.disagreement.values())) if one.disagreement else np.nan for one in pool])
    distances, between = _distances(labelled, pool)
    to_labelled, nearest = distances.min(1), distances.argmin(1)
    ranking = []
    for pick in greedy(informativeness(uncertainty, disagree), to_labelled, between):
        one, i = pool[pick.index], pick.index
        missing = [classes[c] for c in sorted(expected) if one.by_class[c - 1] is None]
        alike = labelled[nearest[i]].case
        after = None if pick.after is None else pool[pick.after].case
        words = why(i, uncertainty, disagree, to_labelled, alike, sorted(one.disagreement), missing, after)
        other = None if np.isnan(disagree[i]) else float(disagree[i])
        ranking.append(
            Suggestion(one.case, pick.score, float(uncertainty[i]), other, float(to_labelled[i]), alike, words)
        )
    teachers = tuple(sorted({name for one in pool for name in one.disagreement}))
    return Suggestions(
        run=run,
        weights=weights,
        count=min(count, len(pool)),
        ranking=tuple(ranking),
        teachers=teachers,
        features=pool[0].kind,
        labelled=tuple(one.case for one in labelled),
        notes=_notes(count, len(pool), teachers, bool(to_labelled.any())),
    )


def _notes(count: int, size: int, teachers: Sequence[str], told_apart: bool) -> tuple[str, ...]:
    notes = []
    if count > size:
        notes.append(f"{count} were asked for, but only {size} volumes are unlabelled: all are listed")
    if not teachers:
        notes.append("no other teacher labelled the pool in this run: the student's own uncertainty counts alone")
    if not told_apart:
        notes.append("the network's features do not tell the volumes apart: how much they differ does not count")
    return tuple(notes)


def _distances(labelled: Sequence[Measured], pool: Sequence[Measured]) -> tuple[Floats, Floats]:
    """Euclidean, from the pool to the labelled volumes ``[n, m]`` and within the pool ``[n, n]``."""
    rows = np.stack([one.features for one in (*pool, *labelled)]).astype(np.float64)
    if pool[0].kind == "statistics":  # millimetres and intensities
        rows = standardised(rows)
    first = rows[: len(pool)]
    between: Floats = cdist(first, rows)
    between[between <= SAME * np.abs(rows).max(initial=0.0)] = 0.0
    return between[:, len(pool) :], between[:, : len(pool)]


def _config(run: Path) -> Config:
    path = run / "config.yaml"
    if not run.is_dir():
        raise RunError(f"there is no run folder {run}: check the path")
    if not path.is_file():
        raise RunError(f"{run} is no run folder: expected a config.yaml in it, as 'scarceseg train' leaves")
    return Config.load(path)


def _measure(measurer: Measurer, split: Split, stamps: Mapping[str, str], cache: Path | None) -> dict[str, Measured]:
    """Measure what is not known yet."""
    cases: list[Case | UnlabelledCase] = [*split.labelled, *split.unlabelled]
    known = {case.name: found for case in cases if (found := measurer.known(case)) is not None}

    def measure(case: PreparedCase, progress: Progress) -> None:
        known[case.name] = measurer.measure(case, stamps[case.name], progress)

    labelled = [case for case in split.labelled if case.name not in known]
    unlabelled = [case for case in split.unlabelled if case.name not in known]
    _each("measure", labelled, unlabelled, measurer.predictor.plan, cache, measure)
    return known


def _figures(
    measurer: Measurer, split: Split, stamps: Mapping[str, str], result: Suggestions, cache: Path | None
) -> None:
    """Keep what the report draws of the suggested volumes, as far as it is not there."""
    names = {one.case for one in result.suggestions[:SHOWN]}
    wanted = [case for case in split.unlabelled if case.name in names and not measurer.has_figure(case)]

    def draw(case: PreparedCase, progress: Progress) -> None:
        measurer.keep_figure(case, stamps[case.name], progress)

    _each("draw", (), wanted, measurer.predictor.plan, cache, draw)


def _each(
    title: str,
    labelled: Sequence[Case],
    unlabelled: Sequence[UnlabelledCase],
    plan: Plan,
    cache: Path | None,
    work: Callable[[PreparedCase, Progress], None],
) -> None:
    """Do something with each prepared volume, one at a time, and show how far it is."""
    if not labelled and not unlabelled:
        return
    cases = prepare_cases(labelled, unlabelled, plan, cache)
    with Display(title, 0, len(cases)) as display:
        for number, case in enumerate(cases.values()):
            work(case, partial(_windows, display, number, case.name))
            display.update(number + 1, note=case.name)


def _windows(display: Display, number: int, name: str, done: int, total: int) -> None:
    display.update(number, note=f"{name} {done / total:.0%}")
