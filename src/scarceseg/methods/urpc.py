"""URPC: predictions at several scales of the decoder must agree, most where they do so already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from scarceseg.errors import ConfigError
from scarceseg.functional.losses import segmentation_loss
from scarceseg.methods.base import METHODS, Parts, RampName, Term, TermOptions
from scarceseg.networks.base import channels_of, require_halves
from scarceseg.types import Logits, Step

if TYPE_CHECKING:
    from scarceseg.engine.workspace import Workspace


class UrpcOptions(TermOptions):
    """Options of URPC.

    Attributes:
        scales: number of predictions, the student's own included; from the finest level of the decoder on.
        supervision: weight of the supervised loss of the coarser predictions.
    """

    weight: float = Field(0.1, ge=0)
    ramp: RampName = "laine"
    scales: int = Field(4, ge=2)
    supervision: float = Field(1.0, ge=0)


def pyramid_consistency(logits: Sequence[Logits]) -> torch.Tensor:
    """``1/S sum_s mean(d_s^2 e^-v_s) / mean(e^-v_s) + mean(v_s)`` (Luo et al. 2022, eq. 4 for v_s).

    ``d_s = p_s - m`` with m the mean of the S probabilities and ``v_s = sum_c p_s ln(p_s / m)`` their divergence from it,
    in [0, ln S]; means are over voxels, and of d over classes too. The second summand keeps v from growing.

    Args:
        logits: S times ``[B, K, ...]``.
    """
    probabilities = [x.softmax(1) for x in logits]
    mean = torch.stack(probabilities).mean(0)
    # The maximum guards the logarithm; a mean below it belongs to probabilities that count for nothing.
    log_mean = mean.clamp_min(1e-12).log()
    parts = []
    for x, p in zip(logits, probabilities, strict=True):
        # Rounding can leave a divergence slightly below its minimum.
        divergence = (p * (x.log_softmax(1) - log_mean)).sum(1, keepdim=True).clamp_min(0.0)
        certainty = (-divergence).exp()
        parts.append(((p - mean).square() * certainty).mean() / certainty.mean() + divergence.mean())
    return torch.stack(parts).mean()


@METHODS.register("urpc")
class Urpc(Term):
    """Uncertainty-rectified pyramid consistency (Luo et al., MICCAI 2021, MedIA 2022).

    Coarser levels of the student's decoder get heads of their own (1x1x1 convolution, trilinear to full size); with the
    student's prediction they make the pyramid of `pyramid_consistency`, taken on unlabelled rows. The mean of the heads'
    ``0.5 (CE + Dice)`` on labelled rows is added as it is.

    Differs from the authors' code: the divergence is that of a scale from the mean, as the paper says, not of the mean from
    a scale; no dropout in front of the heads.
    """

    Options: ClassVar[type[TermOptions]] = UrpcOptions
    options: UrpcOptions
    shares_features = True
    heads: nn.ModuleList

    def check(self, student: nn.Module, work: Workspace) -> None:
        """The decoder has to have enough levels."""
        self.levels(student)

    def levels(self, student: nn.Module) -> list[int]:
        """Channels of the decoder's levels that make predictions, fine to coarse.

        Raises:
            ConfigError: the decoder has fewer levels than `scales`.
        """
        levels = channels_of(require_halves(student, self.name))[1]
        if self.options.scales > len(levels):
            raise ConfigError(
                f"{self.name}: scales is at most {len(levels)}, the number of levels of this network's decoder, "
                f"got {self.options.scales}"
            )
        return levels[: self.options.scales]

    def attach(self, student: nn.Module) -> None:
        """Make the heads."""
        self.heads = nn.ModuleList(
            nn.Conv3d(channels, self.classes, kernel_size=1) for channels in self.levels(student)[1:]
        )

    def coarse(self, decoded: list[torch.Tensor]) -> list[Logits]:
        """Logits of the term's heads at full size, fine to coarse."""
        size = decoded[0].shape[2:]
        return [
            F.interpolate(head(level).float(), size=size, mode="trilinear", align_corners=False)
            for head, level in zip(self.heads, decoded[1:], strict=False)
        ]

    def loss(self, step: Step) -> Parts:
        """Consistency >= 0, and the heads' own supervision."""
        assert step.logits_u is not None
        consistency = pyramid_consistency([step.logits_u, *self.coarse(step.decoded["unlabelled"])])
        supervised = [segmentation_loss(x, step.labelled.label) for x in self.coarse(step.decoded["labelled"])]
        return Parts(consistency, self.options.supervision * torch.stack(supervised).mean())
