"""LA development split: what `copy` and `atlas` reach by themselves, with no network trained.

    python benchmarks/la_teachers.py DATASET [--teachers copy,atlas] [--labels 1,2,4,8,16]

The first N cases are the atlases, la_064 .. la_079 are labelled by them at 1.25 mm and scored in their own voxels: the
yardstick that a trained network has to beat.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from common import direct_code, provenance, save
from la_development import NATIVE_MM, SPACING, VALIDATION
from scarceseg.atlas.teacher import atlas_labels, copy_labels
from scarceseg.data.dataset import UnlabelledCase, load_dataset
from scarceseg.data.images import read_label
from scarceseg.data.plan import resampling_plan
from scarceseg.data.prepare import prepare_cases, restore_label
from scarceseg.evaluation.metrics import binary_metrics


def main() -> None:
    """Label and score for each teacher and number of atlases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--teachers", default="copy,atlas")
    parser.add_argument("--labels", default="1,2,4,8,16")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    facts = load_dataset(options.dataset)
    plan = resampling_plan(facts, (SPACING,) * 3, "zscore")
    cases = {case.name: case for case in facts.cases}
    targets = list(
        prepare_cases((), [UnlabelledCase(name, cases[name].images) for name in VALIDATION], plan, None).values()
    )
    for count in map(int, options.labels.split(",")):
        names = [f"la_{i:03d}" for i in range(count)]
        atlases = list(prepare_cases([cases[name] for name in names], (), plan, None).values())
        for teacher in options.teachers.split(","):
            since = time.perf_counter()
            if teacher == "copy":
                made = copy_labels(targets, atlases, len(plan.classes))
            else:
                made = atlas_labels(targets, atlases, len(plan.classes), workers=options.workers)
            scores = []
            for one, target in zip(made, targets, strict=True):
                case = cases[one.name]
                geometry = target.original
                label = restore_label(one.probability, target.geometry, geometry)
                reference = read_label(case.label, range(len(plan.classes)), geometry)
                scores.append(binary_metrics(label == 1, reference == 1, geometry.spacing_mm))
            mean = {key: float(np.nanmean([s[key] for s in scores])) for key in ("dice", "jaccard", "hd95", "asd")}
            result = {
                "method": teacher,
                "labels": count,
                "validation": len(scores),
                "dice": mean["dice"],
                "jaccard": mean["jaccard"],
                "failed": sum(bool(np.isnan(s["hd95"])) for s in scores),
                "minutes": (time.perf_counter() - since) / 60,
            }
            for key in ("hd95", "asd"):
                result |= {f"{key}_mm": mean[key], f"{key}_voxel": mean[key] / NATIVE_MM}
            save(f"la_teachers/{teacher}_{count}", result | provenance(direct_code(teacher)))
            print(
                f"{teacher} {count}: Dice {mean['dice']:.4f} HD95 {mean['hd95']:.2f} ASD {mean['asd']:.2f} mm",
                flush=True,
            )


if __name__ == "__main__":
    main()
