"""Which files a prediction becomes, and writing them."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scarceseg.data.images import output_suffix, write_image
from scarceseg.errors import DataError, RunError
from scarceseg.inference.components import largest_component
from scarceseg.inference.prediction import Prediction


@dataclass(frozen=True)
class Job:
    """One case to predict.

    Attributes:
        name: case.
        inputs: one file (or DICOM folder) a channel.
        label: file for the mask.
        probabilities: a file for every class, or none at all.
        uncertainty: file for the uncertainty, or None.
    """

    name: str
    inputs: tuple[Path, ...]
    label: Path
    probabilities: tuple[Path, ...]
    uncertainty: Path | None

    @property
    def outputs(self) -> list[Path]:
        """All files it writes."""
        return [self.label, *self.probabilities, *([self.uncertainty] if self.uncertainty else [])]


def plan_jobs(
    cases: Sequence[tuple[str, tuple[Path, ...]]],
    classes: Sequence[str],
    out: Path,
    probabilities: bool,
    uncertainty: bool,
    overwrite: bool,
) -> list[Job]:
    """Name the files of every case.

    Raises:
        DataError: a result would replace an input, or two results have one name.
        RunError: a result is there already and `overwrite` is off.
    """
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
            if path.exists() and not overwrite:
                raise RunError(f"{path} exists already: choose another folder, or allow overwriting")
    return jobs


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


def write_job(job: Job, prediction: Prediction, clean: bool) -> list[Path]:
    """Write the files of a case; `clean` keeps the largest component of each class in the mask.

    Raises:
        RunError: a file cannot be written.
    """
    label = largest_component(prediction.label) if clean else prediction.label
    write_image(label, prediction.geometry, job.label)
    for index, path in enumerate(job.probabilities):
        write_image(prediction.probability_of(index), prediction.geometry, path)
    if job.uncertainty is not None:
        write_image(prediction.uncertainty, prediction.geometry, job.uncertainty)
    return job.outputs


def _file_words(classes: Sequence[str]) -> list[str]:
    """Class names as parts of file names; their index is added until no two are alike, in small letters too."""
    words = [re.sub(r"[^\w.-]+", "_", name).strip("._") or str(index) for index, name in enumerate(classes)]
    while len({word.lower() for word in words}) < len(words):
        lower = [word.lower() for word in words]
        words = [f"{word}_{index}" if lower.count(word.lower()) > 1 else word for index, word in enumerate(words)]
    return words
