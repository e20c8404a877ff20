"""Does the confidence of a guess say how good it is? Over the whole volume (SFR+'s), and over the predicted foreground (ours).

    python benchmarks/confidence.py DATASET RUN [RUN ...]

The guesses that a finished run keeps for its unlabelled volumes, those of sfr, atlas, copy and self-training, and what the
student of sfr+ said in each round. The references of these volumes are read by the benchmark alone. For each confidence: its rank
correlation with the Dice of the guesses over the volumes, and the mean Dice of the surer half.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from common import save
from table_runs import scored

MEASURES = ("confidence", "foreground_confidence")


def main() -> None:
    """Measure every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    options = parser.parse_args()
    for run in options.runs:
        stages = {}
        for stage, rows in scored(run, options.dataset).items():
            dice = np.array([row["dice"] for row in rows.values()])
            of_a_round = re.fullmatch(r".*-round\d+", stage)  # the model's in a later round: not chosen by confidence
            if of_a_round or len(dice) < 4:
                continue
            found: dict[str, object] = {"volumes": len(dice), "dice": float(dice.mean())}
            for measure in MEASURES:
                sure = np.array([row[measure] for row in rows.values()])
                half = np.argsort(-sure, kind="stable")[: len(sure) // 2]
                found[measure] = {"rank_correlation": float(spearmanr(sure, dice)[0]), "dice": float(dice[half].mean())}
            stages[stage] = found
            print(run.name, stage, found, flush=True)
        if stages:
            save(f"confidence/{run.name}", {"run": run.name, "stages": stages})


if __name__ == "__main__":
    main()
