"""DTC: the segmentation must agree with the one that a regressed distance map implies."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from scarceseg.functional.distance import signed_distance
from scarceseg.functional.uncertainty import masked_mean
from scarceseg.methods.base import METHODS, Parts, RampName, Term, TermOptions
from scarceseg.networks.base import channels_of, require_halves
from scarceseg.types import IGNORE_LABEL, Step


class DtcOptions(TermOptions):
    """Options of DTC.

    Attributes:
        weight: of the consistency; 1 as published.
        steepness: k of the smooth step from distances to masks.
        regression: weight of the distance maps' supervised loss.
        samples: rows the consistency is taken on; the paper has all.
    """

    weight: float = Field(1.0, ge=0)
    ramp: RampName = "laine"
    steepness: float = Field(1500.0, gt=0)
    regression: float = Field(0.3, ge=0)
    samples: Literal["unlabelled", "all"] = "all"


@METHODS.register("dtc")
class Dtc(Term):
    """Dual-task consistency (Luo et al., AAAI 2021).

    A second head (1x1x1 convolution, tanh) regresses the signed distance map z_c of every foreground class c, negative
    inside. ``L = mean((sigmoid(-k z_c) - p_c)^2)`` over foreground classes and voxels; ``0.3 mean((z_c - z*_c)^2)`` on
    labelled rows is added as it is, with z* from `scarceseg.functional.distance.signed_distance`.

    Where the paper has one foreground class, here each has a map of its own, as its authors advise (ours: compared with the
    softmax). Voxels without a label are left out of the regression. Differs from the authors' code: no dropout in front
    of the second head.
    """

    Options: ClassVar[type[TermOptions]] = DtcOptions
    options: DtcOptions
    shares_features = True
    head: nn.Conv3d

    def attach(self, student: nn.Module) -> None:
        """Make the second head on the decoder's finest features."""
        finest = channels_of(require_halves(student, self.name))[1][0]
        self.head = nn.Conv3d(finest, self.classes - 1, kernel_size=1)

    def distances(self, step: Step, rows: str) -> torch.Tensor:
        """Regressed distance maps ``[B, K - 1, X, Y, Z]`` in (-1, 1)."""
        return self.head(step.decoded[rows][0]).float().tanh()

    def disagreement(self, distances: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """``(sigmoid(-k z_c) - p_c)^2`` per foreground class and voxel."""
        return (torch.sigmoid(-self.options.steepness * distances) - logits.softmax(1)[:, 1:]).square()

    def loss(self, step: Step) -> Parts:
        """Consistency in [0, 1], and the supervision of the distance maps."""
        assert step.logits_u is not None
        distances_l = self.distances(step, "labelled")
        unequal = [self.disagreement(self.distances(step, "unlabelled"), step.logits_u)]
        if self.options.samples == "all":
            unequal.append(self.disagreement(distances_l, step.logits_l))
        label = step.labelled.label
        error = (distances_l - signed_distance(label, self.classes)).square()
        supervised = masked_mean(error, (label != IGNORE_LABEL).unsqueeze(1))
        return Parts(torch.cat(unequal).mean(), self.options.regression * supervised)
