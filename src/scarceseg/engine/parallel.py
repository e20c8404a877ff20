"""Several processes, as ``torchrun`` starts them, that train one network to the loss curve of a single process.

The rows of a step are shared out among the W processes. Every process makes all of them, computes the student's output on its
own share, and gathers the output of the others; then each has the whole `Step` and computes the same losses. A loss
that is no mean over rows (Dice over the batch, a masked mean, pairs of rows) is therefore what one process would have, and
terms with networks of their own need not know of it. What it costs: teachers and other networks of the terms are computed by
every process.

Batch norm takes its statistics over all processes. Dropout of the student draws from a stream of each process's own, everything
else from a common one.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce

from scarceseg.errors import ConfigError, Interrupted, RunError, ScarceSegError
from scarceseg.seeds import rng

Result = TypeVar("Result")


def processes() -> int:
    """W, number of processes ``torchrun`` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process, 0 .. W - 1."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Number of this process among those on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


NO_STEP = 0xFFFFFFF0
"""From this number on a SLURM_STEP_ID is none of ``srun``'s: the batch script, an interactive shell."""


def check_tasks() -> None:
    """Refuse several tasks of ``srun`` that know nothing of each other: each would be a run of its own, in one folder.

    Raises:
        ConfigError: with the way to start them.
    """
    step = os.environ.get("SLURM_STEP_ID", "")
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS", "")
    if "WORLD_SIZE" in os.environ or not (
        step.isdigit() and int(step) < NO_STEP and tasks.isdigit() and int(tasks) > 1
    ):
        return
    raise ConfigError(
        f"srun started {tasks} tasks, each of which would train by itself: take one task a node (--ntasks-per-node=1) and let "
        "torchrun start the processes, as in 'srun torchrun --nnodes 1 --nproc-per-node 4 -m scarceseg train ...' "
        "(docs/how-to/several-processes.md); if they are runs of their own in folders of their own, unset SLURM_STEP_ID"
    )


def gathered(value: Result) -> list[Result]:
    """The values of all processes, in their order; each waits for the last one.

    Raises:
        RunError: one of them is gone.
    """
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * processes()
    with _told_when_lost():
        dist.all_gather_object(values, value)
    return values


def check_rows(rows: int, stage: str = "") -> None:
    """Refuse a step whose rows the processes cannot share equally.

    Args:
        rows: of the step.
        stage: it belongs to, when it is not the training of the run.

    Raises:
        ConfigError: with the next numbers of rows that they can.
    """
    if rows % processes():
        fit = -(-rows // processes()) * processes()
        raise ConfigError(
            f"{f'in the stage {stage} ' if stage else ''}a step has {rows} rows (batch_labeled, and batch_unlabeled where a "
            f"term reads such rows; each of the two with batch_norm: split), which {processes()} processes cannot share "
            f"equally: take {fit} rows, or another number of processes"
        )


def meet(cuda: bool, patience: timedelta = timedelta(hours=2)) -> None:
    """Let the processes find each other; does nothing when there is only one or they have met.

    Args:
        cuda: work on GPUs.
        patience: how long one waits for the others.

    Raises:
        RunError: not all of them came.
    """
    if processes() == 1 or dist.is_initialized():
        return
    try:
        if cuda:
            torch.cuda.set_device(local_rank())
        dist.init_process_group("nccl" if cuda else "gloo", timeout=patience)
        atexit.register(dist.destroy_process_group)
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"the {processes()} processes did not find each other: {str(error).splitlines()[0]}; start them with torchrun"
        ) from None


def first_alone(work: Callable[[], Result], patience: timedelta | None = None) -> Result:
    """Do something in the first process alone; all get its result, or its error.

    Args:
        work: what it does.
        patience: how long the others wait; None is as long as in `meet`.

    Raises:
        ScarceSegError: the first process's own; in the others it is marked as told.
        Interrupted: the first process was stopped.
        RunError: it has ended otherwise.
    """
    if not dist.is_initialized():
        return work()
    group = None if patience is None else dist.new_group(timeout=patience, backend="gloo")
    box: list[Any] = [None, None]
    error: ScarceSegError | Interrupted | None = None
    if rank() == 0:
        try:
            box[0] = work()
        except (ScarceSegError, Interrupted) as caught:
            error = box[1] = caught
    with _told_when_lost():
        dist.broadcast_object_list(box, group=group)
    if error is not None:
        raise error
    if box[1] is not None:
        if isinstance(box[1], ScarceSegError):
            box[1].told = True  # by the first process
        raise box[1]
    result: Result = box[0]
    return result


def wait() -> None:
    """For all processes to come here."""
    if dist.is_initialized():
        dist.barrier()


def agreed(flag: bool, device: torch.device) -> bool:
    """Whether any process says so; they must all ask at the same time, or one would wait for ever."""
    if not dist.is_initialized():
        return flag
    votes = torch.tensor(int(flag), device=device)
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes)


def is_lost(error: RuntimeError) -> bool:
    """Whether an error means that another process is gone."""
    words = str(error)
    return dist.is_initialized() and (
        isinstance(error, dist.DistBackendError) or "onnection" in words or "gloo" in words
    )


@contextmanager
def _told_when_lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise RunError("another process has ended early; start again, what was written is kept") from None


class Gather(torch.autograd.Function):
    """Equal shares ``[n, ...]`` of all processes -> ``[W n, ...]`` in every one of them.

    All processes go on to the same loss, so that the gradient of the own share is at hand. It is multiplied by W, because
    averaging over processes (as distributed data parallel does) divides by it.
    """

    @staticmethod
    def forward(ctx: Any, share: torch.Tensor) -> torch.Tensor:
        """All shares, in the order of the processes."""
        shares = [torch.empty_like(share, memory_format=torch.contiguous_format) for _ in range(processes())]
        dist.all_gather(shares, share.contiguous())
        ctx.rows = len(share)
        return torch.cat(shares)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Of the own share."""
        start = rank() * ctx.rows
        return gradient[start : start + ctx.rows] * processes()


class Shared:
    """A student called with all rows that computes only its share and gathers the rest.

    Args:
        model: as set up for several processes; gives logits, or a tuple that ends in lists of features.
    """

    def __init__(self, model: Callable[[torch.Tensor], Any]) -> None:
        self.model = model
        self._seeds = (0, 0)

    def seed(self, seed: int, iteration: int) -> None:
        """Seed the iteration: the student's dropout by process, what comes after it alike in all."""
        own, common = rng(seed, "processes", iteration, 1 + rank()), rng(seed, "processes", iteration, 0)
        self._seeds = int(own.integers(2**63 - 1)), int(common.integers(2**63 - 1))

    def __call__(self, images: torch.Tensor) -> Any:
        """Output for all rows, in their order."""
        count = -(-len(images) // processes())
        rows = torch.arange(rank() * count, (rank() + 1) * count).clamp_max(len(images) - 1)  # the last one may repeat
        torch.manual_seed(self._seeds[0])
        output = self.model(images[rows.to(images.device)])
        torch.manual_seed(self._seeds[1])

        def whole(share: Any) -> Any:
            if isinstance(share, torch.Tensor):
                return Gather.apply(share)[: len(images)]
            return type(share)(whole(part) for part in share)

        return whole(output)


class GlobalBatchNorm(nn.BatchNorm3d):
    """Batch norm with the statistics of all processes in training; where PyTorch's own (for GPUs) cannot be used.

    Mean and variance are those of one process with all rows: ``m = sum x / n``, then ``v = sum (x - m)^2 / n``, each summed over
    the processes with gradient.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, C, ...]`` normalised."""
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        axes = [0, *range(2, x.ndim)]
        shape = [1, -1, *[1] * (x.ndim - 2)]
        values = x.float()
        count = values[:, 0].numel() * processes()
        mean = all_reduce(values.sum(axes)) / count
        centred = values - mean.view(shape)
        variance = all_reduce(centred.square().sum(axes)) / count
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
                share = 1 / float(self.num_batches_tracked or 1) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.detach(), share)
                self.running_var.lerp_(variance.detach() * (count / max(count - 1, 1)), share)
        found = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            found = found * self.weight.view(shape) + self.bias.view(shape)
        return found.to(x.dtype)


def share_statistics(network: nn.Module, cuda: bool) -> None:
    """Replace the batch norms of a network, in place; parameters, buffers and their names stay.

    Args:
        network: is changed.
        cuda: take PyTorch's `SyncBatchNorm`, which is for GPUs alone.
    """
    for name, child in network.named_children():
        if type(child) is nn.BatchNorm3d:
            setattr(network, name, nn.SyncBatchNorm.convert_sync_batchnorm(child) if cuda else _global(child))
        else:
            share_statistics(child, cuda)


def _global(norm: nn.BatchNorm3d) -> GlobalBatchNorm:
    other = GlobalBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    for name in norm._parameters:
        setattr(other, name, norm._parameters[name])
    for name in norm._buffers:
        setattr(other, name, norm._buffers[name])
    return other.train(norm.training)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Make the gradients of parameters that no wrapper looks after equal in all processes, up to the last bit."""
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= processes()
