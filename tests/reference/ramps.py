"""Weights over time, from the equations."""

from __future__ import annotations

import math


def part(t: int, total: int, parts: int) -> int:
    """Of the equal parts of a run, the one iteration t lies in."""
    number = 0
    while (number + 1) * total <= t * parts:
        number += 1
    return number


def rampup(position: float, length: float) -> float:
    """``exp(-5 (1 - s/S)^2)`` (Laine & Aila 2017)."""
    s = 0.0 if position < 0 else length if position > length else position
    return math.exp(-5 * (1 - s / length) * (1 - s / length))


RAMPS = {
    "constant": lambda t, total, parts: 1.0,
    "laine": lambda t, total, parts: rampup(part(t, total, parts), parts),
    "laine-down": lambda t, total, parts: rampup(part(total - t, total, parts), parts),
    "semisam": lambda t, total, parts: math.exp(-5) * math.exp(5 * t / total),
    "semisam-down": lambda t, total, parts: 1 / math.exp(5 * t / total),
}


def step_lr(t: int, lr: float, step: int, gamma: float) -> float:
    """Multiplied by gamma after every `step` iterations."""
    for _ in range(step, t + 1, step):
        lr *= gamma
    return lr


def poly_lr(t: int, total: int, lr: float, power: float) -> float:
    """``lr (1 - t/T)^power``."""
    return lr * math.exp(power * math.log(1 - t / total))
