"""Runs of a table: every method with every number of labels, one JSON of aggregate numbers per run, resumed and skipped."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common import provenance, save, training_code
from scarceseg import Config, train
from scarceseg.data.dataset import load_dataset
from scarceseg.data.plan import Plan
from scarceseg.data.prepare import prepare_cases
from scarceseg.errors import ScarceSegError
from scarceseg.methods import parse_method
from scarceseg.methods.pseudo_labels import PseudoLabels


def add_options(parser: argparse.ArgumentParser, methods: str, labels: str, iterations: int | None) -> None:
    """What the user of a table's script may choose."""
    parser.add_argument("runs", type=Path)
    parser.add_argument("--methods", default=methods)
    parser.add_argument("--labels", default=labels)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=iterations)
    parser.add_argument("--set", action="append", default=[], help="any setting of the config, KEY=VALUE")
    parser.add_argument("--name", default="", help="of the variant that --set makes")
    parser.add_argument(
        "--tuned-by", default="", help="method whose runs have tuned the model of sfr, with the same settings"
    )


def tuned_by(options: argparse.Namespace, method: str, labels: int) -> dict[str, Any]:
    """Terms that take the tuned model over from the run of another method with the same labelled volumes."""
    term = next((term for term in parse_method(method) if term in ("sfr", "sfr+")), None)
    if not options.tuned_by or term is None or method == options.tuned_by:
        return {}
    return {"terms": {term: {"tuned_in": str(options.runs / f"{options.tuned_by}_{labels}_seed{options.seed}")}}}


def run_table(
    table: str, options: argparse.Namespace, configure: Callable[[str, int], Config], native_mm: float | None = None
) -> None:
    """Run what is missing and write ``results/<table>/<method>_<name>_<labels>_seed<seed>.json``.

    Args:
        configure: the config of a method with a number of labels.
        native_mm: voxel of the dataset, for distances in voxels too.
    """
    for labels in map(int, options.labels.split(",")):
        for method in options.methods.split(","):
            variant = f"_{options.name}" if options.name else ""
            name = f"{method}{variant}_{labels}_seed{options.seed}"
            run, stamp = options.runs / name, options.runs / f"{name}.json"
            config = configure(method, labels)
            try:
                if not stamp.exists():
                    options.runs.mkdir(parents=True, exist_ok=True)
                    stamp.write_text(json.dumps(provenance(training_code(method))))
                if not (run / "evaluation.json").exists():
                    train(config, run, resume=True)
            except ScarceSegError as error:
                print(f"{name}: {error}", flush=True)
                continue
            result = {"name": options.name} | summary(run, config, native_mm)
            save(f"{table}/{_slug(name)}", result | json.loads(stamp.read_text(encoding="utf-8")))
            print(f"{name}: Dice {result['dice']:.4f} HD95 {result['hd95_mm']} ASD {result['asd_mm']} mm", flush=True)


def _slug(name: str) -> str:
    """Name of a result's file, without commas and blanks."""
    return name.replace(",", "").replace(" ", "-")


def summary(run: Path, config: Config, native_mm: float | None) -> dict[str, Any]:
    """Aggregate numbers of a finished run, classes averaged; nothing in it comes from a single volume."""
    mean = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    stages = json.loads((run / "stages.json").read_text(encoding="utf-8"))
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    split = json.loads((run / "split.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [entry["seconds"] / config.log_every for entry in lines if entry["stage"] == "train" and entry["iteration"]]
    values = {key: _over_classes(mean["mean"], key) for key in ("dice", "jaccard", "hd95", "asd")}
    result = {
        "method": config.method,
        "labels": config.labeled,
        "unlabelled": len(split["unlabelled"]),
        "validation": len(split["val"]),
        "dice": values["dice"],
        "jaccard": values["jaccard"],
        "hd95_mm": values["hd95"],
        "asd_mm": values["asd"],
        "failed": len(mean["failed"]),
        "train_minutes": stages["train"]["seconds"] / 60,
        "stage_minutes": {k: v["seconds"] / 60 for k, v in stages.items() if k not in ("prepare", "train", "validate")},
        "pseudo_labels": guesses(run, Path(config.dataset)),
        "seconds_per_step": sorted(steps)[len(steps) // 2],
        "precision": environment["precision"],
        "memory_format": environment["memory_format"],
        "config": _without_folders(config),
    }
    if native_mm is not None:
        for key in ("hd95", "asd"):
            result[f"{key}_voxel"] = None if values[key] is None else values[key] / native_mm
    if len(mean["mean"]) > 1:
        result["classes"] = {name: metrics["dice"] for name, metrics in mean["mean"].items()}
    return result


def _without_folders(config: Config) -> dict[str, Any]:
    """The settings, with the names of other runs instead of their places."""
    values = config.model_dump(mode="json", exclude={"dataset"})
    for options in values["terms"].values():
        if options.get("tuned_in"):
            options["tuned_in"] = Path(options["tuned_in"]).name
    return values


def _over_classes(mean: dict[str, dict[str, float | None]], key: str) -> float | None:
    known = [value for metrics in mean.values() if (value := metrics[key]) is not None]
    return float(np.mean(known)) if known else None


def guesses(run: Path, dataset: Path) -> dict[str, dict[str, float]]:
    """Dice of every set of pseudo-labels a run left, by its stage: mean over classes and unlabelled volumes, prepared grid."""
    found = {}
    for stage, rows in scored(run, dataset).items():
        scores = [row["dice"] for row in rows.values()]
        found[stage] = {"dice": float(np.mean(scores)) if scores else 0.0, "volumes": len(scores)}
    return found


def scored(run: Path, dataset: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Dice and confidences of each pseudo-label a run left, by stage and volume; volumes that were left out are not in it."""
    plan = Plan.model_validate_json((run / "plan.json").read_text(encoding="utf-8"))
    hidden = json.loads((run / "split.json").read_text(encoding="utf-8"))["unlabelled"]
    cases = [case for case in load_dataset(dataset).cases if case.name in hidden]
    found: dict[str, dict[str, dict[str, float]]] = {}
    references = None
    for table in sorted(run.glob(f"stages/**/{PseudoLabels.TABLE}")):
        references = references or prepare_cases(cases, (), plan, None)
        labels = PseudoLabels(table.parent)
        rows = found[str(table.parent.relative_to(run / "stages"))] = {}
        for name in json.loads(table.read_text(encoding="utf-8"))["cases"]:
            guess, truth = np.asarray(labels.label(name)), np.asarray(references[name].label)
            if (guess != 255).any():
                score = float(np.mean([dice(guess == c, truth == c) for c in range(1, len(plan.classes))]))
                about = labels.notes(name)
                rows[name] = {"dice": score, **{k: about[k] for k in ("confidence", "foreground_confidence")}}
    return found


def dice(first: np.ndarray, second: np.ndarray) -> float:
    """Overlap of two masks; 1 when both are empty."""
    total = int(first.sum()) + int(second.sum())
    return 2.0 * int((first & second).sum()) / total if total else 1.0
