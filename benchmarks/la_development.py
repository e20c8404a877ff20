"""LA development split: every method with every number of labels, one JSON of aggregate numbers per run.

    python benchmarks/la_development.py DATASET RUNS [--methods supervised,mean-teacher,ua-mt] [--labels 1,4,8,16]
    python benchmarks/la_development.py DATASET RUNS --methods mean-teacher+atlas --set terms.atlas.targets=soft --name soft
    python benchmarks/la_development.py DATASET RUNS --coarse
    python benchmarks/la_development.py DATASET RUNS --methods acmt+sfr --tuned-by mean-teacher+sfr

DATASET is the folder of the 80 development volumes in nnU-Net raw layout. la_000 .. la_063 train (first N labelled, the
others unlabelled), la_064 .. la_079 validate. 1.25 mm, patch 64x64x48, 1000 iterations, V-Net-16, last checkpoint. With
--coarse: 2.5 mm, patch 32x32x16, 500 iterations of AdamW, V-Net-8, two minutes a run on two cores instead of an hour, so that
many methods, numbers of labels and seeds can be compared; its results have a folder of their own. Runs are resumed,
finished ones are skipped. Reference labels of unlabelled cases are read here alone, after a run, to say how good its
pseudo-labels were.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from scarceseg import Config
from scarceseg.config import merge
from scarceseg.settings import read_assignments
from table_runs import add_options, run_table, tuned_by

VALIDATION = [f"la_{i:03d}" for i in range(64, 80)]
SPACING, NATIVE_MM = 1.25, 0.625
FULL: dict[str, Any] = {"plan": {"spacing_mm": SPACING, "patch": [64, 64, 48]}, "iterations": 1000}
COARSE: dict[str, Any] = {
    "plan": {"spacing_mm": 2.5, "patch": [32, 32, 16]},
    "iterations": 500,
    "network": {"args": {"n_filters": 8}},
    "optim": {"name": "adamw", "lr": 0.003, "schedule": "poly"},
}


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    add_options(parser, methods="supervised,mean-teacher,ua-mt", labels="1,4,8,16", iterations=None)
    parser.add_argument("--coarse", action="store_true", help="the quick setting")
    parser.add_argument("--table", help="folder of results/ that the rows go to; otherwise that of the setting")
    options = parser.parse_args()

    def configure(method: str, labels: int) -> Config:
        setting = COARSE if options.coarse else FULL
        values = {
            "dataset": str(options.dataset.resolve()),
            "method": method,
            "labeled": labels,
            "val": VALIDATION,
            "seed": options.seed,
            **setting,
            "iterations": options.iterations or setting["iterations"],
        }
        tuned = tuned_by(options, method, labels)
        return Config.build(merge(merge(values, tuned), read_assignments(options.set)))

    table = options.table or ("la_coarse" if options.coarse else "la_development")
    run_table(table, options, configure, NATIVE_MM)


if __name__ == "__main__":
    main()
