"""Segmentation and consistency losses on logits or probabilities."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from scarceseg.types import IGNORE_LABEL, LabelBatch, Logits, Probability


def cross_entropy(logits: Logits, label: LabelBatch) -> torch.Tensor:
    """Mean cross-entropy over the voxels whose label is not 255, in nats.

    Args:
        logits: ``[B, K, ...]``.
        label: ``[B, ...]`` int64.

    Returns:
        Scalar; 0 (with a gradient of 0) when every voxel is ignored.
    """
    valid = (label != IGNORE_LABEL).sum().clamp_min(1)
    return F.cross_entropy(logits, label, ignore_index=IGNORE_LABEL, reduction="sum") / valid


def dice_loss(
    probability: Probability,
    label: LabelBatch,
    *,
    background: bool = False,
    squared: bool = True,
    mask_ignored: bool = True,
    smooth: float = 1e-5,
) -> torch.Tensor:
    """Soft Dice loss, ``mean_c 1 - (2 sum p g + s) / (sum p^2 + sum g^2 + s)``, sums over batch and space together.

    Args:
        probability: ``[B, K, ...]`` in [0, 1].
        label: ``[B, ...]`` int64, 255 = ignore.
        background: average over class 0 too (SSL4MIS, SFR); False is the form of UA-MT.
        squared: squared denominators (Milletari et al. 2016, eq. 1); False sums p and g.
        mask_ignored: leave ignored voxels out altogether. Differs from the authors' code: SFR's script keeps their p^2
            in the denominator, which False reproduces.
        smooth: s.

    Returns:
        Scalar in [0, 1].
    """
    valid = (label != IGNORE_LABEL).unsqueeze(1)
    classes = range(0 if background else 1, probability.shape[1])
    target = torch.stack([(label == c) for c in classes], dim=1).to(probability.dtype)
    p = probability[:, classes.start :]
    if mask_ignored:
        p = p * valid
    axes = [0, *range(2, p.ndim)]
    intersection = (p * target).sum(axes)
    # g is 0 or 1, so that g^2 = g.
    size = (p * p if squared else p).sum(axes) + target.sum(axes)
    return (1.0 - (2.0 * intersection + smooth) / (size + smooth)).mean()


def segmentation_loss(
    logits: Logits,
    label: LabelBatch,
    *,
    background: bool = False,
    mask_ignored: bool = True,
    smooth: float = 1e-5,
) -> torch.Tensor:
    """``0.5 (CE + Dice)``, the supervised loss of the UA-MT protocol and of both seed papers."""
    dice = dice_loss(logits.softmax(1), label, background=background, mask_ignored=mask_ignored, smooth=smooth)
    return 0.5 * (cross_entropy(logits, label) + dice)


def softmax_mse(student: Logits, teacher: Probability) -> torch.Tensor:
    """Squared difference per class and voxel, ``(softmax(student) - teacher)^2``, ``[B, K, ...]``, not reduced."""
    return (student.softmax(1) - teacher).square()


def softmax_kl(student: Logits, teacher: Logits) -> torch.Tensor:
    """``q (ln q - ln p)`` per class and voxel with q the teacher's and p the student's softmax, not reduced."""
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True)


def softmax_dice_loss(first: Logits, second: Logits, smooth: float = 1e-5) -> torch.Tensor:
    """Mean over all classes of the Dice loss (plain denominators) between two softmax outputs."""
    p, q = first.softmax(1), second.softmax(1)
    axes = [0, *range(2, p.ndim)]
    return (1.0 - (2.0 * (p * q).sum(axes) + smooth) / (p.sum(axes) + q.sum(axes) + smooth)).mean()
