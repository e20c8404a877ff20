"""The one training loop. Every stage that trains a network runs through it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning_fabric import Fabric
from torch import nn

from scarceseg.config import OptimConfig
from scarceseg.engine.checkpoint import load_checkpoint, save_checkpoint
from scarceseg.engine.logging import RunLog
from scarceseg.engine.parallel import Shared, agreed, average_gradients, is_lost, processes, share_statistics
from scarceseg.engine.step import Called, as_called, place, train_step
from scarceseg.errors import DataError, Interrupted, RunError
from scarceseg.foundation.base import TunedModel
from scarceseg.functional.ramps import poly_lr, step_lr
from scarceseg.methods.base import Term
from scarceseg.networks.selftest import to_memory_format
from scarceseg.seeds import seed_step
from scarceseg.types import Labelled, Unlabelled


@dataclass
class LoopTask:
    """One stage of training.

    Attributes:
        stage: name used in logs and for the checkpoint file.
        student: the network that is trained.
        terms: summands of the loss, by name, attached already.
        sampler: makes the batches.
        optim: optimiser and schedule.
        iterations: T.
        seed: of the run.
        checkpoint: file of the resumable state.
        checkpoint_every, log_every: iterations.
        memory_format: "contiguous" or "channels_last_3d".
        split: labelled, unlabelled and the terms' own rows go through the student one after the other, see `forward_step`.
        after_step: called with the number of finished iterations, for validation; a resumed run calls it again where it starts.
        rounds: iterations before which `on_round` is called with them; no later batch is made before that.
        on_round: makes new fields; called again for the rounds that lie before a resumed iteration.
    """

    stage: str
    student: nn.Module
    terms: Mapping[str, Term]
    sampler: BatchSource
    optim: OptimConfig
    iterations: int
    seed: int
    checkpoint: Path
    checkpoint_every: int = 250
    log_every: int = 10
    memory_format: str = "contiguous"
    split: bool = False
    after_step: Callable[[int], None] | None = None
    rounds: Sequence[int] = ()
    on_round: Callable[[int], None] | None = None


PICTURES = 8
"""Pictures each term may leave over a stage."""


class BatchSource(Protocol):
    """What makes the batches of a stage: a pure function of the iteration."""

    def batches(self, start: int, stop: int) -> Iterator[tuple[Labelled, Unlabelled | None]]:
        """Batches of the iterations ``start .. stop - 1``."""
        ...


def learning_rate(optim: OptimConfig, iteration: int, total: int) -> float:
    """Learning rate of iteration t; the published step of 2500 in 6000 is kept in proportion for another T."""
    return _schedule(optim, iteration, total) * min(1.0, (iteration + 1) / max(optim.warmup, 1))


def _schedule(optim: OptimConfig, iteration: int, total: int) -> float:
    if optim.schedule == "step":
        step = optim.step or max(round(total * 2500 / 6000), 1)
        return step_lr(iteration, optim.lr, step, optim.gamma)
    if optim.schedule == "poly":
        return poly_lr(iteration, total, optim.lr, optim.power)
    return optim.lr


def own_parameters(student: nn.Module, terms: Mapping[str, Term]) -> list[nn.Parameter]:
    """What is trained of the terms, each parameter once, and none that is the student's."""
    known = {id(p) for p in student.parameters()}
    own = {id(p): p for term in terms.values() for p in term.trainable_parameters()}
    return [p for number, p in own.items() if number not in known]


def build_optimizer(optim: OptimConfig, student: nn.Module, terms: Mapping[str, Term]) -> torch.optim.Optimizer:
    """Optimiser over the student's parameters and those the terms own."""
    parameters = [*(p for p in student.parameters() if p.requires_grad), *own_parameters(student, terms)]
    if optim.name == "adamw":
        return torch.optim.AdamW(parameters, lr=optim.lr, weight_decay=optim.weight_decay)
    return torch.optim.SGD(parameters, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay)


def weights_of(network: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes: of a tuned foundation model only the tuned part."""
    return network.tuned_state() if isinstance(network, TunedModel) else network.state_dict()


def load_weights(network: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Put back what `weights_of` gave.

    Raises:
        RuntimeError, DataError: it is of another network.
    """
    if isinstance(network, TunedModel):
        network.load_tuned_state(state)
    else:
        network.load_state_dict(state)


class Loop:
    """Runs a `LoopTask` from its checkpoint, or from the start, to its end.

    Raises (from `run`):
        Interrupted: after Ctrl-C or SIGTERM, with the state saved.
        RunError: the loss is not finite, or a checkpoint cannot be written.
    """

    def __init__(self, task: LoopTask, fabric: Fabric, log: RunLog, stop: Callable[[], bool]) -> None:
        self.task = task
        self.fabric = fabric
        self.log = log
        self.stop = stop
        self.student = to_memory_format(task.student, task.memory_format)
        for term in task.terms.values():
            term.train()
        self.optimizer = build_optimizer(task.optim, task.student, task.terms)
        self.own = own_parameters(task.student, task.terms)
        if processes() > 1 and not isinstance(self.student, TunedModel):
            share_statistics(self.student, fabric.device.type == "cuda")
        model, self.wrapped = fabric.setup(as_called(self.student, task.terms), self.optimizer)
        self.shared = Shared(model) if processes() > 1 else None
        self.model: Called = self.shared or model
        self.generator = torch.Generator(device=fabric.device)

    def state(self, iteration: int) -> dict[str, Any]:
        """Everything a resumed run needs: weights, teachers, momentum, iteration."""
        return {
            "iteration": iteration,
            "student": weights_of(self.student),
            "terms": {name: term.state_dict() for name, term in self.task.terms.items()},
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self) -> int:
        """Load the checkpoint if there is one; returns the number of finished iterations."""
        if not self.task.checkpoint.exists():
            return 0
        state = load_checkpoint(self.task.checkpoint)
        try:
            load_weights(self.student, state["student"])
            for name, term in self.task.terms.items():
                term.load_state_dict(state["terms"][name])
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, RuntimeError, ValueError, DataError) as error:
            raise RunError(
                f"{self.task.checkpoint} does not fit this network or method: {str(error).splitlines()[0]}; "
                "resume with the settings the run was started with"
            ) from None
        return int(state["iteration"])

    def save(self, iteration: int) -> None:
        """Write the checkpoint (first process only)."""
        if self.fabric.is_global_zero:
            save_checkpoint(self.task.checkpoint, self.state(iteration))

    def run(self) -> None:
        """Train to the end."""
        try:
            self._run()
        except RuntimeError as error:
            if not is_lost(error):
                raise
            raise RunError(
                f"another process of this run ended ({str(error).splitlines()[0][:120]}); start all of them again with --resume "
                "to go on from the last checkpoint"
            ) from None

    def _run(self) -> None:
        task = self.task
        start = self.restore()
        self.log.rewind(task.stage, start)
        self.student.train()
        finished, saved = start, start
        since = time.perf_counter()
        rounds = [number for number in task.rounds if number < task.iterations]
        self._refresh([number for number in rounds if number <= start])
        if start and task.after_step is not None:
            task.after_step(start)  # which the run may have been stopped in
            self.student.train()
        ends = [*(number for number in rounds if number > start), task.iterations]
        with self.log.progress(task.stage, start, task.iterations) as progress:
            for end in ends:
                for iteration, batch in enumerate(task.sampler.batches(finished, end), finished):
                    lr = learning_rate(task.optim, iteration, task.iterations)
                    for group in self.optimizer.param_groups:
                        group["lr"] = lr
                    seed_step(task.seed, iteration, self.generator)
                    if self.shared is not None:
                        self.shared.seed(task.seed, iteration)
                    values = self._step(batch, iteration)
                    finished = iteration + 1
                    if iteration % task.log_every == 0 or finished == task.iterations:
                        seconds, since = time.perf_counter() - since, time.perf_counter()
                        self._record(iteration, values, lr, seconds)
                        self._show(iteration)
                        progress.update(finished, float(values["loss"]))
                    else:
                        progress.update(finished)
                    if task.after_step is not None:
                        task.after_step(finished)
                        self.student.train()
                    if finished % task.checkpoint_every == 0 or finished == end:
                        self._require_finite(iteration, values)
                        self.save(finished)
                        saved = finished
                    if agreed(self.stop(), self.fabric.device) and finished < task.iterations:
                        if saved != finished:
                            self._require_finite(iteration, values)
                            self.save(finished)
                        raise Interrupted(
                            f"stopped after iteration {finished} of {task.iterations}; --resume goes on from there"
                        )
                if end < task.iterations:
                    with progress.aside():
                        self._refresh([end])

    def _refresh(self, rounds: Sequence[int]) -> None:
        if self.task.on_round is not None:
            for number in rounds:
                self.task.on_round(number)
            self.student.train()

    def _step(self, batch: tuple[Labelled, Unlabelled | None], iteration: int) -> dict[str, torch.Tensor]:
        return train_step(
            self.model,
            self.student,
            self.task.terms,
            self.wrapped,
            place(batch, self.fabric.device, self.task.memory_format),
            iteration,
            self.task.iterations,
            self.generator,
            self.fabric.autocast,
            self.fabric.backward,
            self.task.optim.clip_norm,
            (lambda: average_gradients(self.own)) if self.shared is not None else None,
            self.task.split,
        )

    def _require_finite(self, iteration: int, values: dict[str, torch.Tensor]) -> None:
        """Refuse to go on with a loss or, behind a loss that is still finite, weights that are no numbers."""
        if math.isfinite(float(values["loss"])) and all(bool(p.isfinite().all()) for p in self.student.parameters()):
            return
        parts = ", ".join(f"{key}={float(value):.3g}" for key, value in values.items())
        raise RunError(
            f"the loss or the weights stopped being finite at iteration {iteration} ({parts}): start a new run with a lower "
            "optim.lr, or with --precision fp32; the last checkpoint is from before"
        )

    def _record(self, iteration: int, values: dict[str, torch.Tensor], lr: float, seconds: float) -> None:
        numbers = {key: float(value) for key, value in values.items()}
        if not math.isfinite(numbers["loss"]):
            self._require_finite(iteration, values)
        for name, term in self.task.terms.items():
            numbers |= {f"{key}/{name}": float(value) for key, value in term.numbers().items()}
        self.log.record(self.task.stage, iteration, {"lr": lr, "seconds": round(seconds, 4), **numbers})

    def _show(self, iteration: int) -> None:
        """Let the terms leave a picture, a few times over the stage; those of a resumed run come at the same iterations."""
        every = max(self.task.iterations // PICTURES // self.task.log_every, 1) * self.task.log_every
        if iteration % every == 0 and self.log.active:
            for name, term in self.task.terms.items():
                if (picture := term.picture()) is not None:
                    self.log.picture(self.task.stage, name, iteration, picture)
