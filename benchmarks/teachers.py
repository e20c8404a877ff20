"""What `copy` and `atlas` reach by themselves, with no network trained.

    python benchmarks/teachers.py DATASET [--teachers copy,atlas] [--labels 1,2,4,8,16]
    python benchmarks/teachers.py RUNS --phantoms --labels 1,4

Of the LA development split the first N cases are the atlases, la_064 .. la_079 are labelled by them at 1.25 mm. With
--phantoms it is the volumes of `phantoms_development.py`, on their own grid. Scored in the volumes' own voxels, classes
averaged: the yardstick that a trained network has to beat.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common import direct_code, provenance, save
from la_development import NATIVE_MM, SPACING, VALIDATION
from phantoms_development import VALIDATION as PHANTOMS_VALIDATION
from phantoms_development import VOLUMES
from phantoms_development import dataset as phantoms
from scarceseg.atlas.teacher import atlas_labels, copy_labels
from scarceseg.data.dataset import Dataset, UnlabelledCase, load_dataset
from scarceseg.data.images import read_label
from scarceseg.data.plan import resampling_plan
from scarceseg.data.prepare import prepare_cases, restore_label
from scarceseg.evaluation.metrics import binary_metrics

METRICS = ("dice", "jaccard", "hd95", "asd")


def main() -> None:
    """Label and score for each teacher and number of atlases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--phantoms", action="store_true", help="the folder is that of the phantoms' runs")
    parser.add_argument("--teachers", default="copy,atlas")
    parser.add_argument("--labels", default="1,2,4,8,16")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    facts = load_dataset(phantoms(options.dataset) if options.phantoms else options.dataset)
    names = [case.name for case in facts.cases]
    spacing = VOLUMES.spacing_mm if options.phantoms else (SPACING,) * 3
    validation = names[-PHANTOMS_VALIDATION:] if options.phantoms else VALIDATION
    for count in map(int, options.labels.split(",")):
        for teacher in options.teachers.split(","):
            result = {"method": teacher, "labels": count}
            result |= labelled(facts, spacing, names[:count], validation, teacher, options.workers)
            if not options.phantoms:
                result |= {f"{key}_voxel": result[f"{key}_mm"] / NATIVE_MM for key in ("hd95", "asd")}
            folder = "phantoms_teachers" if options.phantoms else "la_teachers"
            save(f"{folder}/{teacher}_{count}", result | provenance(direct_code(teacher)))
            print(
                f"{teacher} {count}: Dice {result['dice']:.4f} HD95 {result['hd95_mm']:.2f} ASD {result['asd_mm']:.2f} mm",
                flush=True,
            )


def labelled(
    facts: Dataset,
    spacing: tuple[float, float, float],
    atlases: Sequence[str],
    targets: Sequence[str],
    teacher: str,
    workers: int,
) -> dict[str, Any]:
    """Aggregate numbers of a teacher's labels; the targets' reference labels are read after it has answered."""
    plan = resampling_plan(facts, spacing, "zscore")
    cases = {case.name: case for case in facts.cases}
    known = list(prepare_cases([cases[name] for name in atlases], (), plan, None).values())
    asked = list(prepare_cases((), [UnlabelledCase(name, cases[name].images) for name in targets], plan, None).values())
    classes = range(len(plan.classes))
    since = time.perf_counter()
    if teacher == "copy":
        made = copy_labels(asked, known, len(classes))
    else:
        made = atlas_labels(asked, known, len(classes), workers=workers)
    scores: list[dict[str, list[float]]] = [{key: [] for key in METRICS} for _ in classes[1:]]
    for one, target in zip(made, asked, strict=True):
        geometry = target.original
        label = restore_label(one.probability, target.geometry, geometry)
        reference = read_label(cases[one.name].label, classes, geometry)
        for number, found in enumerate(scores, start=1):
            for key, value in binary_metrics(label == number, reference == number, geometry.spacing_mm).items():
                if key in found:
                    found[key].append(value)
    mean = {key: float(np.mean([np.nanmean(found[key]) for found in scores])) for key in METRICS}
    return {
        "validation": len(asked),
        "dice": mean["dice"],
        "jaccard": mean["jaccard"],
        "hd95_mm": mean["hd95"],
        "asd_mm": mean["asd"],
        "failed": int(sum(np.isnan(found["hd95"]).sum() for found in scores)),
        "minutes": (time.perf_counter() - since) / 60,
    }


if __name__ == "__main__":
    main()
