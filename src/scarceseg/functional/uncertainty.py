"""How unsure a prediction is, and losses that listen to it."""

from __future__ import annotations

import torch

from scarceseg.types import Probability


def entropy(probability: Probability, eps: float = 1e-6) -> torch.Tensor:
    """``H = -sum_c p_c ln(p_c + eps)`` per voxel, nats, about [0, ln K].

    Args:
        probability: ``[B, K, ...]``.
        eps: keeps the logarithm finite; 1e-6 as published, so that the maximum lies slightly below ln K.

    Returns:
        ``[B, 1, ...]``.
    """
    return -(probability * (probability + eps).log()).sum(1, keepdim=True)


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``sum(mask * values) / (K * sum(mask))`` with a mask ``[B, 1, ...]`` shared by the K channels of `values`.

    Returns:
        Scalar; 0 (with a gradient of 0) when no voxel counts.
    """
    mask = mask.to(values.dtype)
    return (values * mask).sum() / (values.shape[1] * mask.sum() + 1e-16)
