"""LA development split: every method with every number of labels, one JSON of aggregate numbers per run.

    python benchmarks/la_development.py DATASET RUNS [--methods supervised,mean-teacher,ua-mt] [--labels 1,4,8,16]

DATASET is the folder of the 80 development volumes in nnU-Net raw layout. la_000 .. la_063 train (first N labelled, the
others unlabelled), la_064 .. la_079 validate. 1.25 mm, patch 64x64x48, 1000 iterations, V-Net-16, last checkpoint.
Runs are resumed, finished ones are skipped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import provenance, save
from scarceseg import Config, train
from scarceseg.errors import ScarceSegError

VALIDATION = [f"la_{i:03d}" for i in range(64, 80)]
SPACING, NATIVE_MM = 1.25, 0.625


def configuration(dataset: Path, method: str, labels: int, seed: int, iterations: int) -> Config:
    """The setting of the table."""
    return Config.build(
        {
            "dataset": str(dataset.resolve()),
            "method": method,
            "labeled": labels,
            "val": VALIDATION,
            "plan": {"spacing_mm": SPACING, "patch": [64, 64, 48]},
            "iterations": iterations,
            "seed": seed,
        }
    )


def summary(run: Path, config: Config) -> dict[str, Any]:
    """Aggregate numbers of a finished run; nothing in it comes from a single volume."""
    mean = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    (values,) = mean["mean"].values()
    stages = json.loads((run / "stages.json").read_text(encoding="utf-8"))
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    split = json.loads((run / "split.json").read_text(encoding="utf-8"))
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [entry["seconds"] / config.log_every for entry in last if entry["stage"] == "train" and entry["iteration"]]
    return {
        "method": config.method,
        "labels": config.labeled,
        "unlabelled": len(split["unlabelled"]),
        "validation": len(split["val"]),
        "dice": values["dice"],
        "jaccard": values["jaccard"],
        "hd95_mm": values["hd95"],
        "asd_mm": values["asd"],
        "hd95_voxel": None if values["hd95"] is None else values["hd95"] / NATIVE_MM,
        "asd_voxel": None if values["asd"] is None else values["asd"] / NATIVE_MM,
        "failed": len(mean["failed"]),
        "train_minutes": stages["train"]["seconds"] / 60,
        "seconds_per_step": sorted(steps)[len(steps) // 2],
        "precision": environment["precision"],
        "memory_format": environment["memory_format"],
        "config": config.model_dump(mode="json", exclude={"dataset"}),
    }


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--methods", default="supervised,mean-teacher,ua-mt")
    parser.add_argument("--labels", default="1,4,8,16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=1000)
    options = parser.parse_args()
    for labels in map(int, options.labels.split(",")):
        for method in options.methods.split(","):
            name = f"{method}_{labels}_seed{options.seed}"
            run = options.runs / name
            config = configuration(options.dataset, method, labels, options.seed, options.iterations)
            try:
                stamp = options.runs / f"{name}.json"
                if not stamp.exists():
                    options.runs.mkdir(parents=True, exist_ok=True)
                    stamp.write_text(json.dumps(provenance()))
                if not (run / "evaluation.json").exists():
                    train(config, run, resume=True)
            except ScarceSegError as error:
                print(f"{name}: {error}", flush=True)
                continue
            result = summary(run, config) | json.loads(stamp.read_text(encoding="utf-8"))
            save(f"la_development/{name}", result)
            print(f"{name}: Dice {result['dice']:.4f} HD95 {result['hd95_mm']} ASD {result['asd_mm']} mm", flush=True)


if __name__ == "__main__":
    main()
