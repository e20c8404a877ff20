"""Mean Teacher: the student must agree with its own weight average under input noise."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from scarceseg.functional.losses import softmax_mse
from scarceseg.functional.noise import clipped_gaussian
from scarceseg.methods.base import METHODS, RampName, Term, TermOptions
from scarceseg.networks.ema import EmaTeacher
from scarceseg.types import ImageBatch, Logits, Probability, Step


class MeanTeacherOptions(TermOptions):
    """Options of Mean Teacher.

    Attributes:
        decay: upper limit of the average's factor.
        teacher_norm: "batch" (published) or "running", see `scarceseg.networks.ema.EmaTeacher`.
        noise_std, noise_limit: of the teacher's input noise, in units of normalised intensity.
        samples: rows the consistency is taken on; the UA-MT and SFR scripts have "all", the equation "unlabelled".
    """

    weight: float = Field(0.1, ge=0)
    ramp: RampName = "laine"
    decay: float = Field(0.99, ge=0, lt=1)
    teacher_norm: Literal["batch", "running"] = "batch"
    noise_std: float = Field(0.1, ge=0)
    noise_limit: float = Field(0.2, ge=0)
    samples: Literal["unlabelled", "all"] = "unlabelled"


@METHODS.register("mean-teacher")
class MeanTeacher(Term):
    """``mean((p_u - p'_u)^2)`` with the EMA teacher on noisy input (Tarvainen & Valpola 2017, eq. 1)."""

    Options: ClassVar[type[TermOptions]] = MeanTeacherOptions
    options: MeanTeacherOptions
    teacher: EmaTeacher

    def attach(self, student: nn.Module) -> None:
        """Make the teacher: a copy of the student."""
        self.teacher = EmaTeacher(student, self.options.decay, self.options.teacher_norm)

    def perturb(self, x: ImageBatch, generator: torch.Generator) -> ImageBatch:
        """Input with noise, normal(0, 0.1) clipped to +-0.2 by default."""
        return x + clipped_gaussian(x, generator, self.options.noise_std, self.options.noise_limit)

    def rows(self, step: Step) -> tuple[ImageBatch, Logits]:
        """Images and student logits of the rows the consistency is taken on."""
        if step.unlabelled is None or step.logits_u is None:
            raise ValueError(f"term {self.name!r} needs unlabelled rows in the step, got none")
        if self.options.samples == "unlabelled":
            return step.unlabelled.image, step.logits_u
        images = torch.cat([step.labelled.image, step.unlabelled.image])
        return images, torch.cat([step.logits_l, step.logits_u])

    def teach(self, x: ImageBatch, step: Step) -> Probability:
        """The teacher's probabilities on noisy rows."""
        return self.teacher(self.perturb(x, step.generator)).softmax(1)

    def loss(self, step: Step) -> torch.Tensor:
        """Mean squared difference of probabilities, in [0, 1]."""
        x, logits = self.rows(step)
        return softmax_mse(logits, self.teach(x, step)).mean()

    def after_update(self, student: nn.Module, iteration: int) -> None:
        """The teacher follows."""
        self.teacher.update(student, iteration)
