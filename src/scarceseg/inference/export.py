"""Which files a prediction becomes, and writing them."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from scarceseg.data.images import output_suffix, write_image
from scarceseg.errors import ConfigError, DataError, RunError, near_matches
from scarceseg.functional.components import largest_component
from scarceseg.inference.prediction import Maps

Existing = Literal["replace", "skip", "refuse"]
"""What becomes of results of an earlier call."""


@dataclass(frozen=True)
class Job:
    """One case to predict.

    Attributes:
        name: case.
        inputs: one file (or DICOM folder) a channel.
        label: file for the mask.
        probabilities: a file for every class, or none at all.
        uncertainty: file for the uncertainty, or None.
        kept: those of its files that are there already and stay as they are.
    """

    name: str
    inputs: tuple[Path, ...]
    label: Path
    probabilities: tuple[Path, ...]
    uncertainty: Path | None
    kept: frozenset[Path] = frozenset()

    @property
    def outputs(self) -> list[Path]:
        """All files that belong to it."""
        return [self.label, *self.probabilities, *([self.uncertainty] if self.uncertainty else [])]

    @property
    def missing(self) -> list[Path]:
        """The files it writes."""
        return [path for path in self.outputs if path not in self.kept]


def plan_jobs(
    cases: Sequence[tuple[str, tuple[Path, ...]]],
    classes: Sequence[str],
    out: Path,
    probabilities: bool,
    uncertainty: bool,
    existing: Existing,
) -> list[Job]:
    """Name the files of every case; with `existing` "skip" a job may have nothing left to write.

    Raises:
        ConfigError: `existing` is none of its words.
        DataError: a result would replace an input, or two results have one name.
        RunError: results are there already and `existing` is "refuse".
    """
    if existing not in get_args(Existing):
        raise ConfigError(f"existing: expected {', '.join(get_args(Existing))}, got {existing!r}")
    words = _file_words(classes) if probabilities else []
    jobs = []
    for name, inputs in cases:
        suffix = output_suffix(inputs[0])
        jobs.append(
            Job(
                name,
                inputs,
                out / f"{name}{suffix}",
                tuple(out / f"{name}_prob_{word}{suffix}" for word in words),
                out / f"{name}_uncertainty{suffix}" if uncertainty else None,
            )
        )
    sources = {path.resolve() for job in jobs for path in job.inputs}
    owner: dict[Path, str] = {}
    for job in jobs:
        for path in job.outputs:
            if path.resolve() in sources:
                raise DataError(f"the result {path} would replace an input: choose another folder for the results")
            if owner.setdefault(path, job.name) != job.name:
                raise DataError(
                    f"the cases {owner[path]!r} and {job.name!r} would both write {path}: rename one of them"
                )
    there = [path for path in owner if path.exists()]
    if there and existing == "refuse":
        raise RunError(
            f"{len(there)} of {len(owner)} results exist already, such as {there[0]}: choose another folder, keep them "
            "(skip) or have them replaced (replace)"
        )
    return [replace(job, kept=frozenset(job.outputs) & set(there)) for job in jobs] if existing == "skip" else jobs


def classes_named(names: bool | str | Sequence[str], classes: Sequence[str]) -> frozenset[int] | None:
    """Indices of the classes that are named, or None for every class but the background.

    Args:
        names: of foreground classes, also as one text with commas between them; True is all, False none.
        classes: of the network.

    Raises:
        ConfigError: a name is not among them.
    """
    if isinstance(names, bool):
        return None if names else frozenset()
    wanted = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    known = {name: index for index, name in enumerate(classes) if index}
    if unknown := [name for name in wanted if name not in known]:
        raise ConfigError(
            f"largest component: there is no class {unknown[0]!r} to clean: {near_matches(unknown[0], known)}"
        )
    return frozenset(known[name] for name in wanted)


def open_folder(out: Path) -> None:
    """Make the folder and try to write in it, so that a wrong one is told before the work and not after it.

    Raises:
        RunError: it is a file, cannot be made or cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise RunError(
            f"cannot write into {out} ({error.strerror or error}): choose another folder for the results"
        ) from None


def write_job(job: Job, prediction: Maps, clean: Collection[int] | None) -> list[Path]:
    """Write the files of a case that are missing, each in one piece; `clean` as `largest_component` has its classes.

    Raises:
        RunError: a file cannot be written.
    """
    missing = job.missing
    if job.label in missing:
        write_image(largest_component(prediction.label, clean), prediction.geometry, job.label)
    for index, path in enumerate(job.probabilities):
        if path in missing:
            write_image(prediction.probability_of(index), prediction.geometry, path)
    if job.uncertainty in missing and job.uncertainty is not None:
        write_image(prediction.uncertainty, prediction.geometry, job.uncertainty)
    return missing


def _file_words(classes: Sequence[str]) -> list[str]:
    """Class names as parts of file names; their index is added until no two are alike, in small letters too."""
    words = [re.sub(r"[^\w.-]+", "_", name).strip("._") or str(index) for index, name in enumerate(classes)]
    while len({word.lower() for word in words}) < len(words):
        lower = [word.lower() for word in words]
        words = [f"{word}_{index}" if lower.count(word.lower()) > 1 else word for index, word in enumerate(words)]
    return words
