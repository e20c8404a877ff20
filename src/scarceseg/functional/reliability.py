"""How far a mask may be trusted that a frozen model made from a student's own prediction: the gate of `semisam`.

All of it is known without a reference: whether the two agree, what the model thinks of its mask, how much its answers to
several prompts differ, and where each of them is sure.
"""

from __future__ import annotations

import torch


def soft_dice(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """``2 sum(p s) / (sum p + sum s)`` per mask: agreement of two probability maps.

    Args:
        first, second: ``[N, X, Y, Z]`` in [0, 1].

    Returns:
        ``[N]`` in [0, 1]; 0 when both are empty.
    """
    overlap = 2 * (first * second).flatten(1).sum(1)
    return overlap / (first.flatten(1).sum(1) + second.flatten(1).sum(1)).clamp_min(1e-8)


def rise(values: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """0 up to `low`, 1 from `high` on, a straight line between; a step when they are equal."""
    if high <= low:
        return (values >= high).to(values.dtype)
    return ((values - low) / (high - low)).clamp(0, 1)


def mask_gate(
    agreement: torch.Tensor, quality: torch.Tensor, limits: tuple[float, float], quality_limits: tuple[float, float]
) -> torch.Tensor:
    """Weight of whole masks: agreement and the model's own estimate must both be high enough (ours).

    Args:
        agreement: `soft_dice` of student and model, ``[N]``.
        quality: IoU as the model estimates it, ``[N]`` in [0, 1].
        limits: agreement below which a mask counts for nothing, and from which on for all.
        quality_limits: the same for the quality.

    Returns:
        ``[N]`` in [0, 1].
    """
    return rise(agreement, *limits) * rise(quality, *quality_limits)


def voxel_gate(student: torch.Tensor, model: torch.Tensor, spread: torch.Tensor, doubt: float) -> torch.Tensor:
    """Weight of voxels, ``|2 s - 1| (1 - 4 v) (1 - d |2 p - 1|)``: model sure, answers alike, student in doubt (ours).

    Args:
        student, model: probabilities p and s, any shape.
        spread: v, variance of the model's answers, in [0, 1/4].
        doubt: d in [0, 1]; with 1 only voxels count in which the student is unsure.

    Returns:
        In [0, 1], of that shape.
    """
    sure = (2 * model - 1).abs()
    alike = (1 - 4 * spread).clamp(0, 1)
    return sure * alike * (1 - doubt * (2 * student - 1).abs())


def merge_masks(probability: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Answers for several classes -> class probabilities: the softmax of ``[0, logit s_1, ..., logit s_K-1]``.

    That is the chance of each class when each mask is an independent vote and exactly one class (or the background) holds; with
    a single class it changes nothing.

    Args:
        probability: ``[B, K-1, X, Y, Z]`` one foreground mask per class.
        asked: ``[B, K-1]`` bool; the mask of a class that was not asked for takes no part.

    Returns:
        ``[B, K-1, X, Y, Z]``, foreground classes alone; 0 where not asked.
    """
    odds = torch.logit(probability.float(), eps=1e-6).exp() * asked[:, :, None, None, None]
    return odds / (1 + odds.sum(1, keepdim=True))
