"""What the volumes are like: sizes, spacings, intensities of every training case, class counts of the labelled ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from scarceseg.data.cache import cache_folder, entry_path, load, store
from scarceseg.data.dataset import Case, Dataset, Split, UnlabelledCase
from scarceseg.data.geometry import orient_geometry
from scarceseg.data.images import read_label, read_volume
from scarceseg.errors import DataError, RunError

FACTS_VERSION = 1
"""Part of the cache key; goes up when the meaning of a case's facts changes."""

SAMPLES = 100_000
"""Voxels of a case that its intensity statistics are computed from."""


class Intensities(BaseModel):
    """Statistics of one channel: 0.5th, 50th and 99.5th percentile, mean, standard deviation, share of exact zeros."""

    low: float
    median: float
    high: float
    mean: float
    std: float
    zeros: float


class CaseFacts(BaseModel):
    """One training case, its axes in canonical order.

    Attributes:
        labelled: in this run; only then `class_voxels` (count per class) is known.
        intensities: per channel.
    """

    name: str
    labelled: bool
    size: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    intensities: list[Intensities]
    class_voxels: list[int] | None = None


class Fingerprint(BaseModel):
    """Facts about all training cases.

    Attributes:
        cases: labelled ones first.
        overall: per channel, over samples of all cases.
        foreground: per channel, over samples of the labelled foreground; None when it has fewer than 1000 voxels.
    """

    cases: list[CaseFacts]
    overall: list[Intensities]
    foreground: list[Intensities] | None


def alike(one: Fingerprint, other: Fingerprint) -> bool:
    """Whether two fingerprints are of the same volumes; intensities may differ by rounding, as between processors."""

    def exact(found: Fingerprint) -> list[Any]:
        return [(case.name, case.labelled, case.size, case.class_voxels, len(case.intensities)) for case in found.cases]

    def measured(found: Fingerprint) -> list[float]:
        numbers = [
            [*case.spacing_mm, *(v for i in case.intensities for v in i.model_dump().values())] for case in found.cases
        ]
        return [number for row in numbers for number in row]

    return exact(one) == exact(other) and bool(np.allclose(measured(one), measured(other), 1e-4, 1e-6, equal_nan=True))


def fingerprint(dataset: Dataset, split: Split, cache: Path | None = None) -> Fingerprint:
    """Read the images of all training cases, and the labels of the labelled ones only.

    What was found out about a case is kept; its files are read again when they or its role have changed. Validation cases are
    read too, so that one that cannot be used is told before the training and not after it; nothing of them enters the facts.

    Args:
        dataset: gives the classes.
        split: who is what.
        cache: folder; None is `cache_folder`.

    Raises:
        DataError: files cannot be used (see `images.read_volume` and `images.read_label`); those of all cases in one message.
    """
    classes, folder = range(len(dataset.classes)), cache or cache_folder()
    cases: list[Case | UnlabelledCase] = [*split.labelled, *split.unlabelled]
    with ThreadPoolExecutor(2, thread_name_prefix="fingerprint") as pool:
        try:
            found = list(pool.map(lambda case: _or_error(lambda: _look(case, classes, folder)), cases))
            checked = list(pool.map(lambda case: _or_error(lambda: _check(case, classes)), split.val))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    looks = [look for look in found if not isinstance(look, DataError)]
    _raise([error for error in (*found, *checked) if isinstance(error, DataError)], len(found) + len(checked))
    foreground = np.concatenate([samples for _, _, samples in looks], axis=1)
    return Fingerprint(
        cases=[facts for facts, _, _ in looks],
        # An equal share per case, so that one huge volume does not decide.
        overall=[_statistics(channel) for channel in np.concatenate([_thin(s, 10_000) for _, s, _ in looks], axis=1)],
        foreground=[_statistics(channel) for channel in foreground] if foreground.shape[1] >= 1000 else None,
    )


Look = tuple[CaseFacts, NDArray[np.float32], NDArray[np.float32]]
"""A case's facts, and samples ``[C, N]`` of its voxels and of its labelled foreground."""


T = TypeVar("T")

TOLD = 10
"""Cases whose error is told; the rest is counted."""


def _or_error(read: Callable[[], T]) -> T | DataError:
    try:
        return read()
    except DataError as error:
        return error


def _raise(errors: Sequence[DataError], total: int) -> None:
    if len(errors) == 1:
        raise errors[0]
    if errors:
        more = f"; and {len(errors) - TOLD} more" if len(errors) > TOLD else ""
        listing = "; ".join(map(str, errors[:TOLD]))
        raise DataError(f"{len(errors)} of {total} cases cannot be used: {listing}{more}")


def _look(case: Case | UnlabelledCase, classes: range, folder: Path) -> Look:
    """From the cache, where it is there. The files that are read are the entry's key, so that a label belongs to it or not."""
    files = [*case.images, *([case.label] if isinstance(case, Case) and case.label is not None else [])]
    entry = entry_path(folder, f"{case.name}-facts", files, {"version": FACTS_VERSION, "classes": len(classes)})
    kept = load(entry)
    if kept is not None:
        with suppress(KeyError, ValueError):  # somebody edited it
            facts, count = CaseFacts.model_validate(kept[1]["facts"]), int(kept[1]["samples"])
            values = np.array(kept[0])  # and not the map, which would keep its file open
            return facts, values[:, :count], values[:, count:]
    facts, samples, foreground = _read(case, classes)
    with suppress(RunError):  # the plan can be made without keeping it
        notes = {"facts": facts.model_dump(mode="json"), "samples": samples.shape[1]}
        store(entry, np.concatenate([samples, foreground], axis=1), notes)
    return facts, samples, foreground


def _read(case: Case | UnlabelledCase, classes: range) -> Look:
    volume, geometry = read_volume(case.images)
    samples = _thin(volume.reshape(len(volume), -1), SAMPLES)
    counts, foreground = None, samples[:, :0]
    if isinstance(case, Case) and case.label is not None:
        label = read_label(case.label, classes, geometry)
        counts = [int(n) for n in np.bincount(label.ravel(), minlength=len(classes))]
        foreground = _thin(volume[:, label > 0], 10_000)
    turned = orient_geometry(geometry)
    facts = CaseFacts(
        name=case.name,
        labelled=counts is not None,
        size=turned.size,
        spacing_mm=turned.spacing_mm,
        intensities=[_statistics(channel) for channel in samples],
        class_voxels=counts,
    )
    return facts, samples, foreground


def _check(case: Case, classes: range) -> None:
    _, geometry = read_volume(case.images)
    if case.label is not None:
        read_label(case.label, classes, geometry)


def _thin(samples: NDArray[Any], count: int) -> NDArray[Any]:
    """At most about `count` columns, evenly spread; the odd stride does not keep step with rows of even length.

    A copy: a view would keep its whole volume in memory.
    """
    stride = max(-(-samples.shape[1] // count), 1)
    return samples[:, :: stride + (stride > 1 and stride % 2 == 0)].copy()


def _statistics(values: NDArray[np.float32]) -> Intensities:
    low, median, high = np.percentile(values, [0.5, 50, 99.5])
    return Intensities(
        low=float(low),
        median=float(median),
        high=float(high),
        mean=float(values.mean(dtype=np.float64)),
        std=float(values.std(dtype=np.float64)),
        zeros=float((values == 0).mean()),
    )
