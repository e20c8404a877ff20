"""SFR: a foundation model tuned on the labelled volumes labels the others, and the student learns from both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import model_validator
from torch import nn

from scarceseg.data.sampling import Source
from scarceseg.errors import ConfigError
from scarceseg.foundation.base import Tunable
from scarceseg.methods.base import METHODS, FieldKind, Term, TermOptions, build_terms
from scarceseg.methods.fine_tuning import TunedTeacher, TuningOptions
from scarceseg.methods.pseudo_labels import PseudoLabels, PseudoLabelTerm
from scarceseg.methods.tuned_in import check_tuned, take_tuned
from scarceseg.types import IGNORE_LABEL, Unlabelled

if TYPE_CHECKING:
    from scarceseg.data.prepare import PreparedCase
    from scarceseg.engine.workspace import Workspace


class SfrOptions(TuningOptions):
    """Options of SFR; those of the tuning and of the loss."""

    @model_validator(mode="after")
    def _crops(self) -> SfrOptions:
        for option, found in (
            ("largest_component", self.largest_component),
            ("surest", self.surest not in ("auto", None)),
        ):
            if self.labels == "crop" and found:
                raise ValueError(
                    f"{option} is of whole volumes, labels: crop labels patches; expected one or the other: leave one out"
                )
        return self


@METHODS.register("sfr")
class Sfr(PseudoLabelTerm):
    """Stitching, fine-tuning, re-training (Li et al., IEEE TMI 2025, sec. III): ``0.5 (CE + Dice)`` on labels of a tuned SAM.

    The foundation model sees each labelled volume as a mosaic of its slices, is tuned on it (stage `tune`), labels the
    unlabelled volumes (stage `label`), and is not needed afterwards. A volumetric model takes SAM's place without a mosaic;
    where none is named, `tiny-sam` does it with a single labelled volume and `tiny-sam3d` with more. With a single labelled
    volume many labels are poor: only those of the surer half of the pool are learnt (`surest`; None learns all, as published).

    Differs from the authors' code: a volume is labelled once, as a whole or in overlapping mosaics with averaged probabilities,
    and its label is cropped with the image; there, the tuned model runs on every training crop, which ``labels: crop`` does
    too. Patches are augmented as the student's are (`patch_augment`; the paper turns and flips), the grid of a mosaic is the
    one that fits its slices (the script's has a fixed side and padding), and the Dice of the tuning has the constant 1e-5
    (there 1e-10).
    """

    Options: ClassVar[type[TermOptions]] = SfrOptions
    foundation = "tiny-sam3d"
    foundation_of_one: ClassVar[str] = "tiny-sam"
    surest_of_one = 0.5
    options: SfrOptions

    @classmethod
    def usual_foundation(cls, options: Mapping[str, Any], labelled: int) -> str | None:
        """With a single labelled volume another one, unless patches are asked for, which that does not take."""
        patches = options.get("labels") == "crop" or options.get("view") == "patch"
        return cls.foundation_of_one if labelled == 1 and not patches else cls.foundation

    def stages(self) -> list[str]:
        """Fine-tune, then label; the second is not needed when every patch is labelled anew."""
        return ["tune", "label"] if self.options.labels == "volume" else ["tune"]

    @property
    def field_kinds(self) -> dict[str, FieldKind]:
        """None when every patch is labelled anew."""
        return super().field_kinds if self.options.labels == "volume" else {}

    def check(self, student: nn.Module, work: Workspace) -> None:
        """The model has to suit the options, and what is learnt from or taken over has to be there."""
        if self.options.learn_from is not None:
            guessing(work, self.name, self.options.learn_from)
        done = {stage for stage in self.stages() if (work.folder(self.name, stage) / "done").exists()}
        if self.options.labels == "volume" and len(done) == len(self.stages()):  # the model may be gone
            return
        model = tunable_of(work, self)
        shown = model if self.options.view == "auto" else model.shown(self.options.view)
        if self.options.labels == "crop" and shown.sees == "volume":
            raise ConfigError(
                f"terms.{self.name}.labels: 'crop' needs a model that sees patches, {work.foundation_of(self)!r} is shown whole "
                f"volumes: take another model (tiny-sam3d, sam-vit-b), view: patch where it takes both, or labels: volume"
            )
        if self.options.tuned_in is not None and "tune" not in done:
            check_tuned(work, self.name, Path(self.options.tuned_in), model)

    def prepare(self, stage: str, work: Workspace) -> None:
        """Tune the model, or label the pool with it."""
        teacher = TunedTeacher(work, self.options, work.foundation_of(self))
        tuned = work.folder(self.name, "tune")
        if stage == "tune":
            work.warnings.extend(teacher.idle(self.name, work.foundation_of(self)))
            if self.options.tuned_in is not None:
                take_tuned(work, self.name, Path(self.options.tuned_in), teacher.files, tunable_of(work, self))
                return
            teacher.tune(tuned, f"{self.name}-tune", self._guessed(work))
            return
        teacher.load(tuned)
        self._label(work, stage, teacher)

    def _label(self, work: Workspace, stage: str, teacher: TunedTeacher) -> None:
        self._teacher: list[TunedTeacher] = [teacher]  # in a list, so that it is no part of the term's state
        self.guess(work, stage, list(work.unlabelled), **self.about(work, teacher))
        self._teacher = []  # the model is not needed during training and may be large
        warn_empty(work, self.name, PseudoLabels(work.folder(self.name, stage)))

    def about(self, work: Workspace, teacher: TunedTeacher) -> dict[str, Any]:
        """What the table of confidences says of the model."""
        return {
            "foundation": work.foundation_of(self),
            "view": "whole volumes" if teacher.whole else "patches",
            "strategy": self.options.strategy,
            "tune_iterations": teacher.iterations,
            **({"tuned_in": self.options.tuned_in} if self.options.tuned_in else {}),
            **({} if (share := self.learnt(work)) is None else {"surest": share}),
        }

    def _guessed(self, work: Workspace) -> list[Source]:
        return guessed_sources(work, self.name, self.options.learn_from)

    def probability_of(self, work: Workspace, case: PreparedCase) -> NDArray[np.float32]:
        """By the tuned model."""
        return self._teacher[0].probability(case)

    def initialise(self, student: nn.Module, work: Workspace) -> None:
        """Take the tuned model along when patches are labelled one by one."""
        if self.options.labels == "crop":
            self.take_along(work, work.folder(self.name, "tune"))

    def take_along(self, work: Workspace, folder: Path) -> None:
        """Keep the model tuned in `folder` for the patches to come."""
        teacher = TunedTeacher(work, self.options, work.foundation_of(self))
        teacher.load(folder)
        teacher.freeze()
        self._teacher = [teacher]

    def ignored(self, case: str) -> bool:
        """Whether patches of this case get no label."""
        return False

    def guessed(self, unlabelled: Unlabelled) -> Mapping[str, torch.Tensor]:
        """Cut from the labels of whole volumes, or made now by the tuned model, with nothing in rows that get no label."""
        if self.options.labels == "volume":
            return super().guessed(unlabelled)
        probability = self._teacher[0].on_patch(unlabelled.image)
        weight, label = probability.max(1)
        for row, case in enumerate(unlabelled.case):
            if self.ignored(case):
                probability[row], weight[row], label[row] = 0, 0, IGNORE_LABEL
        return {
            f"{self.name}/{key}": x for key, x in (("probability", probability), ("weight", weight), ("label", label))
        }


def tunable_of(work: Workspace, term: Term) -> Tunable:
    """The foundation model a term tunes, as it is by itself.

    Raises:
        ConfigError: it cannot be tuned.
    """
    model = work.model(name := work.foundation_of(term))
    if not isinstance(model, Tunable):
        raise ConfigError(
            f"the foundation model {name!r} answers prompts but cannot be tuned: choose one that can (scarceseg foundations list)"
        )
    return model


def guessing(work: Workspace, name: str, other: str) -> PseudoLabelTerm:
    """Another term that guesses labels before this one.

    Raises:
        ConfigError: no such term before this one, or it keeps no guesses.
    """
    terms = build_terms(work.config.method, work.config.terms, work.classes)
    names = list(terms)
    source = terms.get(other)
    if not isinstance(source, PseudoLabelTerm) or names.index(other) > names.index(name) or not source.field_kinds:
        raise ConfigError(
            f"terms.{name}.learn_from: expected a term that guesses labels and stands before {name!r} in the sum, such as "
            f"atlas in atlas+{name}, got {other!r} in {work.config.method!r}"
        )
    return source


def guessed_sources(work: Workspace, name: str, other: str | None) -> list[Source]:
    """The unlabelled volumes with the guesses of another term, to learn from.

    Raises:
        ConfigError: as `guessing`.
    """
    if other is None:
        return []
    labels = guessing(work, name, other).labels(work)
    return [Source(case.name, case.image, labels.label(case.name)) for case in work.unlabelled]


def warn_empty(work: Workspace, name: str, labels: PseudoLabels) -> None:
    """Add a warning when guesses hold no foreground."""
    empty = [case.name for case in work.unlabelled if not np.any(labels.label(case.name) > 0)]
    if empty:
        work.warnings.append(
            f"{name}: no foreground was found in {len(empty)} of {len(work.unlabelled)} unlabelled volumes "
            f"({', '.join(empty[:5])}{' ...' if len(empty) > 5 else ''}): look at them, or tune longer"
        )
