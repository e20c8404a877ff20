"""The demo: synthetic volumes, a few minutes on a CPU, the same code path as a real study."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from scarceseg.config import Config
from scarceseg.engine.folder import read_json, write_json
from scarceseg.engine.run import train
from scarceseg.errors import RunError
from scarceseg.evaluation.evaluate import evaluate
from scarceseg.inference.predictor import predict

TERMS: dict[str, dict[str, dict[str, Any]]] = {
    "mean-teacher": {},
    "mean-teacher+sfr": {"sfr": {"tune_iterations": 50}},
    "mean-teacher+semisam": {"semisam": {"every": 2, "tune_iterations": 100}},
}
"""The methods, with what makes them quick."""

LABELLED, CASES, TEST = 1, 16, 4
SHAPE, SPACING_MM = (40, 40, 32), (2.4, 2.4, 2.4)


def demo_config(data: Path, method: str, seed: int) -> Config:
    """A small run: V-Net with 8 filters, 32x32x32 patches, 200 iterations of AdamW.

    Precision and memory format are fixed, not timed: in so short a run rounding alone moves the result by a few points, and
    the same machine should see the same demo twice.
    """
    return Config.build(
        {
            "dataset": str(data),
            "method": method,
            "terms": TERMS[method],
            "labeled": LABELLED,
            "network": {"name": "vnet", "args": {"n_filters": 8}},
            "plan": {"patch": [32, 32, 32]},
            "iterations": 200,
            "optim": {"name": "adamw", "lr": 0.003, "schedule": "poly"},
            "foreground": 0.5,
            "batch_norm": "split",
            "precision": "fp32",
            "memory_format": "contiguous",
            "seed": seed,
        }
    )


def run_demo(out: Path, seed: int = 0) -> Path:
    """Make volumes, train each method with one labelled one, predict and evaluate unseen ones, and report.

    Args:
        out: folder to make, or one of an earlier demo with the same seed: what is finished there is not done again.
        seed: of the volumes and the training.

    Returns:
        The report, ``out/report.html``.

    Raises:
        RunError: `out` is taken.
    """
    from scarceseg.data.phantoms import PhantomConfig, write_phantom_dataset
    from scarceseg.evaluation.tables import print_evaluation
    from scarceseg.report import build_demo_report

    mark = out / "demo.json"
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and read_json(mark, None) != {"seed": seed}:
        raise RunError(f"{out} exists and is not a demo with seed {seed}: choose another --out")
    data = out / "data"
    write_json(mark, {"seed": seed})
    if not (data / "dataset.json").exists():
        shutil.rmtree(data, ignore_errors=True)  # what an interrupted demo left
        write_phantom_dataset(
            data, CASES, LABELLED, PhantomConfig(shape=SHAPE, spacing_mm=SPACING_MM), seed, test_cases=TEST
        )
    runs = {}
    for method in TERMS:
        run = out / method
        print(f"{method}: training with {LABELLED} labelled and {CASES - LABELLED} unlabelled volumes", flush=True)
        train(demo_config(data, method, seed), run, resume=True, cache=out / "cache")
        predict(run, [data / "imagesTs"], out / "predictions" / method)
        result = evaluate(out / "predictions" / method, data / "labelsTs", json=run / "test.json")
        print_evaluation(result)
        runs[method] = run
    summary = {method: read_json(run / "test.json", {})["mean"] for method, run in runs.items()}
    write_json(out / "summary.json", summary)
    return build_demo_report(out, runs)
