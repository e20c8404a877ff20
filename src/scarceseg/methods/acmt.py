"""AC-MT: Mean Teacher on the voxels that are ambiguous."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from scarceseg.functional.ambiguity import Pruning, label_issues, nearest_prototype
from scarceseg.functional.losses import softmax_mse
from scarceseg.functional.ramps import sigmoid_rampup
from scarceseg.functional.uncertainty import entropy, masked_mean
from scarceseg.methods.base import METHODS, TermOptions
from scarceseg.methods.ua_mt import UaMt, UaMtOptions
from scarceseg.networks.base import require_halves
from scarceseg.types import ImageBatch, Probability, Step

Criterion = Literal["entropy", "uncertainty", "prototype", "label-noise"]
Share = Annotated[float, Field(ge=0, le=1)]


class AcMtOptions(UaMtOptions):
    """Options of AC-MT.

    Attributes:
        criteria: what makes a voxel ambiguous, one or more of "entropy", "uncertainty", "prototype", "label-noise"; the paper
            takes one at a time.
        combine: with several, a voxel counts where "any" or "all" of them hold. (ours)
        entropy_threshold: first and last share of ln K that the student's entropy has to reach.
        uncertainty_threshold: the same for the entropy of the teacher's `passes`.
        prune: rule of confident learning, see `scarceseg.functional.ambiguity.label_issues`.
    """

    criteria: list[Criterion] = Field(["entropy"], min_length=1)
    combine: Literal["any", "all"] = "any"
    entropy_threshold: tuple[Share, Share] = (0.75, 0.95)
    uncertainty_threshold: tuple[Share, Share] = (0.75, 0.90)
    prune: Pruning = "both"

    def idle(self) -> dict[str, str]:
        """Those of criteria that are not asked."""
        of = {"entropy": ["entropy_threshold"], "uncertainty": ["uncertainty_threshold", "passes", "passes_per_forward"],
              "label-noise": ["prune"]}  # fmt: skip
        unused = [option for kind, options in of.items() if kind not in self.criteria for option in options]
        unused += ["combine"] if len(self.criteria) == 1 else []
        return super().idle() | dict.fromkeys(unused, f"with criteria: [{', '.join(self.criteria)}]")


@METHODS.register("acmt")
class AcMt(UaMt):
    """Ambiguity-selective consistency (Xu et al., MedIA 2023): ``sum_v m sum_c (p - p')^2 / (K sum_v m)``, m = 1 where ambiguous.

    Four criteria: the student's entropy ``H(p) >= u ln K``; the entropy of the mean of the teacher's Monte-Carlo passes likewise;
    the nearest class prototype in the teacher's finest decoder features is of another class than the student's; confident
    learning finds the student's class wrong, given the teacher's probabilities. ``u`` goes from its first to its last value
    with ``exp(-5 (1 - t/T)^2)``.

    Differs from the authors' code: ln K in place of ln 2 and any number of classes; the Monte-Carlo passes are the teacher's
    (the script runs the student); every criterion is averaged over K and the counted voxels (the script's uncertainty
    criterion is twice that); prototypes come from one pass of the finest features, without the mask of sigmoid spread over ten
    passes and without the entropy term that the script adds there; when no voxel counts the loss is 0, where the script of
    the fourth criterion falls back to plain Mean Teacher.
    """

    Options: ClassVar[type[TermOptions]] = AcMtOptions
    options: AcMtOptions

    def attach(self, student: nn.Module) -> None:
        """Make the teacher.

        Raises:
            ConfigError: prototypes are asked for and the network shows no decoder.
        """
        if "prototype" in self.options.criteria:
            require_halves(student, f"{self.name} with criterion 'prototype'")
        super().attach(student)

    def threshold(self, between: tuple[float, float], step: Step) -> float:
        """Entropy that has to be reached at iteration t, nats."""
        first, last = between
        return (first + (last - first) * sigmoid_rampup(step.iteration, step.total)) * math.log(self.classes)

    @torch.no_grad()
    def ambiguous(self, x: ImageBatch, student: Probability, step: Step) -> torch.Tensor:
        """Which voxels count, ``[B, 1, X, Y, Z]`` bool."""
        options, label = self.options, student.argmax(1)
        masks = []
        if "entropy" in options.criteria:
            masks.append(entropy(student) >= self.threshold(options.entropy_threshold, step))
        if "uncertainty" in options.criteria:
            masks.append(self.uncertainty(x, step) >= self.threshold(options.uncertainty_threshold, step))
        if "prototype" in options.criteria:
            logits, decoded = self.teacher.features(x)
            masks.append((nearest_prototype(decoded[0], logits.softmax(1)) != label)[:, None])
        if "label-noise" in options.criteria:
            masks.append(label_issues(label, self.teacher(x).softmax(1), options.prune)[:, None])
        stacked = torch.stack(masks)
        return stacked.any(0) if options.combine == "any" else stacked.all(0)

    def loss(self, step: Step) -> torch.Tensor:
        """Masked mean squared difference of probabilities, in [0, 1]; 0 when no voxel is ambiguous."""
        x, logits = self.rows(step)
        target = self.teach(x, step)
        return masked_mean(softmax_mse(logits, target), self.ambiguous(x, logits.detach().softmax(1), step))
