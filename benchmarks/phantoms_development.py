"""Several classes and channels: the methods on phantoms with four structures in two channels.

    python benchmarks/phantoms_development.py RUNS [--methods supervised,mean-teacher,...] [--labels 1,4]

24 phantoms of 40x40x32 voxels train (the first N labelled), 8 others validate; V-Net-8, patch 32x32x32, 1000 iterations of AdamW
(0.003, poly), half of the labelled patches on foreground, last checkpoint. With one label sfr's model is tuned for 100 steps. The
volumes are made under RUNS from one seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from scarceseg import Config
from scarceseg.config import merge
from scarceseg.data.phantoms import PhantomConfig, write_phantom_dataset
from scarceseg.methods import parse_method
from scarceseg.settings import read_assignments
from table_runs import add_options, run_table, tuned_by

CASES, VALIDATION, SEED = 32, 8, 11
VOLUMES = PhantomConfig(shape=(40, 40, 32), spacing_mm=(2.4, 2.4, 2.4), classes=4, channels=2)
METHODS = "supervised,mean-teacher,mean-teacher+semisam,mean-teacher+sfr,mean-teacher+atlas"


def dataset(runs: Path) -> Path:
    """The volumes, made once."""
    folder = runs / "data"
    if not (folder / "dataset.json").exists():
        write_phantom_dataset(folder, CASES, CASES, VOLUMES, SEED)
    return folder


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, methods=METHODS, labels="1,4", iterations=1000)
    options = parser.parse_args()
    data = dataset(options.runs)
    names = sorted(path.name.removesuffix("_0000.nii.gz") for path in (data / "imagesTr").glob("*_0000.nii.gz"))

    def configure(method: str, labels: int) -> Config:
        values = {
            "dataset": str(data.resolve()),
            "method": method,
            "labeled": labels,
            "val": names[-VALIDATION:],
            "network": {"name": "vnet", "args": {"n_filters": 8}},
            "plan": {"patch": [32, 32, 32]},
            "optim": {"name": "adamw", "lr": 0.003, "schedule": "poly"},
            "foreground": 0.5,
            "terms": {
                term: {"tune_iterations": 100}
                for term in parse_method(method)
                if labels == 1 and term in ("sfr", "sfr+")
            },
            "iterations": options.iterations,
            "seed": options.seed,
        }
        tuned = tuned_by(options, method, labels)
        return Config.build(merge(merge(values, tuned), read_assignments(options.set)))

    run_table("phantoms_development", options, configure)


if __name__ == "__main__":
    main()
