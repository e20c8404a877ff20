"""Small datasets and settings for tests that train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from scarceseg.config import Config


def tiny_dataset(
    folder: Path,
    cases: int = 5,
    labelled: int | None = None,
    *,
    classes: int = 2,
    channels: int = 1,
    size: tuple[int, int, int] = (21, 19, 17),
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.5),
) -> Path:
    """nnU-Net raw layout with bright boxes on a noisy ground; the first `labelled` cases (None: all) have a label file."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    names = {"background": 0} | {f"box{i}": i for i in range(1, classes)}
    meta = {"channel_names": {str(c): f"MR{c}" for c in range(channels)}, "labels": names, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(meta | {"numTraining": cases, "name": "tiny"}))
    for i in range(cases):
        g = np.random.default_rng(i)
        label = np.zeros(size, np.uint8)
        for c in range(1, classes):
            start = [int(g.integers(1, s // 2)) for s in size]
            label[tuple(slice(s, s + n // 2 - 1) for s, n in zip(start, size, strict=True))] = c
        for c in range(channels):
            image = g.normal(size=size).astype(np.float32) * 10 + 100 + 40.0 * label + 5 * c
            _write(image.astype(np.float32), spacing, folder / "imagesTr" / f"case_{i:02d}_{c:04d}.nii.gz")
        if labelled is None or i < labelled:
            _write(label, spacing, folder / "labelsTr" / f"case_{i:02d}.nii.gz")
    return folder


def _write(array: np.ndarray, spacing: tuple[float, float, float], path: Path) -> None:
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path))


def tiny_config(dataset: Path, **changes: Any) -> Config:
    """A run of a few seconds: V-Net with one filter, one stage of arithmetic, no self-test."""
    values: dict[str, Any] = {
        "dataset": str(dataset),
        "method": "mean-teacher",
        "labeled": 2,
        "network": {"name": "vnet", "args": {"n_filters": 1}},
        "plan": {"patch": [16, 16, 16], "spacing_mm": 1.0},
        "iterations": 6,
        "checkpoint_every": 1,
        "log_every": 1,
        "device": "cpu",
        "precision": "fp32",
        "memory_format": "contiguous",
    }
    return Config.build(values | changes)
