"""Where a training step spends its time, by kind of operation, and what torch.compile would bring.

    python benchmarks/step_profile.py [--methods mean-teacher] [--patch 64,64,48] [--layout channels_last_3d] [--compile]

The step of `step_speed.py` in float32 under torch.profiler: time inside each operation without what it calls, as a share of
all of them. With --compile the student is compiled too, and its steps are timed after the compilation.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from common import provenance, save, step_code
from step_speed import first_and_best, prepare_step

KINDS = {
    "convolution, backward": ("convolution_backward", "conv3d_backward"),
    "convolution, forward": ("convolution", "conv_transpose", "conv3d", "slow_conv"),
    "batch norm, backward": ("batch_norm_backward",),
    "batch norm, forward": ("batch_norm",),
    "optimiser and EMA": ("_foreach", "fused", "lerp"),
    "copies and layout": ("copy_", "contiguous", "clone", "_to_copy", "cat", "fill_", "zero_", "zeros"),
}
REST = "everything else"


def kind_of(operation: str) -> str:
    """The row an operation is counted in."""
    return next((kind for kind, parts in KINDS.items() if any(part in operation for part in parts)), REST)


def shares(method: str, patch: tuple[int, ...], layout: str, repeats: int) -> dict[str, float]:
    """Share of a step's time by kind of operation."""
    step = prepare_step(method, patch, layout, torch.device("cpu"), nullcontext)
    step(0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for t in range(1, repeats + 1):
            step(t)
    found: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        found[kind_of(event.key)] += event.self_cpu_time_total
    total = sum(found.values())
    return {kind: value / total for kind, value in sorted(found.items(), key=lambda item: -item[1])}


def timed(method: str, patch: tuple[int, ...], layout: str, repeats: int, compiled: bool) -> dict[str, float]:
    """Best seconds of a step, and of the first one, which compiles."""

    def change(network: nn.Module) -> nn.Module:
        if compiled:
            network.compile()
        return network

    step = prepare_step(method, patch, layout, torch.device("cpu"), nullcontext, change)
    first, best = first_and_best(step, repeats)
    return {"first": first, "best": best}


def main() -> None:
    """Profile, and time with and without compilation where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="mean-teacher")
    parser.add_argument("--patch", default="64,64,48")
    parser.add_argument("--layout", default="channels_last_3d")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    patch = tuple(map(int, options.patch.split(",")))
    for method in options.methods.split(","):
        result: dict[str, Any] = {"method": method, "patch": patch, "layout": options.layout}
        result["shares"] = shares(method, patch, options.layout, options.repeats)
        if options.compile:
            for name, compiled in (("plain", False), ("compiled", True)):
                result[name] = timed(method, patch, options.layout, options.repeats, compiled)
        save(f"step_profile/{method}_{'x'.join(map(str, patch))}", result | provenance(step_code(method)))
        print(result, flush=True)


if __name__ == "__main__":
    main()
