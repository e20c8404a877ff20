"""Dice of a promptable model after simulated clicks: LA development cases, and synthetic volumes it was not trained on.

    python benchmarks/foundation_clicks.py ../shared/la       # LA, cases 64 to 79
    python benchmarks/foundation_clicks.py                    # the two synthetic sets

LA is scored in its own voxels, zero-shot. The synthetic sets are `unseen` (the generator's setting kept apart: smaller, rougher,
noisier things, fewer intensities) and `phantoms` (the chest-like scenes of the demo, another generator altogether). One JSON
each goes to results/foundation_clicks. `--reach 0` measures tiny-sam3d with late clicks that may change everything.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common import CLICKS, provenance, save
from scarceseg.benchmark.clicks import ClickResult, benchmark_clicks, print_clicks
from scarceseg.data.geometry import CANONICAL_DIRECTION
from scarceseg.data.images import write_image
from scarceseg.data.phantoms import PhantomConfig, write_phantom_dataset
from scarceseg.foundation import FOUNDATIONS
from scarceseg.foundation.models.tiny_sam3d import build_tiny_sam3d
from scarceseg.pretrain.volumes import UNSEEN, draw_target, make_volume
from scarceseg.types import Geometry

LA_CASES = ("la_06[4-9]", "la_07*")


def unseen(folder: Path, count: int, seed: int) -> None:
    """A dataset of the setting that training never drew from: one target a volume."""
    shape = (96, 80, 64)
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    geometry = Geometry(shape, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), CANONICAL_DIRECTION)
    made = number = 0
    while made < count:
        rng = np.random.default_rng([seed, 77, number])
        number += 1
        volume = make_volume(rng, shape, UNSEEN)
        target = draw_target(rng, volume, (0.004, 0.2))
        if target is not None:
            write_image(volume.image, geometry, folder / "imagesTr" / f"unseen_{made:03d}_0000.nii.gz")
            write_image(target.astype(np.uint8), geometry, folder / "labelsTr" / f"unseen_{made:03d}.nii.gz")
            made += 1
    facts = {"name": "unseen", "channel_names": {"0": "synthetic"}, "labels": {"background": 0, "target": 1}}
    facts |= {"numTraining": count, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(facts), encoding="utf-8")


def keep(name: str, result: ClickResult, foundation: str) -> None:
    """Save one result."""
    print_clicks(result)
    values = json.loads(result.to_json()) | {"set": name, "foundation": foundation} | provenance(CLICKS)
    values["dataset"] = name
    save(f"foundation_clicks/{name}_{foundation.replace(', ', '_').replace(' ', '_')}", values)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, nargs="?", help="folder of LA; the synthetic sets without it")
    parser.add_argument("--foundation", default="tiny-sam3d")
    parser.add_argument("--count", type=int, default=16, help="volumes of each synthetic set")
    parser.add_argument("--reach", type=float, help="option of tiny-sam3d; the default is the model's own")
    args = parser.parse_args()
    if args.reach is not None:
        args.foundation = f"tiny-sam3d, reach {args.reach:g}"
        FOUNDATIONS.register(args.foundation)(partial(build_tiny_sam3d, reach=args.reach))
    torch.set_num_threads(max(torch.get_num_threads(), 1))
    if args.dataset is not None:
        keep("la", benchmark_clicks(args.dataset, args.foundation, cases=LA_CASES, show=True), args.foundation)
        return
    with tempfile.TemporaryDirectory() as made:
        unseen(Path(made) / "unseen", args.count, seed=1)
        config = PhantomConfig(shape=(96, 80, 64), classes=6)
        write_phantom_dataset(Path(made) / "phantoms", args.count, args.count, config, seed=5)
        for name in ("unseen", "phantoms"):
            keep(name, benchmark_clicks(Path(made) / name, args.foundation, show=True), args.foundation)


if __name__ == "__main__":
    main()
