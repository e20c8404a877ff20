"""Small foundation models with random weights, and a simulated user, for tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import SamModel

from scarceseg.errors import DataError
from scarceseg.foundation.base import Masks, Promptable, Spacing
from scarceseg.foundation.clicks import next_click
from scarceseg.foundation.tiny_sam import tiny_sam_config
from scarceseg.foundation.tiny_sam3d_net import TinySam3DConfig, TinySam3DNet
from scarceseg.foundation.weights import find
from scarceseg.types import Prompt

SMALL_3D = TinySam3DConfig(
    full=4, gates=2, widths=(6, 8, 8, 8), head=(6, 8, 8), similarities=2, similarity_width=3, norm=2
)


def small_net(seed: int = 0) -> TinySam3DNet:
    """`tiny-sam3d` with few channels; no weight is zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = TinySam3DNet(SMALL_3D)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def small_sam(seed: int = 0) -> SamModel:
    """`tiny-sam` of two blocks on a canvas of 7 x 7 tiles of 8 pixels; it sees volumes as (8, 8, 49) voxels."""
    return lively(SamModel(tiny_sam_config(tile=8, patch=4, width=32, depth=2)), seed)


def lively(sam: SamModel, seed: int = 0) -> SamModel:
    """The same network with weights that answer: Hugging Face's own first ones give logits of 1e-6."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in sam.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.Embedding):
                module.reset_parameters()
        with torch.no_grad():
            for parameter in sam.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return sam.eval()


def click(*places: tuple[float, ...], labels: list[int] | None = None, **rest: Any) -> Prompt:
    """Clicks inside, unless `labels` says otherwise."""
    return Prompt(torch.tensor(places), torch.tensor(labels or [1] * len(places)), **rest)


def noise(size: tuple[int, int, int], rows: int = 1, channels: int = 1, seed: int = 0) -> torch.Tensor:
    """Volumes ``[rows, channels, X, Y, Z]``."""
    return torch.randn(rows, channels, *size, generator=torch.Generator().manual_seed(seed))


def packaged(name: str) -> None:
    """Skip the test where the package holds no such weights."""
    try:
        find(name)
    except DataError:
        pytest.skip(f"the weights of {name} are not in this checkout")


def dice(mask: torch.Tensor, target: torch.Tensor) -> float:
    """Of two masks, the second of them not empty."""
    return 2 * int((mask & target).sum()) / int(mask.sum() + target.sum())


def dice_after(
    model: Promptable, image: torch.Tensor, targets: list[torch.Tensor], clicks: int, spacing_mm: Spacing
) -> list[float]:
    """Dice of each target ``[X, Y, Z]`` after some clicks, each in the middle of the largest error."""
    embedding = model.embed(image, spacing_mm)
    found = []
    for target in targets:
        mask, previous = torch.zeros_like(target), None
        points: list[tuple[int, ...]] = []
        labels: list[int] = []
        for _ in range(clicks):
            place = next_click(mask, target, style="largest")
            if place is None:
                break
            points.append(place[0])
            labels.append(place[1])
            previous = model.segment(embedding, [click(*points, labels=labels)], previous)
            mask = previous.logits[0] > 0
        found.append(dice(mask, target))
    return found


def same(one: Masks, other: Masks, rtol: float = 1e-3, atol: float = 1e-4) -> None:
    """Equal logits and quality."""
    torch.testing.assert_close(one.logits, other.logits, rtol=rtol, atol=atol * (1 + float(other.logits.std())))
    torch.testing.assert_close(one.quality, other.quality, rtol=rtol, atol=atol)
