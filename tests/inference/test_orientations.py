"""Test-time augmentation: the mean over the orientations of training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from scarceseg.data.sampling import PatchSampler, Source
from scarceseg.errors import ConfigError
from scarceseg.inference.orientations import MeanOverOrientations
from scarceseg.types import Augment


class Spy(nn.Module):
    """Keeps what it is shown and answers with it, so that a wrong turn back is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.seen.append(image.clone())
        return torch.cat([image, -image], 1)


@pytest.mark.parametrize("size", [(6, 6, 4), (6, 4, 4)])
@pytest.mark.parametrize("augment", ["all", "reflections"])
def test_shows_what_training_has_shown_and_turns_the_answers_back(augment: Augment, size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    image = torch.randn(1, 1, *size)
    spy = Spy()
    answer = MeanOverOrientations(spy, augment, size[0] == size[1])(image).softmax(1)
    # Pointwise networks do not care how the patch lies, so the mean is the answer itself.
    torch.testing.assert_close(answer, torch.cat([image, -image], 1).softmax(1))
    only = Source("a", image[0].numpy(), np.zeros(size, np.uint8))
    sampler = PatchSampler([only], [], size, 4, 0, 3, augment=augment)
    trained = {row.numpy().tobytes() for t in range(30) for row in sampler.batch(t)[0].image}
    assert {row[0].contiguous().numpy().tobytes() for row in spy.seen} == trained
    assert len(spy.seen) == len(trained)


def test_averages_probabilities_not_logits() -> None:
    class Corner(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(len(image), 2, *image.shape[2:])
            logits[:, 1, 0, 0] = 9.0  # sees a thing in the corner of what it is shown
            return logits

    answer = MeanOverOrientations(Corner(), "all", True)(torch.zeros(1, 1, 4, 4, 2)).softmax(1)[0, 1, :, :, 0]
    sure = float(torch.tensor([0.0, 9.0]).softmax(0)[1])
    corner = (2 * sure + 6 * 0.5) / 8  # each corner is hit by two of eight orientations
    torch.testing.assert_close(answer[0, 0], torch.tensor(corner))
    torch.testing.assert_close(answer[[0, -1]][:, [0, -1]], torch.full((2, 2), corner))
    torch.testing.assert_close(answer[1:3, 1:3], torch.full((2, 2), 0.5))


def test_a_network_trained_in_one_orientation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"trained without turns and flips.*predict without 'tta'"):
        MeanOverOrientations(Spy(), "none", True)
