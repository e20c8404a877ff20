"""ICT: what the student says of a mixture must be the mixture of what its weight average says of the parts."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn

from scarceseg.functional.losses import softmax_mse
from scarceseg.methods.base import METHODS, RampName, Term, TermOptions
from scarceseg.networks.ema import EmaTeacher
from scarceseg.types import ImageBatch, Labelled, Step, Unlabelled


class IctOptions(TermOptions):
    """Options of interpolation consistency.

    Attributes:
        decay: upper limit of the average's factor.
        teacher_norm: "batch" (published) or "running", see `scarceseg.networks.ema.EmaTeacher`.
        alpha: both parameters of the Beta distribution the share of a row is drawn from; small values mix little.
    """

    weight: float = Field(0.1, ge=0)
    ramp: RampName = "laine"
    decay: float = Field(0.99, ge=0, lt=1)
    teacher_norm: Literal["batch", "running"] = "batch"
    alpha: float = Field(0.2, gt=0)


@METHODS.register("ict")
class Ict(Term):
    """Interpolation consistency (Verma et al., IJCAI 2019, sec. 2): ``mean((f(l a + (1 - l) b) - (l f'(a) + (1 - l) f'(b)))^2)``.

    Every unlabelled row a is mixed with the next one b, the last with the first; l is drawn from Beta(0.2, 0.2) for each pair.
    A lone unlabelled row is mixed with the image of a labelled one. (ours) The teacher sees the rows without noise.
    """

    Options: ClassVar[type[TermOptions]] = IctOptions
    predicts_unlabelled = False
    options: IctOptions
    teacher: EmaTeacher
    _mixed: tuple[Unlabelled, torch.Tensor] | None = None

    def attach(self, student: nn.Module) -> None:
        """Make the teacher: a copy of the student."""
        self.teacher = EmaTeacher(student, self.options.decay, self.options.teacher_norm)

    def extra_inputs(
        self, labelled: Labelled, unlabelled: Unlabelled | None, generator: torch.Generator
    ) -> ImageBatch | None:
        """One mixture for each unlabelled row; which shares were drawn is kept until the loss of the same step."""
        if unlabelled is None:
            return None
        x = parts(labelled, unlabelled)
        share = beta(self.options.alpha, len(unlabelled.image), generator).to(x)
        self._mixed = unlabelled, share
        return mix(x, share)

    def loss(self, step: Step) -> torch.Tensor:
        """Mean squared difference of probabilities, in [0, 1]."""
        if step.unlabelled is None:
            raise ValueError(f"term {self.name!r} needs unlabelled rows in the step, got none")
        if self._mixed is None or self._mixed[0] is not step.unlabelled:
            raise ValueError(f"term {self.name!r}: extra_inputs has not been called for these rows")
        target = self.teacher(parts(step.labelled, step.unlabelled)).softmax(1)
        return softmax_mse(step.extra[self.name], mix(target, self._mixed[1])).mean()

    def after_update(self, student: nn.Module, iteration: int) -> None:
        """The teacher follows."""
        self._mixed = None
        self.teacher.update(student, iteration)


def parts(labelled: Labelled, unlabelled: Unlabelled) -> ImageBatch:
    """What is mixed: the unlabelled rows, and a labelled image when there is only one of them."""
    rows = unlabelled.image
    return rows if len(rows) > 1 else torch.cat([rows, labelled.image[:1]])


def mix(rows: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """``l r_i + (1 - l) r_{i+1}`` for as many rows i as there are shares ``[N]``."""
    share = share.view(-1, *[1] * (rows.ndim - 1))
    count = len(share)
    return share * rows[:count] + (1.0 - share) * rows.roll(-1, 0)[:count]


def beta(alpha: float, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` draws from Beta(alpha, alpha), ``[N]`` float32 on the CPU; they follow from the generator's state."""
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    return torch.from_numpy(np.random.default_rng(seed).beta(alpha, alpha, count).astype(np.float32))
