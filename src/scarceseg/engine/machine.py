"""What a run computes with and listens to: device, precision, processes, and the signals that stop it."""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment
from lightning_fabric.strategies import DDPStrategy

from scarceseg.config import Config
from scarceseg.data.plan import Plan
from scarceseg.engine.folder import environment, read_json, write_json
from scarceseg.engine.parallel import first_alone, processes
from scarceseg.errors import RunError
from scarceseg.networks.base import SegmentationNetwork
from scarceseg.networks.selftest import choose


def uses_cuda(config: Config) -> bool:
    """Whether the run works on a GPU."""
    return torch.cuda.is_available() and config.device != "cpu"


def make_fabric(config: Config, folder: Path, student: SegmentationNetwork, plan: Plan) -> tuple[Fabric, str, str]:
    """Device, precision and processes of a run, with the memory format of its networks.

    Raises:
        RunError: a GPU is asked for and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda: this machine shows no CUDA device; use --device cpu or auto")
    precision, memory_format = first_alone(lambda: _arithmetic(config, folder, student, plan))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    fabric = Fabric(
        accelerator="cuda" if uses_cuda(config) else "cpu",
        devices=here,
        num_nodes=processes() // here,
        # Not every part of a tuned foundation model takes part in every step.
        strategy=DDPStrategy(find_unused_parameters=True) if processes() > 1 else "auto",
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        # One process is one process, whatever the variables of a SLURM job say of its tasks.
        plugins=None if processes() > 1 else [LightningEnvironment()],
    )
    fabric.launch()
    return fabric, precision, memory_format


def _arithmetic(config: Config, folder: Path, student: SegmentationNetwork, plan: Plan) -> tuple[str, str]:
    """Precision and memory format; a resumed run keeps those it was started with."""
    accelerator = "cuda" if uses_cuda(config) else "cpu"
    path = folder / "environment.json"
    known = read_json(path, {})
    if known.get("device") == accelerator:
        return known["precision"], known["memory_format"]
    device = torch.device(accelerator)
    precision, memory_format, measured = choose(
        student, len(plan.channels), plan.patch, student.divisor, device, config.precision, config.memory_format
    )
    chosen = {"device": accelerator, "precision": precision, "memory_format": memory_format}
    write_json(path, environment() | chosen | {"processes": processes(), "selftest_seconds": measured})
    return precision, memory_format


PATIENCE = 1.0
"""Seconds after a Ctrl-C, or after the work has stopped for a SIGTERM, in which another one counts as the same."""


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C or SIGTERM into a request to stop after the step; a second Ctrl-C, a while later, stops at once.

    SIGTERM never does: ``torchrun`` and SLURM send it more than once within milliseconds, and the state is to be saved.
    One that comes while a stopped process closes down does not change its exit status either.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    pressed: list[float] = []
    terminated = threading.Event()

    def ask(number: int, _: object) -> None:
        asked.set()
        if number == signal.SIGTERM:
            terminated.set()
            return
        pressed.append(time.monotonic())
        if pressed[-1] - pressed[0] > PATIENCE:
            raise KeyboardInterrupt

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        if terminated.is_set() and old[signal.SIGTERM] is signal.SIG_DFL:
            old[signal.SIGTERM] = _repeated(time.monotonic() + PATIENCE)
            atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)  # else the interpreter's end sets SIG_DFL
        for number, handler in old.items():
            signal.signal(number, handler)


def _repeated(until: float) -> Callable[[int, object], None]:
    """A handler that overlooks a SIGTERM sent again before `until`, and lets a later one end the process."""

    def overlook(number: int, _: object) -> None:
        if time.monotonic() > until:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    return overlook
