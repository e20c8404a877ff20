"""Fingerprint + config -> plan: the spacing, patch and normalisation of a run, with an estimate of what it costs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel

from scarceseg.config import Config
from scarceseg.data.dataset import Dataset, Split
from scarceseg.data.fingerprint import Fingerprint, fingerprint
from scarceseg.errors import ConfigError

__all__ = ["Fingerprint", "Normalisation", "Plan", "fingerprint", "make_plan"]

PLAN_VERSION = 1
"""Raised when the meaning of a field changes."""

MOST_VOXELS = 10**9
"""Of a prepared volume; more is a wrong spacing in a header, or in the settings."""

PATCH_VOXELS = 112 * 112 * 80
"""The patch of the published LA recipes; a V-Net of 16 filters learns from four such in about 6 GB."""

BYTES_PER_VOXEL = 1400
"""Peak growth of a V-Net of 16 filters in float32 on a CPU, per voxel of a row (activations, gradients, workspace)."""

NETWORK_MB = 9_448_866 * 4 * 5 / 2**20
"""Weights, gradient, momentum, averaged copy and one spare of the same network."""

AIR = -500
"""Hounsfield units; a channel whose low percentile is below it is hardly an MRI."""


class Normalisation(BaseModel):
    """How one channel's intensities are scaled.

    Attributes:
        kind: "zscore" takes mean and deviation of each volume (of its non-zero voxels when more than half of it is
            exactly zero); "ct" clips to ``low .. high`` and uses `mean` and `std`; "none" leaves values alone.
    """

    kind: Literal["zscore", "ct", "none"]
    low: float = 0.0
    high: float = 0.0
    mean: float = 0.0
    std: float = 1.0


class Plan(BaseModel):
    """All that turns a volume into what the network reads; saved as ``plan.json``.

    Attributes:
        dataset: name.
        channels, classes: names; class 0 is background.
        file_ending: of the dataset's images.
        spacing_mm: of prepared volumes, axes in canonical order.
        patch: voxels a side.
        normalisation: one per channel.
        batch_labeled, batch_unlabeled: rows of a step.
        median_shape: voxels of the median training case at `spacing_mm`.
        windows: sliding windows per axis for that case, at half overlap.
        memory_estimate_mb: rough memory of one training step in float32, see `estimate_memory_mb`.
        warnings: about the data and the choices.
        version: of the plan's meaning.
    """

    dataset: str
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    file_ending: str
    spacing_mm: tuple[float, float, float]
    patch: tuple[int, int, int]
    normalisation: tuple[Normalisation, ...]
    batch_labeled: int
    batch_unlabeled: int
    median_shape: tuple[int, int, int]
    windows: tuple[int, int, int]
    memory_estimate_mb: float
    warnings: tuple[str, ...] = ()
    version: int = PLAN_VERSION


def make_plan(
    fingerprint: Fingerprint,
    dataset: Dataset,
    split: Split,
    config: Config,
    divisor: int | tuple[int, int, int],
    fixed: tuple[int, int, int] | None = None,
) -> Plan:
    """Choose what the config leaves open.

    Args:
        fingerprint: of the training cases.
        dataset: names.
        split: to tell whether a step has unlabelled rows.
        config: `config.plan` overrides every choice.
        divisor: the network needs patch sides that are multiples of it.
        fixed: the one patch it is built for, if it is.

    Raises:
        ConfigError: the spacing asked for is impossible, or the patch does not suit the network.
    """
    divisors = (divisor, divisor, divisor) if isinstance(divisor, int) else divisor
    spacing = config.plan.spacing_mm or _choose_spacing(fingerprint)
    _check_spacing(spacing, fingerprint)
    shapes = _shapes(fingerprint, spacing)
    median = _three(np.maximum(np.rint(np.median(shapes, axis=0)), 1).astype(int).tolist())
    patch = config.plan.patch
    if fixed is not None and patch not in (None, fixed):
        raise ConfigError(
            f"patch: network {config.network.name!r} is built for {'x'.join(map(str, fixed))} voxels alone, got "
            f"{'x'.join(map(str, patch or ()))}; take that patch, or set the network's argument img_size"
        )
    patch = fixed or patch
    if patch is None:
        patch = _choose_patch(median, divisors)
    else:
        _check_patch(patch, divisors, config.network.name)
    unlabelled = config.batch_unlabeled if split.unlabelled and config.method != "supervised" else 0
    warnings = [
        *_spacing_warnings(fingerprint),
        *_label_warnings(fingerprint, dataset, spacing),
        *_patch_warnings(shapes, patch, divisors),
    ]
    normalisation = _choose_normalisation(fingerprint, dataset, config, warnings)
    return Plan(
        dataset=dataset.name,
        channels=dataset.channels,
        classes=dataset.classes,
        file_ending=dataset.file_ending,
        spacing_mm=spacing,
        patch=patch,
        normalisation=normalisation,
        batch_labeled=config.batch_labeled,
        batch_unlabeled=config.batch_unlabeled,
        median_shape=median,
        windows=_three([_windows(side, size) for side, size in zip(patch, median, strict=True)]),
        memory_estimate_mb=round(estimate_memory_mb(patch, config.batch_labeled + unlabelled), 1),
        warnings=tuple(warnings),
    )


def resampling_plan(
    dataset: Dataset, spacing_mm: tuple[float, float, float], kind: Literal["zscore", "none"] = "none"
) -> Plan:
    """A plan that resamples (and z-scores) and plans nothing else, for preparing volumes outside of a training.

    Args:
        dataset: its channels and classes are taken.
        spacing_mm: of the prepared volumes.
        kind: what is done to intensities, see `Normalisation`.
    """
    return Plan(
        dataset=dataset.name,
        channels=dataset.channels,
        classes=dataset.classes,
        file_ending=dataset.file_ending,
        spacing_mm=spacing_mm,
        patch=(1, 1, 1),
        normalisation=(Normalisation(kind=kind),) * len(dataset.channels),
        batch_labeled=1,
        batch_unlabeled=0,
        median_shape=(1, 1, 1),
        windows=(1, 1, 1),
        memory_estimate_mb=0.0,
    )


def estimate_memory_mb(patch: Sequence[int], rows: int) -> float:
    """Rough memory of a training step: ``rows * voxels * BYTES_PER_VOXEL`` plus the network's own copies.

    Measured for a V-Net of 16 filters in float32 and meant as an order of magnitude: bfloat16 needs about half, wider
    networks grow with their filters, terms with a teacher or several decoders come on top.
    """
    return rows * math.prod(patch) * BYTES_PER_VOXEL / 2**20 + NETWORK_MB


def _three(values: Sequence[int]) -> tuple[int, int, int]:
    return int(values[0]), int(values[1]), int(values[2])


def _choose_spacing(facts: Fingerprint) -> tuple[float, float, float]:
    """Median per axis. Thick slices (over 3 times the finest axis) go to their 10th percentile, so that the cases with
    thinner slices keep what they show."""
    spacings = np.array([case.spacing_mm for case in facts.cases])
    chosen = np.median(spacings, axis=0)
    thick = chosen > 3 * chosen.min()
    finest = np.maximum(np.percentile(spacings, 10, axis=0), chosen[~thick].max())
    x, y, z = (round(float(value), 4) for value in np.where(thick, finest, chosen))
    return x, y, z


def _shapes(facts: Fingerprint, spacing: Sequence[float]) -> np.ndarray:
    return np.array([np.array(case.size) * case.spacing_mm / np.array(spacing) for case in facts.cases])


def _check_spacing(spacing: Sequence[float], facts: Fingerprint) -> None:
    shown = ", ".join(f"{value:g}" for value in spacing)
    if not all(math.isfinite(value) and value > 0 for value in spacing):
        raise ConfigError(f"spacing_mm: expected millimetres above 0, got ({shown})")
    voxels = _shapes(facts, spacing).prod(axis=1)
    present = ", ".join(f"{value:g}" for value in _choose_spacing(facts))
    if voxels.min() < 8 or voxels.max() > MOST_VOXELS:
        kind, count = ("few", voxels.min()) if voxels.min() < 8 else ("many", voxels.max())
        raise ConfigError(
            f"spacing_mm: ({shown}) mm leaves a case with too {kind} voxels (about {count:.3g}, expected 8 to 1e9); "
            f"the volumes themselves have about ({present}) mm"
        )


def _choose_patch(median: Sequence[int], divisors: Sequence[int]) -> tuple[int, int, int]:
    """Grow from the smallest patch, always the side that is shortest relative to the volume, up to `PATCH_VOXELS`."""
    limit = [math.ceil(size / step) * step for size, step in zip(median, divisors, strict=True)]
    patch = list(divisors)
    while True:
        for axis in sorted(range(3), key=lambda a: patch[a] / median[a]):
            grown = [side + divisors[axis] * (a == axis) for a, side in enumerate(patch)]
            if grown[axis] <= limit[axis] and math.prod(grown) <= 1.05 * PATCH_VOXELS:
                patch = grown
                break
        else:
            return _three(patch)


def _check_patch(patch: Sequence[int], divisors: Sequence[int], network: str) -> None:
    nearest = [max(step, int(side / step + 0.5) * step) for side, step in zip(patch, divisors, strict=True)]
    if list(patch) != nearest:
        raise ConfigError(
            f"patch: network {network!r} needs sides that are multiples of {'x'.join(map(str, divisors))}, got "
            f"{'x'.join(map(str, patch))}; the nearest possible patch is {','.join(map(str, nearest))}"
        )


def _windows(side: int, size: int) -> int:
    return 1 if size <= side else math.ceil((size - side) / (side / 2)) + 1


def _choose_normalisation(
    facts: Fingerprint, dataset: Dataset, config: Config, warnings: list[str]
) -> tuple[Normalisation, ...]:
    chosen = []
    for number, channel in enumerate(dataset.channels):
        kind = config.plan.normalisation
        if kind == "auto":
            words = re.split(r"[^a-z0-9]+", channel.lower())
            kind = "ct" if "ct" in words else "none" if "nonorm" in words else "zscore"
            if kind == "zscore" and facts.overall[number].low < AIR:
                warnings.append(
                    f"channel {channel!r} looks like Hounsfield units (down to {facts.overall[number].low:.0f}) but is scaled "
                    "volume by volume: name it 'CT' in channel_names of dataset.json (a word of its own, as in 'CT angio') for "
                    "the window of CT, or say plan.normalisation=zscore"
                )
        if kind != "ct":
            chosen.append(Normalisation(kind=kind))
            continue
        if facts.foreground is None:
            warnings.append(
                f"channel {channel!r}: fewer than 1000 labelled foreground voxels; the CT window comes from all voxels"
            )
        found = (facts.foreground or facts.overall)[number]
        chosen.append(Normalisation(kind="ct", low=found.low, high=found.high, mean=found.mean, std=found.std or 1.0))
    return tuple(chosen)


def _spacing_warnings(facts: Fingerprint) -> list[str]:
    spacings = np.array([case.spacing_mm for case in facts.cases])
    low, high = spacings.min(axis=0), spacings.max(axis=0)
    if (high / low).max() <= 2:
        return []
    axis = int(np.argmax(high / low))
    return [
        f"spacings differ much between cases: {low[axis]:g} to {high[axis]:g} mm along {'xyz'[axis]}; "
        "check the headers of the extreme ones, or choose a spacing"
    ]


def _label_warnings(facts: Fingerprint, dataset: Dataset, spacing: Sequence[float]) -> list[str]:
    labelled = [case for case in facts.cases if case.class_voxels is not None]
    counts = np.array([case.class_voxels for case in labelled])
    warnings = []
    if empty := [case.name for case, row in zip(labelled, counts, strict=True) if row[1:].sum() == 0]:
        warnings.append(f"labelled cases with an empty label (no foreground): {', '.join(empty)}; kept")
    scale = np.array([np.prod(case.spacing_mm) / np.prod(spacing) for case in labelled])
    for value, name in enumerate(dataset.classes[1:], start=1):
        present = counts[:, value] > 0
        if not present.any():
            warnings.append(f"class {name!r} ({value}) is in no labelled case: it cannot be learnt")
        elif (size := float(np.median((counts[:, value] * scale)[present]))) < 30:
            warnings.append(
                f"class {name!r} ({value}) is tiny: about {size:.0f} voxels a case at the chosen spacing; "
                "a finer spacing may be needed"
            )
    return warnings


def _patch_warnings(shapes: np.ndarray, patch: Sequence[int], divisors: Sequence[int]) -> list[str]:
    # Padding up to the network's next multiple cannot be avoided and is not worth a word.
    rounded = np.ceil(np.maximum(np.rint(shapes), 1) / divisors) * divisors
    small = int((rounded < np.array(patch)).any(axis=1).sum())
    if not small:
        return []
    return [f"{small} of {len(shapes)} cases are smaller than the patch {'x'.join(map(str, patch))} and are padded"]
