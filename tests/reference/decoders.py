"""The terms with heads, decoders or cubes of their own, voxel by voxel, from the equations."""

from __future__ import annotations

import math

import numpy as np

from tests.reference.losses import softmax


def upsample_trilinear(x: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Linear interpolation of the last three axes, voxel centres at ``(i + 0.5) * old / new - 0.5``, edges repeated."""
    for axis, new in zip(range(x.ndim - 3, x.ndim), size, strict=True):
        old = x.shape[axis]
        out = []
        for i in range(new):
            at = max((i + 0.5) * old / new - 0.5, 0.0)
            low = min(int(at), old - 1)
            high = min(low + 1, old - 1)
            part = at - low
            out.append((1 - part) * x.take(low, axis) + part * x.take(high, axis))
        x = np.stack(out, axis)
    return x


def conv_1x1(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """1x1x1 convolution with a torch weight ``[out, in, 1, 1, 1]``."""
    return np.einsum("oc,bcxyz->boxyz", weight[:, :, 0, 0, 0], x) + bias[None, :, None, None, None]


def urpc(logits: list[np.ndarray]) -> float:
    """Mean over scales of mean(d^2 e^-v) / mean(e^-v) + mean(v)."""
    p = [softmax(x.astype(np.float64)) for x in logits]
    mean = sum(p) / len(p)
    total = 0.0
    for one in p:
        rectified, certainty, variance, voxels = 0.0, 0.0, 0.0, 0
        for b in range(len(one)):
            for v in np.ndindex(one.shape[2:]):
                a, m = one[(b, slice(None), *v)], mean[(b, slice(None), *v)]
                kl = sum(a[c] * math.log(a[c] / m[c]) for c in range(len(a)))
                rectified += math.exp(-kl) * sum((a - m) ** 2) / len(a)
                certainty += math.exp(-kl)
                variance += kl
                voxels += 1
        total += rectified / certainty + variance / voxels
    return total / len(p)


def signed_distance(mask: np.ndarray) -> np.ndarray:
    """Nearest-voxel search; outside positive, inside negative, both over their largest value, inner boundary 0."""
    if not mask.any():
        return np.ones(mask.shape)
    if mask.all():
        return -np.ones(mask.shape)
    inside, outside = np.argwhere(mask), np.argwhere(~mask)
    result = np.zeros(mask.shape)
    for v in np.ndindex(mask.shape):
        if mask[v]:
            squared = min(((outside - v) ** 2).sum(1))
            result[v] = 0.0 if squared == 1 else -math.sqrt(squared)
        else:
            result[v] = math.sqrt(min(((inside - v) ** 2).sum(1)))
    deepest = -result.min()
    return np.where(result > 0, result / result.max(), result / (deepest or 1.0))


def dtc(distances: list[np.ndarray], logits: list[np.ndarray]) -> float:
    """Mean over rows, foreground classes and voxels of (1 / (1 + e^(1500 z)) - p)^2."""
    errors = []
    for z, x in zip(distances, logits, strict=True):
        p = softmax(x.astype(np.float64))[:, 1:]
        implied = 1 / (1 + np.exp(np.clip(1500 * z.astype(np.float64), -700, 700)))
        errors.append(((implied - p) ** 2).ravel())
    return float(np.concatenate(errors).mean())


def mc_net(logits: list[np.ndarray], temperature: float) -> float:
    """Sum over ordered pairs of the mean squared difference between p_i and the sharpened p_j."""
    p = [softmax(x.astype(np.float64)) for x in logits]
    sharp = [one ** (1 / temperature) for one in p]
    sharp = [one / one.sum(1, keepdims=True) for one in sharp]
    return sum(float(((p[i] - sharp[j]) ** 2).mean()) for i in range(len(p)) for j in range(len(p)) if i != j)


def swapped(x: np.ndarray, edges: list[list[int]], order: np.ndarray) -> np.ndarray:
    """Row b takes every voxel from the row that `order` names for the voxel's cube; positions count z fastest."""
    result = np.empty_like(x)
    for v in np.ndindex(x.shape[-3:]):
        i, j, k = (sum(at >= edge for edge in axis[1:-1]) for at, axis in zip(v, edges, strict=True))
        position = (i * (len(edges[1]) - 1) + j) * (len(edges[2]) - 1) + k
        for b in range(len(x)):
            result[(b, ..., *v)] = x[(order[position, b], ..., *v)]
    return result


def blended(whole: np.ndarray, cubes: np.ndarray, frequency: np.ndarray, temperature: float) -> np.ndarray:
    """w p + (1 - w) q with w from the frequency of the class that p calls, voxel by voxel."""
    p, q = softmax(whole.astype(np.float64)), softmax(cubes.astype(np.float64))
    result = np.empty_like(p)
    for b in range(len(p)):
        for v in np.ndindex(p.shape[2:]):
            at = (b, slice(None), *v)
            w = (frequency[p[at].argmax()] / frequency.max()) ** (1 / temperature)
            result[at] = w * p[at] + (1 - w) * q[at]
    return result
