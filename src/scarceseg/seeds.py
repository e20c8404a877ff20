"""All randomness of a run is a function of (seed, stream, counter), so that a resumed run draws what it would have drawn.

Nothing has to be saved but the seed, which stands in the run's config, and the iteration, which stands in the checkpoint.
"""

from __future__ import annotations

import numpy as np
import torch

STREAMS = {"labelled": 1, "unlabelled": 2, "step": 3, "init": 4, "stage": 5, "processes": 6}


def rng(seed: int, stream: str, *counters: int) -> np.random.Generator:
    """NumPy generator of one place in the run, such as ``rng(seed, "labelled", row)``."""
    return np.random.default_rng([seed, STREAMS[stream], *counters])


def seed_step(seed: int, iteration: int, generator: torch.Generator) -> None:
    """Seed dropout (torch's global generator) and the terms' `generator` for one iteration."""
    first, second = rng(seed, "step", iteration, 0).integers(0, 2**63 - 1, 2)
    torch.manual_seed(int(first))
    generator.manual_seed(int(second))


def seed_init(seed: int) -> None:
    """Seed the initialisation of networks."""
    torch.manual_seed(int(rng(seed, "init").integers(0, 2**63 - 1)))
