"""Metrics of one LA-sized case against the plain way: whole-volume erosion and two whole-volume distance transforms.

    python benchmarks/metrics_speed.py

Synthetic masks of 180x140x88 voxels of 0.625 mm, shortest processor time of several repetitions.
Writes metrics_speed.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import ndimage

from common import provenance, save
from scarceseg.evaluation.metrics import METRICS, binary_metrics

SHAPE, SPACING = (180, 140, 88), (0.625, 0.625, 0.625)
CODE = ("evaluation/metrics.py",)


def plain_metrics(prediction: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """The usual implementation, on the whole volume."""
    cross = ndimage.generate_binary_structure(3, 1)
    p, r = (mask ^ ndimage.binary_erosion(mask, cross) for mask in (prediction, reference))
    there = ndimage.distance_transform_edt(~r, sampling=SPACING)[p]
    back = ndimage.distance_transform_edt(~p, sampling=SPACING)[r]
    both, common = np.concatenate([there, back]), np.count_nonzero(prediction & reference)
    total = np.count_nonzero(prediction) + np.count_nonzero(reference)
    values = (2 * common / total, common / (total - common), there.mean(), both.mean(), np.percentile(both, 95))
    return dict(zip(METRICS, map(float, values), strict=True))


def blob(seed: int, shift: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
    """An ellipsoid of atrium size with a random smooth outline."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), 6) * 40
    grid = np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij", sparse=True)
    centre = (88 + shift[0], 70 + shift[1], 44 + shift[2])
    return 1 - sum(((x - c) / r) ** 2 for x, c, r in zip(grid, centre, (50, 36, 30), strict=True)) + 0.35 * noise > 0


def best(function: Callable[[], Any], repetitions: int) -> tuple[float, Any]:
    """Shortest processor time in seconds, which other programs disturb little, and the result."""
    times = []
    for _ in range(repetitions):
        start = time.process_time()
        result = function()
        times.append(time.process_time() - start)
    return min(times), result


def main(repetitions: int = 9) -> None:
    """Time every pair of masks both ways and write the ratios."""
    reference = blob(1)
    pairs = {
        "close prediction": blob(1, (2, 1, -1)),
        "poor prediction": blob(2, (6, -4, 3)),
        "prediction elsewhere": np.roll(reference, (60, 50, 0), (0, 1, 2)),
        "one voxel": np.arange(reference.size).reshape(SHAPE) == reference.size // 3,
        "noise (untrained network)": np.random.default_rng(3).random(SHAPE) < 0.5,
    }
    rows = []
    for name, prediction in pairs.items():
        plain, expected = best(lambda p=prediction: plain_metrics(p, reference), max(repetitions // 3, 1))  # type: ignore[misc]
        fast, got = best(lambda p=prediction: binary_metrics(p, reference, SPACING), repetitions)  # type: ignore[misc]
        difference = max(abs(got[metric] - expected[metric]) for metric in METRICS)
        if difference > 1e-9:
            raise AssertionError(f"{name}: the two ways differ by {difference}")
        rows.append(
            {
                "masks": name,
                "dice": round(got["dice"], 4),
                "plain_ms": round(1e3 * plain, 1),
                "ms": round(1e3 * fast, 1),
                "ratio": round(plain / fast, 1),
                "largest_difference": difference,
            }
        )
        print(f"{name:26} {1e3 * plain:8.1f} ms -> {1e3 * fast:7.1f} ms, {plain / fast:5.1f}x")
    values = {"shape": SHAPE, "spacing_mm": SPACING, "repetitions": repetitions, "rows": rows}
    save("metrics_speed", provenance(CODE) | values)


if __name__ == "__main__":
    main()
