"""SemiSAM's loss voxel by voxel, from the equations; answers and weights are given."""

from __future__ import annotations

import numpy as np

from tests.reference.losses import softmax


def semisam(
    logits: np.ndarray, answers: dict[tuple[int, int], np.ndarray], quality: float, gate: dict[str, float] | None
) -> float:
    """``mean(w (p - s)^2)`` over rows, foreground classes and voxels; a class nothing was asked about has w = 0.

    Args:
        logits: of the student ``[U, K, X, Y, Z]``.
        answers: probability ``[X, Y, Z]`` by (row, foreground class from 0).
        quality: IoU the model claims.
        gate: `low`, `high` of the agreement, `sure` (quality from which on all counts) and `doubt`; None is w = 1.
    """
    p = softmax(logits.astype(np.float64))[:, 1:]
    merged = {}
    for row, index in answers:
        odds = [
            answers[row, k].astype(np.float64) / (1 - answers[row, k].astype(np.float64))
            for k in range(p.shape[1])
            if (row, k) in answers
        ]
        own = answers[row, index].astype(np.float64)
        merged[row, index] = own / (1 - own) / (1 + sum(odds))
    total = 0.0
    for (row, index), s in merged.items():
        q = p[row, index]
        alike = 2 * float((q * s).sum()) / float((q + s).sum())
        mask = 1.0
        if gate is not None:
            mask = min(max((alike - gate["low"]) / (gate["high"] - gate["low"]), 0), 1) * min(quality / gate["sure"], 1)
        for v in np.ndindex(s.shape):
            w = mask
            if gate is not None:
                w *= abs(2 * s[v] - 1) * (1 - gate["doubt"] * abs(2 * q[v] - 1))
            total += w * (q[v] - s[v]) ** 2
    return total / p.size
