"""The one training loop. Every stage that trains a network runs through it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from scarceseg.config import OptimConfig
from scarceseg.data.sampling import PatchSampler
from scarceseg.engine.checkpoint import load_checkpoint, save_checkpoint
from scarceseg.engine.logging import RunLog
from scarceseg.engine.seeds import seed_step
from scarceseg.engine.selftest import to_memory_format
from scarceseg.errors import Interrupted, RunError
from scarceseg.functional.ramps import poly_lr, step_lr
from scarceseg.methods.base import Term
from scarceseg.types import ImageBatch, Labelled, Step, Unlabelled


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
        after_step: called with the number of finished iterations, for validation.
    """

    stage: str
    student: nn.Module
    terms: Mapping[str, Term]
    sampler: PatchSampler
    optim: OptimConfig
    iterations: int
    seed: int
    checkpoint: Path
    checkpoint_every: int = 250
    log_every: int = 10
    memory_format: str = "contiguous"
    after_step: Callable[[int], None] | None = None


def learning_rate(optim: OptimConfig, iteration: int, total: int) -> float:
    """Learning rate of iteration t; the published step of 2500 in 6000 is kept in proportion for another T."""
    if optim.schedule == "step":
        step = optim.step or max(round(total * 2500 / 6000), 1)
        return step_lr(iteration, optim.lr, step, optim.gamma)
    if optim.schedule == "poly":
        return poly_lr(iteration, total, optim.lr, optim.power)
    return optim.lr


def build_optimizer(optim: OptimConfig, student: nn.Module, terms: Mapping[str, Term]) -> torch.optim.Optimizer:
    """Optimiser over the student's parameters and those the terms own."""
    parameters = [p for p in student.parameters() if p.requires_grad]
    for term in terms.values():
        parameters += list(term.trainable_parameters())
    if optim.name == "adamw":
        return torch.optim.AdamW(parameters, lr=optim.lr, weight_decay=optim.weight_decay)
    return torch.optim.SGD(parameters, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay)


def forward_step(
    model: Callable[[torch.Tensor], torch.Tensor],
    terms: Mapping[str, Term],
    labelled: Labelled,
    unlabelled: Unlabelled | None,
    iteration: int,
    total: int,
    generator: torch.Generator,
) -> Step:
    """Run the student once on all rows (labelled, unlabelled, the terms' own) and hand out its output."""
    parts: dict[str, ImageBatch] = {"labelled": labelled.image}
    if unlabelled is not None:
        parts["unlabelled"] = unlabelled.image
    for name, term in terms.items():
        extra = term.extra_inputs(labelled, unlabelled, generator)
        if extra is not None:
            parts[f"extra/{name}"] = extra
    images = list(parts.values())
    output = model(torch.cat(images) if len(images) > 1 else images[0]).float()
    logits = dict(zip(parts, output.split([len(x) for x in images]), strict=True))
    return Step(
        iteration=iteration,
        total=total,
        labelled=labelled,
        unlabelled=unlabelled,
        logits_l=logits["labelled"],
        logits_u=logits.get("unlabelled"),
        generator=generator,
        extra={key.removeprefix("extra/"): value for key, value in logits.items() if key.startswith("extra/")},
    )


def train_step(
    model: Callable[[torch.Tensor], torch.Tensor],
    student: nn.Module,
    terms: Mapping[str, Term],
    optimizer: torch.optim.Optimizer,
    batch: tuple[Labelled, Unlabelled | None],
    iteration: int,
    total: int,
    generator: torch.Generator,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
) -> dict[str, torch.Tensor]:
    """One optimisation step: forward, sum of terms, backward, update, EMA.

    Args:
        model: the student as it is called (wrapped for precision or several processes).
        student: the same network, bare.

    Returns:
        Detached scalars: ``loss`` and ``loss/<term>`` (raw), ``weight/<term>``.
    """
    with autocast():
        step = forward_step(model, terms, *batch, iteration, total, generator)
        raw = {name: term.loss(step) for name, term in terms.items()}
    weights = {name: term.weight(iteration, total) for name, term in terms.items()}
    loss = torch.stack([weights[name] * raw[name] for name in terms]).sum()
    backward(loss)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for term in terms.values():
            term.after_update(student, iteration)
    report = {"loss": loss.detach()}
    for name in terms:
        report[f"loss/{name}"] = raw[name].detach()
        report[f"weight/{name}"] = torch.tensor(weights[name])
    return report


def place(
    batch: tuple[Labelled, Unlabelled | None], device: torch.device, memory_format: str
) -> tuple[Labelled, Unlabelled | None]:
    """Move a batch to the device, in the network's memory format."""

    def image(x: torch.Tensor) -> torch.Tensor:
        x = x.to(device, non_blocking=True)
        return x.contiguous(memory_format=torch.channels_last_3d) if memory_format == "channels_last_3d" else x

    def fields(maps: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: value.to(device, non_blocking=True) for key, value in maps.items()}

    labelled, unlabelled = batch
    labelled = replace(
        labelled, image=image(labelled.image), label=labelled.label.to(device), fields=fields(labelled.fields)
    )
    if unlabelled is not None:
        unlabelled = replace(unlabelled, image=image(unlabelled.image), fields=fields(unlabelled.fields))
    return labelled, unlabelled


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
        self.model, self.wrapped = fabric.setup(self.student, self.optimizer)
        self.generator = torch.Generator(device=fabric.device)

    def state(self, iteration: int) -> dict[str, Any]:
        """Everything a resumed run needs: weights, teachers, momentum, iteration."""
        return {
            "iteration": iteration,
            "student": self.student.state_dict(),
            "terms": {name: term.state_dict() for name, term in self.task.terms.items()},
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self) -> int:
        """Load the checkpoint if there is one; returns the number of finished iterations."""
        if not self.task.checkpoint.exists():
            return 0
        state = load_checkpoint(self.task.checkpoint)
        try:
            self.student.load_state_dict(state["student"])
            for name, term in self.task.terms.items():
                term.load_state_dict(state["terms"][name])
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, RuntimeError, ValueError) as error:
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
        task = self.task
        start = self.restore()
        self.log.rewind(task.stage, start)
        self.student.train()
        finished, saved = start, start
        since = time.perf_counter()
        batches = task.sampler.batches(start, task.iterations)
        with self.log.progress(task.stage, start, task.iterations) as progress:
            for iteration, batch in zip(range(start, task.iterations), batches, strict=False):
                lr = learning_rate(task.optim, iteration, task.iterations)
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
                seed_step(task.seed, iteration, self.generator, self.fabric.global_rank)
                values = self._step(batch, iteration)
                finished = iteration + 1
                if iteration % task.log_every == 0 or finished == task.iterations:
                    seconds, since = time.perf_counter() - since, time.perf_counter()
                    self._record(iteration, values, lr, seconds)
                    progress.update(finished, float(values["loss"]))
                else:
                    progress.update(finished)
                if task.after_step is not None:
                    task.after_step(finished)
                    self.student.train()
                if finished % task.checkpoint_every == 0 or finished == task.iterations:
                    self.save(finished)
                    saved = finished
                if self.stop() and finished < task.iterations:
                    if saved != finished:
                        self.save(finished)
                    raise Interrupted(
                        f"stopped after iteration {finished} of {task.iterations}; --resume goes on from there"
                    )

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
        )

    def _record(self, iteration: int, values: dict[str, torch.Tensor], lr: float, seconds: float) -> None:
        numbers = {key: float(value) for key, value in values.items()}
        if not math.isfinite(numbers["loss"]):
            raise RunError(
                f"the loss became {numbers['loss']} at iteration {iteration} "
                f"({', '.join(f'{k}={v:.3g}' for k, v in numbers.items())}); lower optim.lr or use --precision fp32; "
                "the last checkpoint is from before"
            )
        self.log.record(self.task.stage, iteration, {"lr": lr, "seconds": round(seconds, 4), **numbers})
