"""A run folder as the engine leaves it, made of phantoms and made-up numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from scarceseg.config import Config
from scarceseg.data.phantoms import PhantomConfig, make_phantom

METRICS = ("dice", "jaccard", "asd", "assd", "hd95")


def evaluation(cases: list[str], classes: list[str], shift: float = 0.0, seed: int = 0) -> dict[str, Any]:
    """A result in the form `evaluate` writes; the first class of the last case failed."""
    rng = np.random.default_rng(seed)
    values: dict[str, dict[str, dict[str, float | None]]] = {}
    for case in cases:
        values[case] = {}
        for name in classes:
            dice = float(np.clip(rng.normal(0.72 + shift, 0.1), 0, 1))
            distance = float(rng.gamma(2, 1.5))
            row = (dice, dice / (2 - dice), distance, distance * 1.1, distance * 3)
            values[case][name] = dict(zip(METRICS, row, strict=True))
    values[cases[-1]][classes[0]] = {"dice": 0.0, "jaccard": 0.0, "asd": None, "assd": None, "hd95": None}

    def mean(name: str, metric: str) -> float:
        known = [v for row in values.values() if (v := row[name][metric]) is not None]
        return float(np.mean(known))

    return {
        "units": "mm",
        "cases": values,
        "mean": {name: {metric: mean(name, metric) for metric in METRICS} for name in classes},
        "failed": [{"case": cases[-1], "class": classes[0], "reason": "empty prediction"}],
        "absent": {name: int(name == classes[-1]) for name in classes},
    }


def metrics_lines(terms: list[str], classes: list[str], total: int = 400) -> str:
    """``metrics.jsonl`` of a finished run."""
    rng = np.random.default_rng(1)
    lines = []
    for t in range(0, total, 10):
        entry: dict[str, Any] = {"iteration": t, "stage": "train", "lr": 0.01 if t < total * 0.7 else 0.001}
        for number, term in enumerate(terms):
            entry[f"loss/{term}"] = float(
                np.exp(-t / 150) * (0.8 if number == 0 else 0.05) * rng.uniform(0.7, 1.3) + 0.01
            )
            entry[f"weight/{term}"] = 1.0 if number == 0 else float(0.1 * np.exp(-5 * (1 - t / total) ** 2))
        entry["loss"] = sum(entry[f"loss/{term}"] * entry[f"weight/{term}"] for term in terms)
        lines.append(json.dumps(entry | {"seconds": 0.3}))
        if t % 50 == 0:
            dice = {f"dice/{n}": float(0.8 * (1 - np.exp(-(t + 20) / (90 + 40 * k)))) for k, n in enumerate(classes)}
            lines.append(json.dumps({"iteration": t + 10, "stage": "validation", **dice}))
    return "\n".join(lines) + "\n"


def figure(
    path: Path, title: str, seed: int, config: PhantomConfig, reference: bool = True, direction: bool = False
) -> None:
    volume, label, geometry = make_phantom(seed, config)
    moved = np.roll(label, (1, -1, 1), (0, 1, 2))
    border = ndimage.gaussian_filter((moved > 0).astype(np.float32), 1.5)
    arrays = {"image": volume[0], "prediction": moved, "uncertainty": border * (1 - border)}
    if reference:
        arrays["reference"] = label
    if direction:
        arrays["direction"] = np.array(geometry.direction)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, title=title, spacing_mm=np.array(geometry.spacing_mm), **arrays)


def make_run(
    folder: Path,
    classes: list[str] | None = None,
    cases: list[str] | None = None,
    method: str = "mean-teacher",
    shape: tuple[int, int, int] = (20, 18, 16),
    direction: bool = False,
    shift: float = 0.0,
) -> Path:
    """A finished run with every file a report can show."""
    classes = classes or ["chamber", "lobe"]
    cases = cases or [f"phantom_{k:03d}" for k in range(90, 98)]
    folder.mkdir(parents=True)
    config = Config.build({"dataset": "/data/phantoms", "method": method, "iterations": 400, "val": cases})
    (folder / "config.yaml").write_text(config.dump(), encoding="utf-8")
    files: dict[str, Any] = {
        "plan.json": {
            "dataset": "phantoms",
            "channels": ["MR"],
            "classes": ["background", *classes],
            "spacing_mm": [2.0, 2.0, 2.5],
            "patch": [48, 48, 32],
            "normalisation": [{"kind": "zscore"}],
        },
        "split.json": {
            "labelled": ["phantom_000", "phantom_001"],
            "unlabelled": [f"phantom_{k:03d}" for k in range(2, 16)],
            "val": cases,
        },
        "stages.json": {
            "prepare": {"seconds": 4.2, "peak_memory_mb": 610},
            "train": {"seconds": 171.0, "peak_memory_mb": 1840},
            "validate": {"seconds": 12.9, "peak_memory_mb": 1840},
        },
        "environment.json": {
            "python": "3.11.9",
            "system": "Linux",
            "machine": "x86_64",
            "threads": 2,
            "versions": {"scarceseg": "0.1.0", "torch": "2.13.0"},
            "device": "cpu",
            "precision": "bf16",
            "memory_format": "channels_last_3d",
        },
        "evaluation.json": evaluation(cases, classes, shift),
        "warnings.json": ["case 'phantom_003' is smaller than the patch; it is padded"],
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    terms = list(dict.fromkeys(["supervised", *method.split("+")]))
    (folder / "metrics.jsonl").write_text(metrics_lines(terms, classes))
    (folder / "model.safetensors").write_bytes(b"")
    look = PhantomConfig(shape=shape, classes=len(classes), spacing_mm=(2.0, 2.0, 2.5))
    figure(folder / "figures" / "best_a.npz", f"{cases[0]} (best)", 1, look, direction=direction)
    figure(folder / "figures" / "worst_b.npz", f"{cases[-1]} (worst)", 2, look, direction=direction)
    return folder
