"""Atlases -> labels for many volumes, in parallel processes, every registration kept on disk.

Three passes, each spread over processes: an affine step ranks the atlases for every target, the most similar ones are
registered fully, then warped and fused. The label of a target is never looked at: all that is taken of a target is a
`Scan`, which has none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from scarceseg.atlas.fuse import Fusion, fuse
from scarceseg.atlas.pairs import Pair, Scan, aligned, is_kept, kept_alignment, registration_memory, scan_of
from scarceseg.atlas.register import Registration
from scarceseg.atlas.spread import Progress, Spread, at_once, count_workers
from scarceseg.atlas.warp import copy_label, warp_image, warp_label
from scarceseg.data.cache import cache_folder
from scarceseg.data.prepare import PreparedCase
from scarceseg.errors import ConfigError, DataError
from scarceseg.types import LabelMap


class AtlasOptions(BaseModel):
    """How labels are made from atlases.

    Attributes:
        registration: of one atlas to one target.
        fusion: of the warped atlases.
        max_atlases: the most similar ones (after the affine step) that are registered fully and fused, per target.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    registration: Registration = Registration()
    fusion: Fusion = Fusion()
    max_atlases: int = Field(5, ge=1)


@dataclass(frozen=True)
class AtlasLabel:
    """What the atlases say of one target.

    Attributes:
        name: of the case.
        probability: ``[K, X, Y, Z]`` float32, sums to one over K.
        label: ``[X, Y, Z]`` uint8, the most probable class.
        agreement: ``[X, Y, Z]`` float32 in [0, 1], see `fuse.agreement`.
        atlases: names of those that were fused, most similar first.
        notes: registrations that had to do with less than was asked for, and why.
    """

    name: str
    probability: NDArray[np.float32]
    label: LabelMap
    agreement: NDArray[np.float32]
    atlases: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExpectedDice:
    """How well the labelled volumes label each other.

    Attributes:
        cases: by case name, Dice in [0, 1] of each foreground class; NaN where neither label has the class.
        mean: over cases and classes, NaN left out.
    """

    cases: dict[str, tuple[float, ...]]
    mean: float


@dataclass(frozen=True)
class _Labelling:
    """One target to be labelled: all a worker needs."""

    target: Scan
    atlases: tuple[tuple[Pair, LabelMap], ...]
    classes: int
    fusion: Fusion


def atlas_labels(
    targets: Sequence[PreparedCase],
    atlases: Sequence[PreparedCase],
    classes: int,
    options: AtlasOptions | None = None,
    workers: int | None = None,
    cache: Path | None = None,
    on_progress: Progress | None = None,
) -> Iterator[AtlasLabel]:
    """Label volumes by registering labelled ones to them.

    Results do not depend on the number of workers. Alignments are kept in the cache under the content of both volumes
    and the options, so that a job that was stopped goes on where it was. With several workers, a script that calls
    this needs the usual ``if __name__ == "__main__":`` around it, since workers import the script.

    Args:
        targets: their labels are not looked at; one that is also an atlas is labelled by the others.
        atlases: cases with a label.
        classes: K, background included.
        options: how.
        workers: processes; None is one for each core this process may use, 1 none besides this one.
        cache: folder; None is `cache_folder`.
        on_progress: called with (done, total, text).

    Yields:
        One `AtlasLabel` for each target, in the order given. What was yielded is not kept.

    Raises:
        ConfigError: no atlas, or an option that does not suit the volumes.
        DataError: an atlas without a label, or with a value beyond `classes`.
        RunError: the cache cannot be written.
    """
    options = options or AtlasOptions()
    labels = _labels(atlases, classes)
    scans = [scan_of(case) for case in atlases]
    wanted = [(scan_of(case), [scan for scan in scans if scan.name != case.name]) for case in targets]
    if alone := [target.name for target, others in wanted if not others]:
        raise ConfigError(f"case {alone[0]} is the only atlas and cannot label itself; label another case")
    yield from _label_all(wanted, labels, classes, options, workers, cache or cache_folder(), on_progress)


def expected_dice(
    atlases: Sequence[PreparedCase],
    classes: int,
    options: AtlasOptions | None = None,
    workers: int | None = None,
    cache: Path | None = None,
    on_progress: Progress | None = None,
) -> ExpectedDice:
    """Label every atlas from the others, and compare with its own label.

    An estimate of the labels' quality from labelled cases alone; a little low, since one atlas fewer takes part.

    Args:
        atlases: two or more cases with labels.
        classes, options, workers, cache, on_progress: as of `atlas_labels`.

    Raises:
        ConfigError: fewer than two atlases.
    """
    if len(atlases) < 2:
        raise ConfigError(f"expected two or more labelled volumes to compare with each other, got {len(atlases)}")
    labels = _labels(atlases, classes)
    made = atlas_labels(atlases, atlases, classes, options, workers, cache, on_progress)
    cases = {one.name: class_dice(one.label, labels[one.name], classes) for one in made}
    values = np.array(list(cases.values()))
    return ExpectedDice(cases, float(np.nanmean(values)) if np.isfinite(values).any() else float("nan"))


def copy_labels(targets: Sequence[PreparedCase], atlases: Sequence[PreparedCase], classes: int) -> Iterator[AtlasLabel]:
    """The atlases' masks stretched onto each target's box and averaged; no image is looked at.

    The agreement is the share of atlases whose own label is the averaged one; of a single atlas, its probability.

    Args, yields, raises: as `atlas_labels`.
    """
    labels = _labels(atlases, classes)
    for target in targets:
        own: list[LabelMap] = []
        total: NDArray[np.float32] | None = None
        for atlas in atlases:
            share = copy_label(labels[atlas.name], atlas.geometry, target.geometry, classes)
            own.append(share.argmax(0).astype(np.uint8))
            total = share if total is None else total + share
        assert total is not None
        mean: NDArray[np.float32] = total / np.float32(len(own))
        label = mean.argmax(0).astype(np.uint8)
        agreement: NDArray[np.float32] = mean.max(0)
        if len(own) > 1:
            agreement = np.mean([one == label for one in own], axis=0, dtype=np.float32)
        yield AtlasLabel(target.name, mean, label, agreement, tuple(labels))


def class_dice(label: LabelMap, reference: LabelMap, classes: int) -> tuple[float, ...]:
    """Dice in [0, 1] of every foreground class; NaN where neither map has it."""
    found = []
    for value in range(1, classes):
        a, b = label == value, reference == value
        total = int(a.sum()) + int(b.sum())
        found.append(2 * int((a & b).sum()) / total if total else float("nan"))
    return tuple(found)


def _label_all(
    wanted: Sequence[tuple[Scan, Sequence[Scan]]],
    labels: Mapping[str, LabelMap],
    classes: int,
    options: AtlasOptions,
    workers: int | None,
    folder: Path,
    on_progress: Progress | None,
) -> Iterator[AtlasLabel]:
    affine = options.registration.up_to("affine")
    first = [[Pair(target, atlas, affine, folder) for atlas in atlases] for target, atlases in wanted]
    count = [min(options.max_atlases, len(pairs)) for pairs in first]
    total = sum(map(len, first)) + sum(count) + len(first)
    with Spread(count_workers(workers), total, on_progress) as spread:
        _align(spread, [pair for pairs in first for pair in pairs])
        best = [_most_similar(pairs, options) for pairs in first]
        _align(spread, [pair for pairs in best for pair in pairs])
        jobs = [
            _Labelling(pairs[0].fixed, tuple((p, labels[p.moving.name]) for p in pairs), classes, options.fusion)
            for pairs in best
        ]
        most = at_once(max(map(_memory, jobs), default=1))
        yield from spread.results(_labelled, jobs, lambda job: job.target.name, most)


def _align(spread: Spread, pairs: Sequence[Pair]) -> None:
    most = at_once(max((registration_memory(p.fixed, p.moving, p.registration) for p in pairs), default=1))
    spread.run(aligned, pairs, is_kept, _pair_text, most)


def _most_similar(pairs: Sequence[Pair], options: AtlasOptions) -> list[Pair]:
    """The pairs to register fully, most similar first; equal ones keep their order."""
    ranked = sorted(pairs, key=lambda pair: -kept_alignment(pair).similarity)
    return [pair.with_registration(options.registration) for pair in ranked[: options.max_atlases]]


def _labelled(job: _Labelling) -> AtlasLabel:
    grid = job.target.geometry
    found = [(pair, label, kept_alignment(pair)) for pair, label in job.atlases]
    transforms = [one.transform(grid, pair.moving.geometry) for pair, _, one in found]
    images = np.stack(
        [
            warp_image(pair.moving.image, pair.moving.geometry, way, grid)
            for (pair, _, _), way in zip(found, transforms, strict=True)
        ]
    )
    shares = (
        warp_label(label, pair.moving.geometry, way, grid, job.classes)
        for (pair, label, _), way in zip(found, transforms, strict=True)
    )
    probability, agreement = fuse(shares, images, job.target.image, job.fusion, grid.spacing_mm)
    notes = [
        f"{pair.moving.name} to {job.target.name}: {one.note}; its {one.stage} step is used"
        for pair, _, one in found
        if one.note
    ]
    names = tuple(pair.moving.name for pair, _ in job.atlases)
    return AtlasLabel(
        job.target.name, probability, probability.argmax(0).astype(np.uint8), agreement, names, tuple(notes)
    )


def _memory(job: _Labelling) -> int:
    """Bytes that warping and fusing need, about: images, errors of each atlas, what each two share, weights, probabilities."""
    channels, *sides = job.target.image.shape
    count = len(job.atlases)
    a_voxel = 16 * count * channels + 2 * count * (count + 1) + 12 * count + 16 * job.classes + 64
    return a_voxel * math.prod(sides)


def _pair_text(pair: Pair) -> str:
    return f"{pair.moving.name} to {pair.fixed.name}"


def _labels(atlases: Sequence[PreparedCase], classes: int) -> dict[str, LabelMap]:
    if not atlases:
        raise ConfigError("expected at least one labelled volume to serve as atlas, got none; label one case")
    labels = {}
    for case in atlases:
        if case.label is None:
            raise DataError(f"expected a label for atlas {case.name}, got none; choose a labelled case")
        label = np.asarray(case.label)
        if label.max(initial=0) >= classes:
            raise DataError(f"label of {case.name}: expected values 0 to {classes - 1}, got {label.max()}")
        labels[case.name] = label
    return labels
