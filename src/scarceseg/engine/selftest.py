"""Which precision and memory format is fastest here: measured on the network itself, in a few seconds."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

Precision = Literal["fp32", "bf16"]
MemoryFormat = Literal["contiguous", "channels_last_3d"]
Arithmetic = tuple[Precision, MemoryFormat]

# bf16 costs mantissa bits: it has to pay for them.
_BF16_GAIN = 1.15


def to_memory_format(module: nn.Module, memory_format: str) -> nn.Module:
    """Convert a network's weights in place: channels_last_3d, or contiguous."""
    wanted = torch.channels_last_3d if memory_format == "channels_last_3d" else torch.contiguous_format
    return module.to(memory_format=wanted)  # type: ignore[call-overload]


def seconds_per_step(
    network: nn.Module, shape: Sequence[int], device: torch.device, options: Sequence[Arithmetic], repeats: int = 2
) -> dict[Arithmetic, float]:
    """Best time of one forward and backward pass on random input of `shape` ``[B, C, X, Y, Z]``, seconds.

    The options take turns, so that other work on the machine slows all of them and not just one.
    """
    models = {o: to_memory_format(copy.deepcopy(network).to(device), o[1]).train() for o in options}
    x = torch.randn(*shape, device=device)
    best = dict.fromkeys(options, float("inf"))
    for turn in range(repeats + 1):
        for option in options:
            seconds = _seconds(models[option], x, *option)
            if turn:  # the first turn warms up
                best[option] = min(best[option], seconds)
    return best


def _seconds(model: nn.Module, x: torch.Tensor, precision: Precision, memory_format: MemoryFormat) -> float:
    if memory_format == "channels_last_3d":
        x = x.contiguous(memory_format=torch.channels_last_3d)
    start = time.perf_counter()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = model(x)
    logits.float().square().mean().backward()
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return seconds


def _candidates(device: torch.device) -> list[Precision]:
    """bf16 is worth a test of the whole network only where a single convolution is faster with it.

    On processors without bf16 instructions it is slower, and the test of a whole network would cost more than it saves.
    The layer has many channels: with few, the time is that of moving memory, and the two lie too close together to tell.
    """
    layer = nn.Conv3d(64, 64, 3, padding=1)
    shape = (2, 64, 16, 16, 16)
    options: list[Arithmetic] = [("fp32", "channels_last_3d"), ("bf16", "channels_last_3d")]
    fp32, bf16 = seconds_per_step(layer, shape, device, options, repeats=5).values()
    return ["fp32", "bf16"] if bf16 < fp32 else ["fp32"]


def choose(
    network: nn.Module,
    channels: int,
    patch: Sequence[int],
    divisor: Sequence[int],
    device: torch.device,
    precision: str = "auto",
    memory_format: str = "auto",
) -> tuple[Precision, MemoryFormat, dict[str, float]]:
    """Fastest combination of those the settings leave open.

    The test uses two patches of at most 48 voxels a side. bf16 is taken only when it is at least 1.15 times faster than
    float32 in the same run. Formats differ in rounding: two runs are equal bit for bit only with the same choice, which
    a run keeps in its folder and ``precision`` and ``memory_format`` of the config fix.

    Returns:
        Precision, memory format, and the measured seconds by ``precision/memory format`` (empty when nothing was open).
    """
    state = torch.get_rng_state()
    precisions: list[Precision] = _candidates(device) if precision == "auto" else [precision]  # type: ignore[list-item]
    formats: list[MemoryFormat] = (
        ["contiguous", "channels_last_3d"] if memory_format == "auto" else [memory_format]  # type: ignore[list-item]
    )
    if len(precisions) * len(formats) == 1:
        torch.set_rng_state(state)
        return precisions[0], formats[0], {}
    sides = [max(min(p, 48) // d, 1) * d for p, d in zip(patch, divisor, strict=True)]
    options = [(p, f) for p in precisions for f in formats]
    times = seconds_per_step(network, (2, channels, *sides), device, options)
    torch.set_rng_state(state)
    measured = {f"{p}/{f}": round(seconds, 4) for (p, f), seconds in times.items()}
    fastest = min(times, key=lambda key: times[key] * (_BF16_GAIN if key[0] == "bf16" else 1.0))
    return fastest[0], fastest[1], measured
