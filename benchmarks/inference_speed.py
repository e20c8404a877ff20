"""Predicting a volume of LA's size: half-overlapping windows in batches, or the whole at once, against 18x18x4 steps.

    python benchmarks/inference_speed.py [--patch 112,112,80] [--size 208,208,88] [--dataset DATASET --run RUN --cases 4]

Time: V-Net-16 with random weights on noise; of the published way `--windows` windows are measured and scaled up to all.
Dice: with `--run`, a trained run predicts some validation cases in all ways.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import INFERENCE, provenance, save
from scarceseg.data.dataset import load_dataset
from scarceseg.data.images import read_label, read_volume
from scarceseg.functional.sliding import count_windows, sliding_window
from scarceseg.inference.predictor import Predictor
from scarceseg.networks import build_network
from scarceseg.networks.selftest import to_memory_format
from table_runs import dice

STRIDE = (18, 18, 4)
DEFAULT = 4
BATCHES = (1, DEFAULT, 8)


def times(size: tuple[int, ...], patch: tuple[int, ...], windows: int) -> dict[str, Any]:
    """Seconds of all ways."""
    torch.manual_seed(0)
    volume = torch.randn(1, *size)
    network = build_network("vnet", 1, 2).eval()
    total = count_windows(size, patch, STRIDE)
    window = torch.randn(1, 1, *patch)
    with torch.inference_mode():
        network(window)
        start = time.perf_counter()
        for _ in range(windows):
            network(window).softmax(1)
        legacy = (time.perf_counter() - start) / windows * total
    fast = to_memory_format(network, "channels_last_3d")
    half = [max(side // 2, 1) for side in patch]
    batches = {}
    for batch in BATCHES:
        start = time.perf_counter()
        sliding_window(volume, fast, patch, batch=batch)
        batches[batch] = time.perf_counter() - start
    ours = batches[DEFAULT]
    whole = [-(-side // divisor) * divisor for side, divisor in zip(size, network.divisor, strict=True)]
    start = time.perf_counter()
    sliding_window(volume, fast, whole, batch=1)
    at_once = time.perf_counter() - start
    return {
        "legacy_windows": total,
        "legacy_windows_measured": windows,
        "legacy_seconds": legacy,
        "windows": count_windows(size, patch, half),
        "seconds": ours,
        "seconds_by_batch": batches,
        "ratio": legacy / ours,
        "whole_seconds": at_once,
        "whole_ratio": legacy / at_once,
    }


def dices(dataset: Path, run: Path, count: int) -> dict[str, Any]:
    """Mean Dice of all ways on the first validation cases of a run."""
    ways = {
        "dice": Predictor(run),
        "legacy_dice": Predictor(run, legacy=True),
        "whole_dice": Predictor(run, whole=True),
    }
    names = [path.name.split(".")[0] for path in sorted((run / "validation").glob("*.nii.gz"))][:count]
    found: dict[str, list[float]] = {key: [] for key in ways}
    for case in load_dataset(dataset).cases:
        if case.name not in names or case.label is None:
            continue
        volume, geometry = read_volume(case.images)
        reference = read_label(case.label, range(2), geometry) == 1
        for key, predictor in ways.items():
            found[key].append(dice(predictor.predict_volume(volume, geometry).label == 1, reference))
    return {key: float(np.mean(values)) for key, values in found.items()} | {"cases": len(found["dice"])}


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", default="112,112,80")
    parser.add_argument("--size", default="208,208,88")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--cases", type=int, default=4)
    options = parser.parse_args()
    patch, size = (tuple(map(int, text.split(","))) for text in (options.patch, options.size))
    result: dict[str, Any] = {"patch": patch, "size": size, **times(size, patch, options.windows)}
    if options.run and options.dataset:
        result |= dices(options.dataset, options.run, options.cases)
    save(f"inference_speed/{'x'.join(map(str, patch))}", result | provenance(INFERENCE))
    print(result)


if __name__ == "__main__":
    main()
