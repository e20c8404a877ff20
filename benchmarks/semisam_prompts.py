"""Is what a promptable model answers to a student better than the student? By kind of prompt, with and without the gate.

    python benchmarks/semisam_prompts.py DATASET RUN [RUN ...] [--patches 24] [--foundation tiny-sam3d]

Patches of the runs' unlabelled cases, drawn uniformly. The student is the trained network of a run, the reference is read by this
benchmark alone. `dice`: of the student's mask and of the model's. `share`: sum w (s - p)(y - p) / sum w^2 (s - p)^2 over all
voxels, with p the student's probability, s the model's, y the reference and w the weight of the term: by what share of the way
from p to p + w (s - p) the student should go. Above 0 the term's gradient points the right way, from 1/2 on all the way helps.
The last prompts are put once more to the model with the head that the run has tuned, where it has.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from common import provenance, save
from scarceseg.data.dataset import load_dataset
from scarceseg.data.prepare import PreparedCase, prepare_cases
from scarceseg.foundation.base import HeadTunable, Promptable, Spacing
from scarceseg.foundation.dialogue import Asking
from scarceseg.foundation.load import load_foundation
from scarceseg.foundation.redrawing import Redrawing
from scarceseg.foundation.weights import read_tensors
from scarceseg.functional.reliability import soft_dice
from scarceseg.inference.predictor import Predictor
from scarceseg.methods import build_terms
from scarceseg.methods.semisam import SemiSam
from table_runs import dice
from tables import SEMISAM_PROMPTS

KINDS: dict[str, dict[str, Any]] = {
    "1 click": {"prompts": ["point"], "clicks": 1},
    "3 clicks": {"prompts": ["point"], "clicks": 3},
    "1 click, 2 corrections": {"prompts": ["point"], "clicks": 1, "corrections": 2},
    "1 click, box": {"prompts": ["point", "box"], "clicks": 1},
    "1 click, mask": {"prompts": ["point", "mask"], "clicks": 1},
    "3 single clicks": {"prompts": ["uncertainty"], "clicks": 3},
    "3 single clicks, mask": {"prompts": ["uncertainty", "mask"], "clicks": 3},
}
Patch = tuple[torch.Tensor, torch.Tensor]


def patches(cases: list[PreparedCase], size: tuple[int, int, int], count: int) -> list[Patch]:
    """Images ``[1, C, X, Y, Z]`` and reference masks ``[X, Y, Z]`` of the first class."""
    draw, found = np.random.default_rng(0), []
    for number in range(count):
        case = cases[number % len(cases)]
        image, label = torch.from_numpy(np.array(case.image)), torch.from_numpy(np.array(case.label))
        missing = [max(0, wanted - side) for wanted, side in zip(size, label.shape, strict=True)]
        pad = [n for m in reversed(missing) for n in (m // 2, m - m // 2)]
        image, label = F.pad(image, pad), F.pad(label, pad)
        start = [int(draw.integers(0, side - wanted + 1)) for side, wanted in zip(label.shape, size, strict=True)]
        box = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
        found.append((image[(slice(None), *box)][None], label[box] == 1))
    return found


def measure(term: SemiSam, student: torch.nn.Module, data: list[Patch]) -> dict[str, float]:
    """Means over the patches in which something was asked."""
    rows, sums = [], np.zeros(2)
    for number, (image, truth) in enumerate(data):
        with torch.no_grad():
            foreground = student(image).float().softmax(1)[:, 1:]
        opinion = term.opinion(image, foreground, torch.Generator().manual_seed(number))
        if not bool(opinion.asked.any()):
            continue
        p, s, w = foreground[0, 0], opinion.probability[0, 0], opinion.weight[0, 0]
        step = w * (s - p)
        sums += float((step * (truth.float() - p)).sum()), float(step.square().sum())
        masks = [(values > 0.5).numpy() for values in (p, s)]
        agreement = float(soft_dice(p[None], s[None]))
        rows.append([dice(masks[0], truth.numpy()), dice(masks[1], truth.numpy()), agreement, float(w.mean())])
    means = dict(zip(("student_dice", "dice", "agreement", "weight"), np.mean(rows, axis=0).tolist(), strict=True))
    return means | {"share": float(sums[0] / max(sums[1], 1e-12)), "asked": len(rows) / len(data)}


def tuned_in(run: Path, model: Promptable, spacing_mm: Spacing) -> Promptable | None:
    """The model with the head that a run has tuned; None: it has not."""
    file = run / "stages" / "semisam-tune" / "head-0.safetensors"
    if not file.exists():
        return None
    assert isinstance(model, HeadTunable)
    opened = Redrawing(model, Asking(), spacing_mm)
    opened.load_tuned_state(read_tensors(file).state)
    return opened.frozen()


def main() -> None:
    """Measure every kind of prompt for every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--patches", type=int, default=24)
    parser.add_argument("--foundation", default="tiny-sam3d")
    options = parser.parse_args()
    model = load_foundation(options.foundation)
    assert isinstance(model, Promptable)
    facts = load_dataset(options.dataset)
    for run in options.runs:
        predictor = Predictor(run, device="cpu")
        hidden = json.loads((run / "split.json").read_text(encoding="utf-8"))["unlabelled"][: options.patches]
        cases = [case for case in facts.cases if case.name in hidden]
        data = patches(
            list(prepare_cases(cases, (), predictor.plan, None).values()), predictor.plan.patch, options.patches
        )
        asked = [(kind, settings, model) for kind, settings in KINDS.items()]
        if (tuned := tuned_in(run, model, predictor.plan.spacing_mm)) is not None:
            *_, (kind, settings, _) = asked
            asked.append((f"{kind}, tuned", settings, tuned))
        found = {}
        for kind, settings, asked_model in asked:
            for gate in (False, True):
                term = build_terms("semisam", {"semisam": settings | {"gate": gate}}, 2)["semisam"]
                assert isinstance(term, SemiSam)
                term.consult([asked_model], predictor.plan.spacing_mm)
                name = f"{kind}, {'gate' if gate else 'all'}"
                found[name] = measure(term, predictor.network.eval(), data)
                print(run.name, name, found[name], flush=True)
        result = {"run": run.name, "foundation": options.foundation, "patches": options.patches, "kinds": found}
        save(f"semisam_prompts/{run.name}", result | provenance(SEMISAM_PROMPTS))


if __name__ == "__main__":
    main()
