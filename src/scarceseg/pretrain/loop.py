"""The pre-training loop: any task that gives a loss, AdamW with warm-up and cosine decay, averaged weights, exact resume."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from scarceseg.engine.checkpoint import load_checkpoint, save_checkpoint
from scarceseg.engine.logging import RunLog
from scarceseg.errors import Interrupted, RunError

Losses = dict[str, torch.Tensor]
STAGE = "pretrain"


class Task(Protocol):
    """What is learnt."""

    @property
    def network(self) -> nn.Module:
        """All that is trained, and saved in the checkpoint."""
        ...

    def loss(self, rng: np.random.Generator, done: float) -> Losses:
        """Scalars of one step; ``loss`` is minimised. `done` in [0, 1) is the part of the training that is over."""
        ...


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        iterations: steps in all.
        lr: highest learning rate.
        warmup: steps of linear rise.
        weight_decay: of AdamW, on matrices and kernels.
        clip: largest norm of the gradient.
        average: decay of the averaged weights, which are the result.
        seed: of everything.
    """

    iterations: int
    lr: float = 1e-3
    warmup: int = 100
    weight_decay: float = 1e-2
    clip: float = 1.0
    average: float = 0.998
    seed: int = 0

    def rate(self, iteration: int) -> float:
        """Learning rate of step t: linear warm-up, then half a cosine down to 1 % of `lr`."""
        if iteration < self.warmup:
            return self.lr * (iteration + 1) / self.warmup
        share = (iteration - self.warmup) / max(self.iterations - self.warmup, 1)
        return self.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))


class Pretraining:
    """Runs a task from its checkpoint, or from the start, to its end.

    Step t draws from ``default_rng([seed, t])`` alone, so a resumed run goes on exactly as it would have.

    Args:
        task: what is learnt.
        schedule: how long and how fast. A run may be resumed with more iterations or another rate.
        folder: gets ``checkpoint.pt`` and ``metrics.jsonl``.
        stop: asked after each step; True saves and raises `Interrupted`.
    """

    def __init__(self, task: Task, schedule: Schedule, folder: Path, stop: Callable[[], bool] = lambda: False) -> None:
        self.task, self.schedule, self.folder, self.stop = task, schedule, folder, stop
        parameters = [p for p in task.network.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": schedule.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=schedule.lr)
        self.average = {name: value.detach().clone() for name, value in task.network.state_dict().items()}
        self.iteration = 0

    def restore(self, path: Path | None = None) -> None:
        """Go on from a checkpoint; the one in `folder` unless another is named.

        Raises:
            RunError: missing, damaged, or of another model or seed.
        """
        state = load_checkpoint(path or self.folder / "checkpoint.pt")
        try:
            self.task.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average = {name: state["average"][name] for name in self.average}
            self.iteration = int(state["iteration"])
            seed = state["schedule"]["seed"]
        except (KeyError, RuntimeError, ValueError) as error:
            raise RunError(f"the checkpoint does not fit this model: {str(error).splitlines()[0]}") from None
        if seed != self.schedule.seed:
            raise RunError(
                f"the checkpoint belongs to a run of seed {seed}, not {self.schedule.seed}: resume with that seed"
            )
        # A killed run has logged steps after its checkpoint: they will be made, and logged, again.
        RunLog(self.folder).rewind(STAGE, self.iteration + 1)

    def save(self) -> None:
        """Write the checkpoint atomically."""
        state: dict[str, Any] = {
            "iteration": self.iteration,
            "network": self.task.network.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "schedule": asdict(self.schedule),
        }
        save_checkpoint(self.folder / "checkpoint.pt", state)

    def run(self, save_every: int = 200, log_every: int = 20) -> None:
        """Train to the end.

        Raises:
            Interrupted: `stop` said so; the state is saved.
            RunError: the loss is not finite.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.task.network.train()
        sums: dict[str, list[float]] = {}
        since = time.perf_counter()
        while self.iteration < self.schedule.iterations:
            for key, value in self._step().items():
                sums.setdefault(key, []).append(float(value))
            self.iteration += 1
            last = self.iteration == self.schedule.iterations
            if self.iteration % log_every == 0 or last:
                seconds, since = (time.perf_counter() - since) / len(sums["loss"]), time.perf_counter()
                self._log({key: float(np.nanmean(values)) for key, values in sums.items()}, seconds)
                sums = {}
            if self.iteration % save_every == 0 or last:
                self.save()
            if not last and self.stop():
                self.save()
                raise Interrupted(
                    f"stopped after step {self.iteration} of {self.schedule.iterations}; --resume goes on"
                )

    def _step(self) -> Losses:
        rng = np.random.default_rng([self.schedule.seed, self.iteration])
        torch.manual_seed(int(rng.integers(0, 2**63 - 1)))
        rate = self.schedule.rate(self.iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = self.task.loss(rng, self.iteration / self.schedule.iterations)
        if not torch.isfinite(losses["loss"]):
            raise RunError(f"the loss became {float(losses['loss'].detach())} at step {self.iteration}; lower --lr")
        self.optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(self.task.network.parameters(), self.schedule.clip)
        self.optimizer.step()
        # The average forgets the first, bad weights sooner than its decay alone would.
        decay = min(self.schedule.average, (1 + self.iteration) / (10 + self.iteration))
        with torch.no_grad():
            for name, value in self.task.network.state_dict().items():
                self.average[name].lerp_(value, 1 - decay) if value.is_floating_point() else self.average[name].copy_(
                    value
                )
        return {key: value.detach() for key, value in losses.items()}

    def _log(self, values: dict[str, float], seconds: float) -> None:
        row = {"iteration": self.iteration, "seconds": round(seconds, 4)} | {k: round(v, 5) for k, v in values.items()}
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": STAGE, **row}) + "\n")
        print(" ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
