"""LA development split: every method with every number of labels, one JSON of aggregate numbers per run.

    python benchmarks/la_development.py DATASET RUNS [--methods supervised,mean-teacher,ua-mt] [--labels 1,4,8,16]
    python benchmarks/la_development.py DATASET RUNS --methods mean-teacher+atlas --set terms.atlas.targets=soft --name soft

DATASET is the folder of the 80 development volumes in nnU-Net raw layout. la_000 .. la_063 train (first N labelled, the
others unlabelled), la_064 .. la_079 validate. 1.25 mm, patch 64x64x48, 1000 iterations, V-Net-16, last checkpoint.
Runs are resumed, finished ones are skipped. Reference labels of unlabelled cases are read here alone, after a run, to say how
good its pseudo-labels were.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from common import provenance, save, training_code
from scarceseg import Config, train
from scarceseg.config import merge
from scarceseg.data.dataset import load_dataset
from scarceseg.data.plan import Plan
from scarceseg.data.prepare import prepare_cases
from scarceseg.errors import ScarceSegError
from scarceseg.methods.pseudo_labels import PseudoLabels
from scarceseg.settings import read_assignments

VALIDATION = [f"la_{i:03d}" for i in range(64, 80)]
SPACING, NATIVE_MM = 1.25, 0.625


def configuration(
    dataset: Path, method: str, labels: int, seed: int, iterations: int, assignments: list[str] | None = None
) -> Config:
    """The setting of the table, with further settings on top."""
    return Config.build(
        merge(
            {
                "dataset": str(dataset.resolve()),
                "method": method,
                "labeled": labels,
                "val": VALIDATION,
                "plan": {"spacing_mm": SPACING, "patch": [64, 64, 48]},
                "iterations": iterations,
                "seed": seed,
            },
            read_assignments(assignments or []),
        )
    )


def guesses(run: Path, dataset: Path) -> dict[str, dict[str, float]]:
    """Dice of every set of pseudo-labels a run left, by its stage: mean over the unlabelled volumes, prepared grid."""
    plan = Plan.model_validate_json((run / "plan.json").read_text(encoding="utf-8"))
    hidden = json.loads((run / "split.json").read_text(encoding="utf-8"))["unlabelled"]
    cases = [case for case in load_dataset(dataset).cases if case.name in hidden]
    found: dict[str, dict[str, float]] = {}
    references = None
    for table in sorted(run.glob(f"stages/**/{PseudoLabels.TABLE}")):
        references = references or prepare_cases(cases, (), plan, None)
        labels = PseudoLabels(table.parent)
        scores = []
        for name in json.loads(table.read_text(encoding="utf-8"))["cases"]:
            guess, truth = np.asarray(labels.label(name)) == 1, np.asarray(references[name].label) == 1
            if (np.asarray(labels.label(name)) != 255).any():
                scores.append(2.0 * (guess & truth).sum() / max(guess.sum() + truth.sum(), 1))
        stage = str(table.parent.relative_to(run / "stages"))
        found[stage] = {"dice": float(np.mean(scores)) if scores else 0.0, "volumes": len(scores)}
    return found


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
        "stage_minutes": {k: v["seconds"] / 60 for k, v in stages.items() if k not in ("prepare", "train", "validate")},
        "pseudo_labels": guesses(run, Path(config.dataset)),
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
    parser.add_argument("--set", action="append", default=[], help="any setting of the config, KEY=VALUE")
    parser.add_argument("--name", default="", help="of the variant that --set makes")
    options = parser.parse_args()
    for labels in map(int, options.labels.split(",")):
        for method in options.methods.split(","):
            variant = f"_{options.name}" if options.name else ""
            name = f"{method}{variant}_{labels}_seed{options.seed}"
            run = options.runs / name
            config = configuration(options.dataset, method, labels, options.seed, options.iterations, options.set)
            try:
                stamp = options.runs / f"{name}.json"
                if not stamp.exists():
                    options.runs.mkdir(parents=True, exist_ok=True)
                    stamp.write_text(json.dumps(provenance(training_code(method))))
                if not (run / "evaluation.json").exists():
                    train(config, run, resume=True)
            except ScarceSegError as error:
                print(f"{name}: {error}", flush=True)
                continue
            result = {"name": options.name} | summary(run, config) | json.loads(stamp.read_text(encoding="utf-8"))
            save(f"la_development/{name}", result)
            print(f"{name}: Dice {result['dice']:.4f} HD95 {result['hd95_mm']} ASD {result['asd_mm']} mm", flush=True)


if __name__ == "__main__":
    main()
