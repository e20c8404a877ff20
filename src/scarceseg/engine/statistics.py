"""Batch norm statistics of the finished student, taken from the images of the pool instead of its last training batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from scarceseg.data.sampling import PatchSampler, Source
from scarceseg.errors import Interrupted
from scarceseg.networks.selftest import to_memory_format
from scarceseg.types import ImageBatch

if TYPE_CHECKING:
    from scarceseg.engine.workspace import Workspace

BATCHES = 64
"""Batches that the statistics are taken from; a shorter training takes as many as it had iterations."""


@torch.no_grad()
def take_statistics(
    network: nn.Module,
    images: Iterable[ImageBatch],
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Replace the running statistics of every batch norm by the plain mean over batches, in place.

    ``m = 1/N sum_i mean(x_i)``, ``v = 1/N sum_i var(x_i)`` over N batches, each layer behind others that normalise by their
    batch: "precise" batch norm (Wu & Johnson 2021, "Rethinking batch in BatchNorm", section 3, which adds the variance
    between the batches). Taken from images of the population that will be predicted it is also AdaBN (Li et al. 2017,
    "Revisiting batch normalization for practical domain adaptation"), which needs no labels. Dropout is off, as in
    prediction, unlike in `torch.optim.swa_utils.update_bn`. Statistics stay as they are without batches or without batch
    norm.

    Args:
        network: is left in evaluation mode.
        images: batches ``[B, C, X, Y, Z]`` on the network's device.
        autocast: context of the forward passes.
    """
    network.eval()
    norms = _batch_norms(network)
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    try:
        for number, batch in enumerate(images):
            if number == 0:
                for norm in norms:
                    norm.reset_running_stats()
                    norm.momentum = None  # plain mean
                    norm.train()
            with autocast():
                network(batch)
    finally:
        network.eval()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _batch_norms(network: nn.Module) -> list[_BatchNorm]:
    return [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def pool_statistics(network: nn.Module, work: Workspace) -> None:
    """Take a trained network's statistics from random patches of all training images, labelled or not, in place.

    Args:
        network: on the run's device; is left in evaluation mode.
        work: the run; only the images of its cases are looked at.

    Raises:
        Interrupted: stopped by Ctrl-C or SIGTERM; a resumed run takes them from the start.
    """
    if not _batch_norms(network):
        return
    config, device = work.config, work.fabric.device
    sampler = PatchSampler(
        [],
        [Source(case.name, case.image) for case in (*work.labelled, *work.unlabelled)],
        work.plan.patch,
        0,
        config.batch_labeled + config.batch_unlabeled,
        work.seed("statistics"),
        augment=config.augment,
        spacing_mm=work.plan.spacing_mm,
    )
    to_memory_format(network, work.memory_format)
    count = min(BATCHES, config.iterations)
    with work.display("statistics", count) as display:

        def images() -> Iterator[ImageBatch]:
            for number in range(count):
                if work.stop():
                    raise Interrupted("stopped while taking batch norm statistics; --resume goes on from there")
                yield sampler.unlabelled(number).image.to(device)
                display.update(number + 1)

        take_statistics(network, images(), work.fabric.autocast)
