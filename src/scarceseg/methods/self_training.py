"""Self-training: a network taught on the labels labels the pool, and the next one learns from both."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from safetensors.torch import load_model, save_model
from torch import nn

from scarceseg.files import write_atomic
from scarceseg.methods.base import METHODS, Term, TermOptions, build_terms
from scarceseg.methods.pseudo_labels import PseudoLabelOptions, PseudoLabels, PseudoLabelTerm

if TYPE_CHECKING:
    from scarceseg.data.prepare import PreparedCase
    from scarceseg.engine.workspace import Workspace


class SelfTrainingOptions(PseudoLabelOptions):
    """Options of self-training.

    Attributes:
        rounds: how often the pool is labelled; the run's own training is what follows the last time.
        teacher_iterations: of every teacher; None is the run's.
    """

    rounds: int = Field(1, ge=1)
    teacher_iterations: int | None = Field(None, ge=1)


@METHODS.register("self-training")
class SelfTraining(PseudoLabelTerm):
    """``0.5 (CE + Dice)`` on the arg-max of an earlier network, in rounds (after Zou et al., ECCV 2018).

    Without the class balance of that paper. Stages: `teacher1` trains a fresh network on the labelled volumes, `label1`
    labels the pool with it, `teacher2` trains another on both, and so on. The run then trains the student on the
    labels of the last round.
    """

    Options: ClassVar[type[TermOptions]] = SelfTrainingOptions
    options: SelfTrainingOptions

    def stages(self) -> list[str]:
        """A teacher and its labels for every round."""
        return [f"{what}{number}" for number in range(1, self.options.rounds + 1) for what in ("teacher", "label")]

    def check(self, student: nn.Module, work: Workspace) -> None:
        """The processes have to share the labelled rows of the first teacher."""
        work.check_rows(f"{self.name}-teacher1", student, work.config.batch_labeled)

    def prepare(self, stage: str, work: Workspace) -> None:
        """Train the teacher of a round, or label the pool with it."""
        number = int(stage.removeprefix("teacher").removeprefix("label"))
        file = work.folder(self.name, f"teacher{number}") / "model.safetensors"
        network = work.build_student(f"{self.name}-teacher{number}")
        if stage.startswith("label"):
            load_model(network, file)
            self._teacher = [work.as_saved(network)]
            self.guess(work, stage, list(work.unlabelled), round=number)
            return
        name = f"{self.name}-{stage}"
        terms: dict[str, Term] = build_terms("supervised", supervised_options(work), work.classes)
        fields = {}
        if number > 1:
            terms[self.name] = self
            before = PseudoLabels(work.folder(self.name, f"label{number - 1}"))
            fields = {c.name: self.maps(before, c.name, work) for c in work.unlabelled}
        iterations = self.options.teacher_iterations or work.config.iterations
        work.fit(name, network, terms, work.patches(name, fields), iterations)
        if work.fabric.is_global_zero:
            write_atomic(file, lambda path: save_model(network, str(path)))
        work.discard(name)

    def probability_of(self, work: Workspace, case: PreparedCase) -> NDArray[np.float32]:
        """By the teacher of the round."""
        return work.predict(self._teacher[0], case)


def supervised_options(work: Workspace) -> dict[str, dict[str, object]]:
    """The run's options of the supervised term, for stages that train a network of their own."""
    options = work.config.terms.get("supervised")
    return {"supervised": options} if options else {}
