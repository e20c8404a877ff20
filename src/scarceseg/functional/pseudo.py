"""Losses against labels that somebody guessed, and how sure the guess was."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scarceseg.functional.losses import cross_entropy, dice_loss
from scarceseg.types import LabelBatch, Logits, Probability


def pseudo_label_loss(logits: Logits, label: LabelBatch, *, smooth: float = 1e-10) -> torch.Tensor:
    """``0.5 (CE + Dice)`` against hard pseudo-labels, the Dice over all classes (SFR, Li et al. 2025, re-training loss).

    Args:
        logits: ``[B, K, ...]``.
        label: ``[B, ...]`` any integer type, 255 is ignored.
        smooth: of the Dice; SFR's script has 1e-10.

    Returns:
        Scalar; its gradient is 0 where every voxel is ignored.
    """
    label = label.long()
    if bool((label == 255).all()):
        return logits.sum() * 0.0
    return 0.5 * (cross_entropy(logits, label) + dice_loss(logits.softmax(1), label, background=True, smooth=smooth))


def soft_label_loss(
    logits: Logits, target: Probability, weight: torch.Tensor | None = None, *, smooth: float = 1e-5
) -> torch.Tensor:
    """``0.5 (CE + Dice)`` against probabilities, each voxel counted with a weight. (ours)

    ``CE = -sum_v w sum_c q ln p / sum_v w`` and ``Dice = mean_c 1 - (2 sum w p q + s) / (sum w p^2 + sum w q^2 + s)``. With
    probabilities of 0 and 1 and weights of 1 it is `pseudo_label_loss` with that s.

    Args:
        logits: ``[B, K, ...]``.
        target: q, ``[B, K, ...]`` in [0, 1]; a voxel without any class, such as one beyond the volume, does not count.
        weight: w, ``[B, ...]`` in [0, 1]; None is 1 everywhere.
        smooth: s.

    Returns:
        Scalar >= 0; 0 with a gradient of 0 where all weights are 0.
    """
    target = target.to(logits.dtype)
    w = (target.sum(1, keepdim=True) > 0).to(logits.dtype)
    if weight is not None:
        w = w * weight.to(logits.dtype)[:, None]
    log_p = logits.log_softmax(1)
    ce = -(w * target * log_p).sum() / w.sum().clamp_min(1e-6)
    p = log_p.exp()
    axes = [0, *range(2, p.ndim)]
    overlap = (w * p * target).sum(axes)
    size = (w * p * p).sum(axes) + (w * target * target).sum(axes)
    return 0.5 * (ce + (1.0 - (2.0 * overlap + smooth) / (size + smooth)).mean())


def confidence(probability: NDArray[np.floating[Any]]) -> tuple[float, float]:
    """How sure a prediction of one volume is: over all voxels, and over those it calls foreground.

    The first is ``C = mean_v max_c p(c)`` (SFR+, Li et al. 2025); it counts easy background too, so that it is high for every
    volume with much of it. The second (ours) averages over the predicted foreground alone.

    Args:
        probability: ``[K, X, Y, Z]``.

    Returns:
        Both in [1/K, 1]; the second is 0 when nothing is called foreground.
    """
    highest = probability.max(0)
    foreground = probability.argmax(0) > 0
    inside = float(highest[foreground].mean(dtype=np.float64)) if foreground.any() else 0.0
    return float(highest.mean(dtype=np.float64)), inside
