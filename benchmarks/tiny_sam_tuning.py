"""`tiny-sam` tuned on a few labelled LA volumes: Dice on the development cases, beside the supervised V-Net.

    python benchmarks/tiny_sam_tuning.py ../shared/la --labels 1,4

Volumes are prepared at 1.25 mm and seen whole on the model's canvas; the first N cases are labelled; no other label is read
before the scores. Loss, optimiser and schedule are SFR's fine-tuning (0.5 (CE + Dice), AdamW, weight decay 0.1, poly 0.9), with
fewer iterations. Scores are in the files' own voxels. One JSON per number of labels goes to results/tiny_sam_tuning.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from common import TUNING, provenance, save
from scarceseg.data.dataset import Case, load_dataset
from scarceseg.data.images import read_label, read_volume
from scarceseg.data.plan import Plan, resampling_plan
from scarceseg.data.prepare import prepare_label, prepare_volume, restore_label
from scarceseg.evaluation.metrics import binary_metrics
from scarceseg.foundation import Tunable, Tuning
from scarceseg.foundation.load import load_foundation
from scarceseg.functional.losses import segmentation_loss

VAL = range(64, 80)
Volume = tuple[np.ndarray, np.ndarray]


def prepared(case: Case, how: Plan) -> Volume:
    """Image ``[X, Y, Z]`` and label of one labelled case."""
    volume, geometry = read_volume(case.images)
    assert case.label is not None
    label = read_label(case.label, range(2), geometry)
    return prepare_volume(volume, geometry, how)[0][0], prepare_label(label, geometry, how)


def jitter(rng: np.random.Generator, image: np.ndarray, label: np.ndarray, strength: float) -> Volume:
    """A small random affine map and elastic bend, another contrast, and noise; flips and quarter turns would leave the frame."""
    shape = np.asarray(image.shape)
    matrix = np.eye(3) + strength * rng.normal(0, 0.08, (3, 3))
    centre = (shape - 1) / 2
    offset = centre - matrix @ centre + strength * rng.normal(0, 0.04, 3) * shape
    grid = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in shape), indexing="ij"))
    at = np.tensordot(matrix, grid, 1) + offset[:, None, None, None]
    for axis in range(3):
        coarse = rng.normal(0, 1, (5, 5, 5))
        at[axis] += strength * 0.03 * shape[axis] * ndimage.zoom(coarse, shape / 5, order=3)
    moved = ndimage.map_coordinates(image, at, order=1, mode="nearest")
    target = ndimage.map_coordinates(label, at, order=0, mode="constant", cval=0)
    curve = np.sign(moved) * np.abs(moved) ** rng.uniform(0.75, 1.33)
    moved = curve * rng.uniform(0.8, 1.2) + rng.normal(0, 0.15) + rng.normal(0, rng.uniform(0, 0.15), moved.shape)
    return moved.astype(np.float32), target


def tune(network: torch.nn.Module, volumes: list[Volume], args: argparse.Namespace) -> list[float]:
    """Fine-tune in place; returns the loss of every step."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.1)
    losses = []
    network.train()
    for iteration in range(args.iterations):
        rng = np.random.default_rng([args.seed, iteration])
        torch.manual_seed(int(rng.integers(2**62)))
        for group in optimizer.param_groups:
            warm = min(1.0, (iteration + 1) / 20)
            group["lr"] = args.lr * warm * (1 - iteration / args.iterations) ** 0.9
        chosen = [volumes[int(rng.integers(len(volumes)))] for _ in range(args.batch)]
        loss = torch.zeros(())
        for image, label in chosen:  # volumes of several sizes cannot be stacked
            moved, target = jitter(rng, image, label, args.jitter)
            logits = network(torch.from_numpy(moved)[None, None])
            wanted = torch.from_numpy(target.astype(np.int64))[None]
            loss = loss + segmentation_loss(logits, wanted) / len(chosen)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if (iteration + 1) % 50 == 0:
            print(f"  step {iteration + 1}: loss {np.mean(losses[-50:]):.3f}", flush=True)
    return losses


@torch.no_grad()
def score(network: torch.nn.Module, cases: list[Case], how: Plan) -> dict[str, dict[str, float]]:
    """Metrics of each case in its own voxels."""
    network.eval()
    scores = {}
    for case in cases:
        volume, geometry = read_volume(case.images)
        image, grid = prepare_volume(volume, geometry, how)
        probability = network(torch.from_numpy(image)[None]).softmax(1)[0].numpy()
        predicted = restore_label(probability, grid, geometry)
        assert case.label is not None
        label = read_label(case.label, range(2), geometry)
        scores[case.name] = dict(binary_metrics(predicted == 1, label == 1, geometry.spacing_mm))
    return scores


def main() -> None:
    """Tune and score for each number of labels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--labels", default="1,4")
    parser.add_argument("--foundation", default="tiny-sam")
    parser.add_argument("--strategy", default="lora", choices=("lora", "decoder", "adapter"))
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--jitter", type=float, default=1.0)
    parser.add_argument("--spacing", type=float, default=1.25)
    parser.add_argument("--val", type=int, default=len(VAL), help="validation cases, from la_064 on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="", help="name of the result; none is saved without one")
    args = parser.parse_args()
    facts = load_dataset(args.dataset)
    cases = {case.name: case for case in facts.cases}
    how = resampling_plan(facts, (args.spacing,) * 3, "zscore")
    for count in (int(n) for n in args.labels.split(",")):
        model = load_foundation(args.foundation)
        assert isinstance(model, Tunable)
        torch.manual_seed(args.seed)
        volumes = [prepared(cases[f"la_{i:03d}"], how) for i in range(count)]
        network = model.tunable(1, 2, Tuning(args.strategy, args.rank), volumes[0][0].shape)
        since = time.perf_counter()
        losses = tune(network, volumes, args)
        minutes = (time.perf_counter() - since) / 60
        scores = score(network, [cases[f"la_{i:03d}"] for i in list(VAL)[: args.val]], how)
        mean = {key: float(np.nanmean([s[key] for s in scores.values()])) for key in ("dice", "hd95", "asd")}
        print(f"{count} labels: {mean}, {minutes:.1f} min")
        if args.name:
            settings: dict[str, Any] = {k: v for k, v in vars(args).items() if k not in ("dataset", "labels", "name")}
            result = {"labels": count, "settings": settings, "mean": mean, "cases": scores, "minutes": minutes}
            result |= {"last_loss": float(np.mean(losses[-20:])), **provenance(TUNING)}
            save(f"tiny_sam_tuning/{args.name}_{count}", result)


if __name__ == "__main__":
    main()
