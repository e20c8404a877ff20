"""CCT: decoders that see disturbed features must agree with the one that sees them as they are."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import nn

from scarceseg.functional.losses import segmentation_loss, softmax_mse
from scarceseg.methods.base import METHODS, Parts, RampName, Term, TermOptions
from scarceseg.networks.base import Decoder, require_halves
from scarceseg.types import Step


class CctOptions(TermOptions):
    """Options of CCT.

    Attributes:
        noise: largest relative change of a feature by the noise.
        dropout: share of features set to zero by the dropout.
        drop_low, drop_high: voxels whose mean activation passes this share of the highest one are erased; the share is
            drawn for each row and level anew.
        supervision: weight of the supervised loss of the term's own decoders.
    """

    weight: float = Field(0.1, ge=0)
    ramp: RampName = "laine"
    noise: float = Field(0.3, ge=0)
    dropout: float = Field(0.3, ge=0, lt=1)
    drop_low: float = Field(0.7, ge=0, le=1)
    drop_high: float = Field(0.9, ge=0, le=1)
    supervision: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> CctOptions:
        if self.drop_low > self.drop_high:
            raise ValueError(f"expected drop_low <= drop_high, got {self.drop_low:g} and {self.drop_high:g}")
        return self


def feature_noise(x: torch.Tensor, generator: torch.Generator, limit: float) -> torch.Tensor:
    """``x (1 + n)`` with n uniform in +-`limit`."""
    return x * (1.0 + torch.empty_like(x).uniform_(-limit, limit, generator=generator))


def feature_dropout(x: torch.Tensor, generator: torch.Generator, p: float) -> torch.Tensor:
    """Elements are set to zero with probability p, the others divided by ``1 - p``."""
    return x * torch.empty_like(x).bernoulli_(1.0 - p, generator=generator) / (1.0 - p)


def attention_drop(x: torch.Tensor, generator: torch.Generator, low: float, high: float) -> torch.Tensor:
    """Erase the most active places: where the mean over channels reaches a share g of its maximum, g ~ U(low, high)."""
    attention = x.detach().mean(1, keepdim=True)
    highest = attention.amax((2, 3, 4), keepdim=True)
    share = torch.empty_like(highest).uniform_(low, high, generator=generator)
    return x * (attention < share * highest)


@METHODS.register("cct")
class Cct(Term):
    """Cross-consistency training (Ouali et al., CVPR 2020) with three decoders of its own.

    ``L = 1/3 sum_k mean((p_k - p)^2)`` on unlabelled rows: p is the student's probability, without gradient, p_k that of a
    decoder on the encoder's features with noise, with dropout, or without their most active places. As in SSL4MIS all
    levels of the features are disturbed, and the decoders learn from the labelled rows too: the mean of their
    ``0.5 (CE + Dice)`` is added as it is.

    Differs from the authors' code: noise and erasing are drawn for each row of the batch instead of once for all.
    """

    Options: ClassVar[type[TermOptions]] = CctOptions
    options: CctOptions
    shares_features = True
    decoders: nn.ModuleList

    def attach(self, student: nn.Module) -> None:
        """Make the three decoders, freshly initialised."""
        network = require_halves(student, self.name)
        self.decoders = nn.ModuleList(Decoder(network) for _ in range(3))

    def disturb(self, features: list[torch.Tensor], generator: torch.Generator) -> list[list[torch.Tensor]]:
        """The features in three disturbed versions: noise, dropout, most active places erased."""
        o = self.options
        return [
            [feature_noise(x, generator, o.noise) for x in features],
            [feature_dropout(x, generator, o.dropout) for x in features],
            [attention_drop(x, generator, o.drop_low, o.drop_high) for x in features],
        ]

    def loss(self, step: Step) -> Parts:
        """Consistency in [0, 1], and the decoders' own supervision."""
        assert step.logits_u is not None
        target = step.logits_u.detach().softmax(1)
        # One pass for all rows, so that batch norm sees the batch the student saw.
        features = [torch.cat(rows) for rows in zip(step.encoded["labelled"], step.encoded["unlabelled"], strict=True)]
        versions = self.disturb(features, step.generator)
        consistency, supervised = [], []
        for decoder, version in zip(self.decoders, versions, strict=True):
            logits_l, logits_u = decoder(version).float().split([len(step.logits_l), len(target)])
            consistency.append(softmax_mse(logits_u, target).mean())
            supervised.append(segmentation_loss(logits_l, step.labelled.label))
        return Parts(torch.stack(consistency).mean(), self.options.supervision * torch.stack(supervised).mean())
