"""Losses and ramps, voxel by voxel, from the equations."""

from __future__ import annotations

import math

import numpy as np


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over axis 1."""
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def cross_entropy(logits: np.ndarray, label: np.ndarray) -> float:
    """Mean of -ln p(label) over voxels that are not 255."""
    p = softmax(logits.astype(np.float64))
    terms = [
        -math.log(p[(b, label[(b, *v)], *v)])
        for b in range(len(label))
        for v in np.ndindex(label[b].shape)
        if label[(b, *v)] != 255
    ]
    return sum(terms) / len(terms)


def dice_loss(logits: np.ndarray, label: np.ndarray, background: bool, smooth: float = 1e-5) -> float:
    """Mean over classes of 1 - (2 sum pg + s)/(sum p^2 + sum g + s), ignored voxels left out."""
    p = softmax(logits.astype(np.float64))
    losses = []
    for c in range(0 if background else 1, logits.shape[1]):
        pg = pp = g = 0.0
        for b in range(len(label)):
            for v in np.ndindex(label[b].shape):
                if label[(b, *v)] == 255:
                    continue
                hit = float(label[(b, *v)] == c)
                pg += p[(b, c, *v)] * hit
                pp += p[(b, c, *v)] ** 2
                g += hit
        losses.append(1 - (2 * pg + smooth) / (pp + g + smooth))
    return sum(losses) / len(losses)


def mean_teacher(student: np.ndarray, teacher: np.ndarray) -> float:
    """Mean squared difference of the two softmax outputs."""
    return float(np.mean((softmax(student.astype(np.float64)) - softmax(teacher.astype(np.float64))) ** 2))


def ua_mt(student: np.ndarray, teacher: np.ndarray, passes: list[np.ndarray], t: int, total: int) -> float:
    """UA-MT's masked consistency, voxel by voxel."""
    classes = student.shape[1]
    p, q = softmax(student.astype(np.float64)), softmax(teacher.astype(np.float64))
    mean = sum(softmax(x.astype(np.float64)) for x in passes) / len(passes)
    ramp = math.exp(-5 * (1 - min(t, total) / total) ** 2)
    threshold = (0.75 + 0.25 * ramp) * math.log(classes)
    summed, count = 0.0, 0
    for b in range(len(p)):
        for v in np.ndindex(p.shape[2:]):
            h = -sum(mean[(b, c, *v)] * math.log(mean[(b, c, *v)] + 1e-6) for c in range(classes))
            if h < threshold:
                count += 1
                summed += sum((p[(b, c, *v)] - q[(b, c, *v)]) ** 2 for c in range(classes))
    return summed / (classes * count + 1e-16)
