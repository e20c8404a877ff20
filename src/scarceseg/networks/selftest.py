"""Which precision and memory format is fastest here: measured on the network itself, in a few seconds."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from scarceseg.errors import ConfigError

Precision = Literal["fp32", "bf16"]
MemoryFormat = Literal["contiguous", "channels_last_3d"]
Arithmetic = tuple[Precision, MemoryFormat]

# bf16 costs mantissa bits: it has to pay for them.
_BF16_GAIN = 1.15
# Rounding to bf16 moves a gradient by less than 0.01 of its largest value, a broken kernel by more than that value.
_BF16_ERROR = 0.1
_FEW_VOXELS = 1024


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


def broken_in_bf16(network: nn.Module, channels: int, patch: Sequence[int], device: torch.device) -> list[int] | None:
    """Size of an input on which bf16 gives a convolution of the network a wrong gradient here; None when all are right.

    PyTorch 2.13 on processors with bf16 instructions has such a fault: where the first side of the input has two voxels,
    the gradient of the weights of a 3x3x3 convolution is made of memory that was never written, and sooner or later NaN.
    Each kind of convolution is compared with float32 on the sizes it has in a patch; large ones are not, as it would take long.

    Args:
        network: is not changed; None at once for one without 3D convolutions.
        channels, patch: of its input.
        device: where it will run.
    """
    seen: dict[tuple[object, ...], tuple[nn.Conv3d, torch.Size]] = {}

    def note(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(layer, nn.Conv3d)
        size = inputs[0].shape
        if size[2:].numel() <= _FEW_VOXELS:
            kind = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups > 1, size[2:])
            seen.setdefault(kind, (layer, size))

    if not any(isinstance(module, nn.Conv3d) for module in network.modules()):
        return None
    model = copy.deepcopy(network).to(device).eval().requires_grad_(True)
    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, nn.Conv3d)]
    with torch.no_grad():
        model(torch.randn(1, channels, *patch, device=device))
    for hook in hooks:
        hook.remove()
    wrong = (list(size[2:]) for layer, size in seen.values() if _gradient_error(layer, size, device) > _BF16_ERROR)
    return next(wrong, None)


def _gradient_error(layer: nn.Conv3d, size: torch.Size, device: torch.device) -> float:
    """Largest error of the weights' gradient in bf16, as a share of the largest value; infinite when it is not finite.

    Of a layer whose weight is put together (LoRA) these are the gradients of its parts.
    """
    x = torch.randn(2, *size[1:], device=device)
    weights = [weight for name, weight in layer.named_parameters() if not name.endswith("bias")]
    found: list[tuple[torch.Tensor, ...]] = []
    for enabled in (False, True):
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            out = layer(x)
        if not found:
            sent = torch.randn_like(out)
        found.append(torch.autograd.grad(out.float(), weights, sent))
    errors = [float((b - a).abs().max() / a.abs().max().clamp_min(1e-12)) for a, b in zip(*found, strict=True)]
    return max(error if math.isfinite(error) else math.inf for error in errors)


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
    a run keeps in its folder and ``precision`` and ``memory_format`` of the config fix. On a CPU bf16 is only taken where
    `broken_in_bf16` finds nothing.

    Returns:
        Precision, memory format, and the measured seconds by ``precision/memory format`` (empty when nothing was open).

    Raises:
        ConfigError: bf16 is asked for and computes wrong gradients here.
    """
    state = torch.get_rng_state()
    precisions: list[Precision] = _candidates(device) if precision == "auto" else [precision]  # type: ignore[list-item]
    if "bf16" in precisions and device.type == "cpu":
        broken = broken_in_bf16(network, channels, patch, device)
        if broken is not None and precision == "bf16":
            raise ConfigError(
                f"precision: bf16 computes wrong gradients on this processor, for convolutions on {'x'.join(map(str, broken))} "
                "voxels: take auto or fp32, or a larger patch"
            )
        if broken is not None:
            precisions = ["fp32"]
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
