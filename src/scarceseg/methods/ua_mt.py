"""UA-MT: Mean Teacher on the voxels where the teacher is sure."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import nn

from scarceseg.functional.losses import softmax_mse
from scarceseg.functional.ramps import uamt_threshold
from scarceseg.functional.uncertainty import entropy, masked_mean
from scarceseg.methods.base import METHODS, TermOptions
from scarceseg.methods.mean_teacher import MeanTeacher, MeanTeacherOptions
from scarceseg.types import ImageBatch, Probability, Step

if TYPE_CHECKING:
    from scarceseg.engine.workspace import Workspace


class UaMtOptions(MeanTeacherOptions):
    """Options of UA-MT.

    Attributes:
        passes: Monte-Carlo passes of the teacher with dropout and noise; with ``teacher_norm: running`` they differ by the noise
            alone.
        passes_per_forward: how many of them share one forward pass (and its batch statistics); 2 as published.
    """

    passes: int = Field(8, ge=1)
    passes_per_forward: int = Field(2, ge=1)


@METHODS.register("ua-mt")
class UaMt(MeanTeacher):
    """Uncertainty-aware Mean Teacher (Yu et al. 2019, eq. 2-4).

    ``L = sum_v 1(H_v < u) sum_c (p - p')^2 / (K sum_v 1(H_v < u))`` with H the entropy of the mean over `passes` noisy
    dropout passes and ``u = (0.75 + 0.25 ramp(t, T)) ln K``.

    Differs from the authors' code: ln K in place of ln 2, so that it holds for any class count. A network without dropout, as
    the V-Net is with several classes unless told otherwise, has passes that differ by their noise alone; a warning says so.
    """

    Options: ClassVar[type[TermOptions]] = UaMtOptions
    options: UaMtOptions

    def initialise(self, student: nn.Module, work: Workspace) -> None:
        """Say so where the passes have no dropout to differ by."""
        if not any(isinstance(layer, nn.Dropout | nn.Dropout3d) and layer.p > 0 for layer in student.modules()):
            work.warnings.append(
                f"{self.name} looks {self.options.passes} times at each patch with dropout, which this network does not have, so "
                "that the looks differ by noise alone; vnet and unet3d have it with --set network.args.dropout=true"
            )

    @torch.no_grad()
    def uncertainty(self, x: ImageBatch, step: Step) -> torch.Tensor:
        """Entropy of the mean probability of the passes, nats, ``[B, 1, X, Y, Z]``."""
        mean: Probability | None = None
        left = self.options.passes
        while left:
            share = min(left, self.options.passes_per_forward)
            repeated = x.repeat(share, *[1] * (x.ndim - 1))
            probability = self.teacher(self.perturb(repeated, step.generator)).softmax(1)
            part = probability.unflatten(0, (share, x.shape[0])).sum(0) / self.options.passes
            mean = part if mean is None else mean + part
            left -= share
        assert mean is not None
        return entropy(mean)

    def loss(self, step: Step) -> torch.Tensor:
        """Masked mean squared difference of probabilities, in [0, 1]; 0 when no voxel is sure enough."""
        x, logits = self.rows(step)
        target = self.teach(x, step)
        sure = self.uncertainty(x, step) < uamt_threshold(step.iteration, step.total, self.classes)
        return masked_mean(softmax_mse(logits, target), sure)
