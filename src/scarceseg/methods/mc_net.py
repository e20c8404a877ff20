"""MC-Net: several decoders on one encoder, each of which learns the sharpened output of the others."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from scarceseg.functional.losses import segmentation_loss, softmax_mse
from scarceseg.methods.base import METHODS, Parts, RampName, Term, TermOptions
from scarceseg.networks.base import Decoder, require_halves
from scarceseg.types import Logits, Step


class McNetOptions(TermOptions):
    """Options of MC-Net.

    Attributes:
        decoders: how many in all, the student's own included: 2 is MC-Net, 3 MC-Net+.
        temperature: T of the sharpening.
        supervision: weight of the supervised loss of the term's own decoders.
        samples: rows the consistency is taken on; the paper has all.
    """

    weight: float = Field(0.1, ge=0)
    ramp: RampName = "laine"
    decoders: int = Field(3, ge=2)
    temperature: float = Field(0.1, gt=0)
    supervision: float = Field(1.0, ge=0)
    samples: Literal["unlabelled", "all"] = "all"


def mutual_consistency(logits: Sequence[Logits], temperature: float) -> torch.Tensor:
    """``sum_(i != j) mean((p_i - s_j)^2)`` with ``s = p^(1/T) / sum_c p_c^(1/T)`` (Wu et al. 2022).

    Args:
        logits: of each decoder, ``[B, K, ...]``.
        temperature: T.
    """
    # p^(1/T) normalised is the softmax of logits / T. It is a label here: no gradient goes through it (ours).
    sharp = [(x.detach() / temperature).softmax(1) for x in logits]
    pairs = [(x, s) for i, x in enumerate(logits) for j, s in enumerate(sharp) if i != j]
    return torch.stack([softmax_mse(x, s).mean() for x, s in pairs]).sum()


def replace_upsampling(module: nn.Module, mode: str) -> None:
    """Put interpolation and a 3x3x3 convolution in the place of every transposed convolution.

    Args:
        module: changed in place.
        mode: of the interpolation, "trilinear" or "nearest".
    """
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.ConvTranspose3d):
                convolution = nn.Conv3d(layer.in_channels, layer.out_channels, kernel_size=3, padding=1)
                setattr(parent, name, nn.Sequential(nn.Upsample(scale_factor=layer.stride, mode=mode), convolution))


@METHODS.register("mc-net")
class McNet(Term):
    """Mutual consistency (Wu et al., MICCAI 2021: two decoders; MedIA 2022, MC-Net+: three).

    `mutual_consistency` of all decoders on the student's features, and as it is the mean of the own decoders'
    ``0.5 (CE + Dice)`` on labelled rows. The decoders start from weights of their own and go up in different ways: the
    student's by its own, the others by trilinear and nearest-neighbour interpolation in turn. A network that interpolates
    anyway (``unet3d``) gets decoders that differ by their weights alone.

    Differs from the authors' code: no gradient through the sharpened output, and the own decoders together count as much
    in the supervision as the student's.
    """

    Options: ClassVar[type[TermOptions]] = McNetOptions
    options: McNetOptions
    shares_features = True
    decoders: nn.ModuleList

    def attach(self, student: nn.Module) -> None:
        """Make the further decoders."""
        network = require_halves(student, self.name)
        self.decoders = nn.ModuleList(Decoder(network) for _ in range(self.options.decoders - 1))
        for decoder, mode in zip(self.decoders, cycle(("trilinear", "nearest")), strict=False):
            replace_upsampling(decoder, mode)

    def loss(self, step: Step) -> Parts:
        """Consistency in [0, n (n - 1)] for n decoders, and the own decoders' supervision."""
        assert step.logits_u is not None
        # One pass for all rows, so that batch norm sees the batch the student saw.
        features = [torch.cat(rows) for rows in zip(step.encoded["labelled"], step.encoded["unlabelled"], strict=True)]
        rows_l = len(step.logits_l)
        own = [decoder(features).float() for decoder in self.decoders]
        supervised = torch.stack([segmentation_loss(x[:rows_l], step.labelled.label) for x in own]).mean()
        logits = [torch.cat([step.logits_l, step.logits_u]), *own]
        if self.options.samples == "unlabelled":
            logits = [x[rows_l:] for x in logits]
        return Parts(mutual_consistency(logits, self.options.temperature), self.options.supervision * supervised)
