"""One full-resolution training step of each method in every arithmetic, as a ratio to float32 in the default layout.

    python benchmarks/step_speed.py [--methods mean-teacher] [--patch 112,112,80] [--precisions fp32,bf16] [--device cpu]

A step is 2 labelled and, where a term reads them, 2 unlabelled patches through V-Net-16: forward, terms, backward, update, EMA.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import nn

from common import processor, provenance, save, step_code
from scarceseg.config import OptimConfig
from scarceseg.engine.loop import build_optimizer
from scarceseg.engine.step import as_called, place, train_step
from scarceseg.methods import build_terms
from scarceseg.networks import build_network
from scarceseg.networks.selftest import to_memory_format
from scarceseg.types import Labelled, Unlabelled


def prepare_step(
    method: str,
    patch: tuple[int, ...],
    layout: str,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
    change: Callable[[nn.Module], nn.Module] = lambda network: network,
) -> Callable[[int], None]:
    """A step on random patches, to be called with its number.

    Args:
        change: of the student, once the terms are attached to it.
    """
    torch.manual_seed(0)
    student = to_memory_format(build_network("vnet", 1, 2).to(device), layout)
    terms = build_terms(method, {}, 2)
    for term in terms.values():
        term.attach(student)
        term.to(device)
    student = change(student)
    student.train()
    optimizer = build_optimizer(OptimConfig(), student, terms)
    model = as_called(student, terms)
    reads = any("unlabelled" in term.reads for term in terms.values())
    batch = (
        Labelled(torch.randn(2, 1, *patch), torch.randint(0, 2, (2, *patch)), ("a", "b")),
        Unlabelled(torch.randn(2, 1, *patch), ("c", "d")) if reads else None,
    )
    generator = torch.Generator(device=device)

    def step(t: int) -> None:
        placed = place(batch, device, layout)
        train_step(model, student, terms, optimizer, placed, t, 1000, generator, autocast)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def seconds(
    method: str, patch: tuple[int, ...], precision: str, layout: str, repeats: int, device: torch.device
) -> float:
    """Best time of one step after a warm-up step."""
    autocast = partial(torch.autocast, device.type, torch.bfloat16) if precision == "bf16" else nullcontext
    return first_and_best(prepare_step(method, patch, layout, device, autocast), repeats)[1]


def first_and_best(step: Callable[[int], None], repeats: int) -> tuple[float, float]:
    """Seconds of the first step, which warms up, and of the fastest after it."""
    times = []
    for t in range(repeats + 1):
        start = time.perf_counter()
        step(t)
        times.append(time.perf_counter() - start)
    return times[0], min(times[1:])


def main() -> None:
    """Measure all combinations in one process, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", default="mean-teacher")
    parser.add_argument("--patch", default="112,112,80")
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    patch = tuple(map(int, options.patch.split(",")))
    device = torch.device(options.device)
    # Rows of processors with and without bf16 instructions stand side by side.
    kind = "_bf16" if device.type == "cpu" and "bf16" in processor() else ""
    for method in options.methods.split(","):
        times = {}
        for precision in options.precisions.split(","):
            for layout in ("contiguous", "channels_last_3d"):
                times[f"{precision}/{layout}"] = seconds(method, patch, precision, layout, options.repeats, device)
                print(method, precision, layout, round(times[f"{precision}/{layout}"], 3), flush=True)
        base = times["fp32/contiguous"]
        save(
            f"step_speed/{method}_{'x'.join(map(str, patch))}_{device.type}{kind}",
            {
                "method": method,
                "patch": patch,
                "device": device.type,
                "seconds": times,
                "ratio": {key: base / value for key, value in times.items()},
                **provenance(step_code(method)),
            },
        )


if __name__ == "__main__":
    main()
