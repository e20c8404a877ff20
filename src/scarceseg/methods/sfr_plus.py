"""SFR+: the student's sure volumes join the fine-tuning of the foundation model, which labels the others anew."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator
from torch import nn

from scarceseg.data.sampling import Source
from scarceseg.files import write_text
from scarceseg.methods.base import METHODS, TermOptions
from scarceseg.methods.fine_tuning import TunedTeacher
from scarceseg.methods.pseudo_labels import PseudoLabels, surest_of
from scarceseg.methods.sfr import Sfr, SfrOptions, warn_empty

if TYPE_CHECKING:
    from pathlib import Path

    from scarceseg.data.prepare import PreparedCase
    from scarceseg.engine.workspace import Workspace

SURE = "sure.json"


class SfrPlusOptions(SfrOptions):
    """Options of SFR+.

    Attributes:
        threshold: tau of the confidence, 0.985 as published.
        share: of the pool that passes in a round, the surest volumes first, whatever their confidence is, those in which the
            student finds nothing never; None goes by `threshold`, as published. (ours: how high confidences are depends on the
            network and on how much of a volume is background)
        measure: confidence over the whole "volume" (published) or over the predicted "foreground" (ours).
        rounds: the run is cut into so many equal parts; the first is plain SFR. (ours: the papers give no schedule)
        refresh_iterations: steps of fine-tuning in a later round, from the weights of the round before; None is a third of
            the first round's.
        sure: what the student learns on a sure volume: nothing ("ignore", as published: pseudo-labels go to the unsure), or
            its own prediction ("student").
    """

    threshold: float = Field(0.985, ge=0, le=1)
    share: float | None = Field(None, gt=0, lt=1)
    measure: Literal["volume", "foreground"] = "volume"
    rounds: int = Field(3, ge=1)
    refresh_iterations: int | None = Field(None, ge=1)
    sure: Literal["ignore", "student"] = "ignore"

    def idle(self) -> dict[str, str]:
        """Those of later rounds, where there is one alone; the threshold beside a share."""
        found = super().idle() | ({} if self.share is None else {"threshold": f"with share: {self.share:g}"})
        later = ("threshold", "share", "measure", "refresh_iterations", "sure")
        return found | (dict.fromkeys(later, "with rounds: 1") if self.rounds == 1 else {})

    @model_validator(mode="after")
    def _own(self) -> SfrPlusOptions:
        if self.labels == "crop" and self.sure == "student":
            raise ValueError(
                "sure: 'student' needs the student's labels of whole volumes, labels: crop has none; expected one or the other"
            )
        return self


@METHODS.register("sfr+")
class SfrPlus(Sfr):
    """SFR with confidence-selective alternation (Li et al., IEEE TMI 2025, SFR+).

    Before each round but the first the student labels the pool. A volume with confidence
    ``C = mean_v max_c p(c) >= tau`` joins the fine-tuning set with the student's label; the others get fresh pseudo-labels of
    the tuned model.

    Differs from the paper: the sure volumes together have half of the rows of a batch of the tuning, however many they are; C
    counts easy background, so the confidence over the foreground is reported beside it and can take its place (`measure`); a
    round in which none or all volumes pass is warned of; a share of the pool can take the place of the threshold (`share`).
    """

    Options: ClassVar[type[TermOptions]] = SfrPlusOptions
    options: SfrPlusOptions

    def rounds(self, total: int) -> list[int]:
        """``T k / rounds`` for k = 1, 2, ..."""
        return sorted({total * k // self.options.rounds for k in range(1, self.options.rounds)} - {0})

    def labels(self, work: Workspace) -> PseudoLabels:
        """Those of the newest round."""
        newest = getattr(self, "_newest", None)
        return super().labels(work) if newest is None else PseudoLabels(newest)

    def refresh(self, iteration: int, student: nn.Module, work: Workspace) -> None:
        """One round; what an earlier call has left is taken as it is."""
        number = self.rounds(work.config.iterations).index(iteration) + 1
        folder = work.folder(self.name, f"round{number}")
        work.once(folder, lambda: self._round(work, student, folder, number))
        self._newest = folder
        if self.options.labels == "crop":
            self.take_along(work, folder)
            self._ignored = frozenset(json.loads((folder / SURE).read_text(encoding="utf-8")))

    def _round(self, work: Workspace, student: nn.Module, folder: Path, number: int) -> None:
        own = PseudoLabels(folder / "student")
        sure = self._sure(work, student, own, number)
        teacher = TunedTeacher(work, self.options, work.foundation_of(self))
        before = work.folder(self.name, f"round{number - 1}" if number > 1 else "tune")
        teacher.load(before)
        if sure:
            joined = [
                Source(case.name, case.image, own.label(case.name)) for case in work.unlabelled if case.name in sure
            ]
            steps = self.options.refresh_iterations or max(teacher.iterations // 3, 1)
            teacher.tune(folder, f"{self.name}-round{number}", [*self._guessed(work), *joined], steps)
        else:
            teacher.save(folder)
        write_text(folder / SURE, json.dumps(sorted(sure)))
        if self.options.labels == "crop":
            if work.fabric.is_global_zero:
                own.drop_probabilities(case.name for case in work.unlabelled)
            return
        labels = PseudoLabels(folder)

        def one(case: PreparedCase) -> None:
            students = own.notes(case.name)
            notes = {f"student_{key}": students[key] for key in ("confidence", "foreground_confidence")}
            if case.name not in sure:
                probability = teacher.probability(case)
                self.keep(labels, case.name, probability, probability.max(0), notes)
            elif self.options.sure == "student":
                probability = np.asarray(own.probability(case.name), dtype=np.float32)
                self.keep(labels, case.name, probability, probability.max(0), {"sure": True, **notes})
            else:
                labels.write_nothing(case.name, own.probability(case.name), {"sure": True, **notes})

        self.each(work, f"label, round {number}", work.unlabelled, labels, one)
        if work.fabric.is_global_zero:
            chosen = (
                {"threshold": self.options.threshold} if self.options.share is None else {"share": self.options.share}
            )
            about = {**self.about(work, teacher), **chosen, "measure": self.options.measure}
            labels.finish([case.name for case in work.unlabelled], **about, sure=sorted(sure))
            own.drop_probabilities(case.name for case in work.unlabelled)
        warn_empty(work, f"{self.name}, round {number}", labels)

    def ignored(self, case: str) -> bool:
        """Whether the patches of a sure volume are left out, when patches are labelled one by one."""
        return self.options.sure == "ignore" and case in getattr(self, "_ignored", frozenset())

    def _sure(self, work: Workspace, student: nn.Module, own: PseudoLabels, number: int) -> set[str]:
        """Names of the volumes the student is sure of; its predictions are kept in `own`."""
        network = work.as_saved(student)

        def one(case: PreparedCase) -> None:
            own.write(case.name, work.predict(network, case), largest_component=self.options.largest_component)

        self.each(work, f"student, round {number}", work.unlabelled, own, one)
        names = [case.name for case in work.unlabelled]
        rows = own.finish(names) if work.fabric.is_global_zero else {name: own.notes(name) for name in names}
        key = "confidence" if self.options.measure == "volume" else "foreground_confidence"
        if self.options.share is not None:
            found = surest_of(rows, key, self.options.share)
            if not found:
                work.warnings.append(
                    f"{self.name}: the student finds nothing in any unlabelled volume, so round {number} adds nothing to the "
                    "fine-tuning: train longer before it (fewer rounds, more iterations)"
                )
            return found
        sure = {name for name in names if rows[name][key] >= self.options.threshold}
        if len(sure) in (0, len(names)):
            spread = sorted(rows[name][key] for name in names)
            everything = (
                "gives no pseudo-labels"
                if self.options.sure == "ignore"
                else "gives the student its own predictions alone"
            )
            work.warnings.append(
                f"{self.name}: {'every' if sure else 'no'} unlabelled volume passes the confidence threshold "
                f"{self.options.threshold:g} ({key} lies between {spread[0]:.4f} and {spread[-1]:.4f}), so a round "
                f"{everything if sure else 'adds nothing to the fine-tuning'}: "
                f"choose terms.{self.name}.threshold in between, measure: foreground, or a share of the volumes"
            )
        return sure
