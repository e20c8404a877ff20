"""Input noise."""

from __future__ import annotations

import torch


def clipped_gaussian(
    like: torch.Tensor, generator: torch.Generator, std: float = 0.1, limit: float = 0.2
) -> torch.Tensor:
    """Noise in the shape of `like`: normal(0, `std`) clipped to +-`limit` (in units of normalised intensity)."""
    noise = torch.empty_like(like)
    return noise.normal_(0.0, std, generator=generator).clamp_(-limit, limit)
