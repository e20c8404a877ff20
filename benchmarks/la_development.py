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
from pathlib import Path

from scarceseg import Config
from scarceseg.config import merge
from scarceseg.settings import read_assignments
from table_runs import add_options, run_table

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


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    add_options(parser, methods="supervised,mean-teacher,ua-mt", labels="1,4,8,16", iterations=1000)
    options = parser.parse_args()

    def configure(method: str, labels: int) -> Config:
        return configuration(options.dataset, method, labels, options.seed, options.iterations, options.set)

    run_table("la_development", options, configure, NATIVE_MM)


if __name__ == "__main__":
    main()
