"""Supervised term: cross-entropy and Dice on the labelled patches."""

from __future__ import annotations

from typing import ClassVar

import torch

from scarceseg.functional.losses import segmentation_loss
from scarceseg.methods.base import METHODS, Term, TermOptions
from scarceseg.types import Step


class SupervisedOptions(TermOptions):
    """Options of the supervised term.

    Attributes:
        background: average the Dice over class 0 too (SSL4MIS, SFR); False is UA-MT's form.
        smooth: constant in the numerator and the denominator of the Dice.
    """

    background: bool = False
    smooth: float = 1e-5


@METHODS.register("supervised")
class Supervised(Term):
    """``0.5 (CE + Dice)`` on labelled rows (UA-MT protocol, Yu et al. 2019, sec. 3)."""

    Options: ClassVar[type[TermOptions]] = SupervisedOptions
    reads = frozenset({"labelled"})
    options: SupervisedOptions

    def loss(self, step: Step) -> torch.Tensor:
        """Scalar, >= 0."""
        return segmentation_loss(
            step.logits_l, step.labelled.label, background=self.options.background, smooth=self.options.smooth
        )
