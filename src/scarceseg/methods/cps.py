"""CPS: two networks, each of which learns what the other calls a voxel."""

from __future__ import annotations

import copy
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from scarceseg.functional.losses import cross_entropy, segmentation_loss
from scarceseg.methods.base import METHODS, Parts, RampName, Term, TermOptions
from scarceseg.networks.base import reinitialise
from scarceseg.types import Step


class CpsOptions(TermOptions):
    """Options of cross pseudo supervision.

    Attributes:
        samples: rows the networks teach each other on; the paper has "all", the published 3D scripts "unlabelled".
        background: the second network's Dice averages over class 0 too.
    """

    weight: float = Field(0.1, ge=0)
    ramp: RampName = "laine"
    samples: Literal["unlabelled", "all"] = "unlabelled"
    background: bool = False


@METHODS.register("cps")
class Cps(Term):
    """Cross pseudo supervision (Chen et al., CVPR 2021, sec. 3): ``CE(p1, argmax p2) + CE(p2, argmax p1)``.

    The second network has the student's architecture and initial weights of its own, sees the same rows, and learns from the
    labels by ``0.5 (CE + Dice)`` whatever the ramp. No gradient passes through an arg-max. Only the student is kept for use.

    Differs from the authors' code: the weight is 0.1 and ramps up, as the 3D benchmarks have it; it is 1.5 there.
    """

    Options: ClassVar[type[TermOptions]] = CpsOptions
    options: CpsOptions
    second: nn.Module

    def attach(self, student: nn.Module) -> None:
        """Make the second network."""
        self.second = copy.deepcopy(student)
        reinitialise(self.second)

    def loss(self, step: Step) -> Parts:
        """Cross pseudo supervision (ramped) and the supervision of the second network (fixed), both >= 0."""
        if step.unlabelled is None or step.logits_u is None:
            raise ValueError(f"term {self.name!r} needs unlabelled rows in the step, got none")
        first = torch.cat([step.logits_l, step.logits_u])
        second = self.second(torch.cat([step.labelled.image, step.unlabelled.image])).float()
        rows_l = len(step.logits_l)
        start = 0 if self.options.samples == "all" else rows_l
        mine, theirs = first[start:], second[start:]
        cross = cross_entropy(mine, theirs.argmax(1)) + cross_entropy(theirs, mine.argmax(1))
        own = segmentation_loss(second[:rows_l], step.labelled.label, background=self.options.background)
        return Parts(cross, own)
