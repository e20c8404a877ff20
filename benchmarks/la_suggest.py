"""Is the suggested case worth more than a random one? Label one more case in a finished run, train again, compare.

    python benchmarks/la_development.py DATASET RUNS --methods mean-teacher --labels 4
    python benchmarks/la_suggest.py DATASET RUNS RUNS/mean-teacher_4_seed0 [--random 0,1,2]

START is a finished run with N labels, as la_development.py leaves it. Its settings are taken over, so that the runs differ
in one labelled case alone: the first one that `scarceseg suggest START` names, or a random unlabelled one for each seed of
--random. Runs with N + 1 labels go into RUNS, are resumed, and finished ones are skipped. results/la_suggest/ gets one
JSON for each START with the Dice of all; it grows as runs end. A single case moves the Dice by chance too, which is what
several random cases and several START runs (seeds, numbers of labels) are for.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from common import provenance, save, training_code
from scarceseg import Config, suggest, train
from scarceseg.data.dataset import load_dataset
from scarceseg.errors import ConfigError
from table_runs import summary

NATIVE_MM = 0.625
# What the choice of a case depends on; each arm has the hash of what its training depends on.
CHOICE = tuple(f"active/{name}.py" for name in ("scores", "features", "measure", "suggest"))


def arms(start: Path, dataset: Path, seeds: list[int]) -> dict[str, str]:
    """The case to label by the name of the choice: "suggested", and "random0" for seed 0 and so on.

    Raises:
        ConfigError: no unlabelled case of the run has a label that could be used.
    """
    labels = {case.name for case in load_dataset(dataset).cases if case.label is not None}
    ranking = [one.case for one in suggest(start, 1).ranking if one.case in labels]
    if not ranking:
        raise ConfigError(f"none of the unlabelled cases of {start} has a label file: take a fully labelled dataset")
    pool = sorted(ranking)
    return {"suggested": ranking[0]} | {
        f"random{seed}": str(np.random.default_rng(seed).choice(pool)) for seed in seeds
    }


def run_arm(config: Config, run: Path) -> dict[str, Any]:
    """Train unless it is done; the aggregate numbers of the run."""
    stamp = run.with_name(f"{run.name}.json")
    if not stamp.exists():
        run.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(json.dumps(provenance(training_code(config.method))))
    if not (run / "evaluation.json").exists():
        train(config, run, resume=True)
    numbers = summary(run, config, NATIVE_MM)
    kept = ("dice", "jaccard", "hd95_mm", "asd_mm", "failed", "train_minutes")
    return {key: numbers[key] for key in kept} | json.loads(stamp.read_text(encoding="utf-8"))


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("start", type=Path, help="finished run to begin with")
    parser.add_argument("--random", default="0,1,2", help="seeds of random choices")
    options = parser.parse_args()

    first = Config.load(options.start / "config.yaml")
    labelled = json.loads((options.start / "split.json").read_text(encoding="utf-8"))["labelled"]
    before = summary(options.start, first, NATIVE_MM)
    result: dict[str, Any] = {
        "method": first.method,
        "labels": len(labelled),
        "start": {key: before[key] for key in ("dice", "jaccard", "hd95_mm", "asd_mm", "failed")},
        "config": first.model_dump(mode="json", exclude={"dataset"}),
        "arms": {},
    }
    seeds = [int(seed) for seed in options.random.split(",") if seed]
    done: dict[str, dict[str, Any]] = {}
    for name, case in arms(options.start, options.dataset, seeds).items():
        # Two draws of the same case are the same run.
        if case not in done:
            changes = {"dataset": str(options.dataset.resolve()), "labeled": sorted([*labelled, case])}
            run = options.runs / f"{options.start.name}_plus_{case}"
            done[case] = run_arm(Config.build(first.model_dump() | changes), run)
        result["arms"][name] = {"case": case} | done[case]
        random = [arm["dice"] for key, arm in result["arms"].items() if key != "suggested"]
        suggested = result["arms"]["suggested"]["dice"]
        result["gain"] = {
            "suggested": suggested - before["dice"],
            "random": float(np.mean(random)) - before["dice"] if random else None,
        }
        save(f"la_suggest/{options.start.name}", result | provenance(CHOICE))
        print(f"{name}: {case} Dice {done[case]['dice']:.4f} ({before['dice']:.4f} before)", flush=True)


if __name__ == "__main__":
    main()
