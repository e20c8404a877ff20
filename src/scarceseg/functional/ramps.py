"""Weights over time: how strongly a term counts at iteration t of T.

Laine's ramps are quantised the way the published scripts do it: a run has `epochs` equal parts (40 parts of 150 iterations
in the usual T = 6000) and the weight changes between parts. Stated in parts of the run, the same recipe means the
same curve at any T; in the published scripts the length is tied to T = 6000.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Ramp = Callable[[int, int, int], float]
"""``(t, T, epochs) -> factor in [0, 1]``."""


def sigmoid_rampup(position: float, length: float) -> float:
    """Gaussian-shaped ramp-up, ``S(e, L) = exp(-5 (1 - clip(e, 0, L)/L)^2)``; 1 for L = 0 (Laine & Aila 2017, sec. 3.1).

    Args:
        position: e, in the unit of `length`.
        length: L >= 0.
    """
    if length == 0:
        return 1.0
    return math.exp(-5.0 * (1.0 - min(max(position, 0.0), length) / length) ** 2)


def epoch_of(t: int, total: int, epochs: int) -> int:
    """Index of the part that iteration t lies in; ``floor(t / 150)`` for T = 6000 and 40 parts."""
    return t * epochs // total


def constant(t: int, total: int, epochs: int) -> float:
    """Always 1."""
    return 1.0


def laine(t: int, total: int, epochs: int) -> float:
    """``S(epoch, epochs)``: the ramp-up of Mean Teacher and UA-MT (Laine & Aila 2017)."""
    return sigmoid_rampup(epoch_of(t, total, epochs), epochs)


def laine_down(t: int, total: int, epochs: int) -> float:
    """``S(epochs - epoch, epochs)``: the mirror image, as the SemiSAM script ramps its term down."""
    return sigmoid_rampup(epoch_of(total - t, total, epochs), epochs)


def semisam(t: int, total: int, epochs: int) -> float:
    """``exp(-5 (1 - t/T))``: ramp-up as printed in the SemiSAM paper (no square, not quantised)."""
    return math.exp(-5.0 * (1.0 - t / total))


def semisam_down(t: int, total: int, epochs: int) -> float:
    """``exp(-5 t/T)``: ramp-down as printed in the SemiSAM paper."""
    return math.exp(-5.0 * t / total)


RAMPS: dict[str, Ramp] = {
    "constant": constant,
    "laine": laine,
    "laine-down": laine_down,
    "semisam": semisam,
    "semisam-down": semisam_down,
}


def ema_alpha(t: int, decay: float) -> float:
    """``min(1 - 1/(t+1), decay)``: weight of the old teacher after iteration t (Tarvainen & Valpola 2017, eq. 2)."""
    return min(1.0 - 1.0 / (t + 1), decay)


def step_lr(t: int, lr: float, step: int, gamma: float) -> float:
    """``lr * gamma ** floor(t/step)``."""
    return lr * gamma ** (t // step)


def poly_lr(t: int, total: int, lr: float, power: float) -> float:
    """``lr * (1 - t/T) ** power``, in force for the update of iteration t.

    Differs from the authors' code: SSL4MIS computes the value after the update from the old counter, so that its
    iteration t uses ours of t - 1.
    """
    return lr * (1.0 - t / total) ** power


def uamt_threshold(t: int, total: int, classes: int) -> float:
    """``(0.75 + 0.25 S(t, T)) ln K``, in nats (Yu et al. 2019, sec. 2.2, where K = 2)."""
    return (0.75 + 0.25 * sigmoid_rampup(t, total)) * math.log(classes)
