"""Several classes and channels: the methods on phantoms with four structures in two channels.

    python benchmarks/phantoms_development.py RUNS [--methods supervised,mean-teacher,...] [--labels 1,4]

24 phantoms train (the first N labelled), 8 others validate; V-Net-8, patch 48x48x32, 600 iterations, last checkpoint. The
volumes are made under RUNS from one seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from scarceseg import Config
from scarceseg.config import merge
from scarceseg.data.phantoms import PhantomConfig, write_phantom_dataset
from scarceseg.settings import read_assignments
from table_runs import add_options, run_table

CASES, VALIDATION, SEED = 32, 8, 11
METHODS = "supervised,mean-teacher,mean-teacher+sfr,mean-teacher+atlas"


def dataset(runs: Path) -> Path:
    """The volumes, made once."""
    folder = runs / "data"
    if not (folder / "dataset.json").exists():
        write_phantom_dataset(folder, CASES, CASES, PhantomConfig(classes=4, channels=2), SEED)
    return folder


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, methods=METHODS, labels="1,4", iterations=600)
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
            "plan": {"patch": [48, 48, 32]},
            "iterations": options.iterations,
            "seed": options.seed,
        }
        return Config.build(merge(values, read_assignments(options.set)))

    run_table("phantoms_development", options, configure)


if __name__ == "__main__":
    main()
