"""Time and memory of each foundation model on the CPU: embed one volume once, then answer prompts.

    python benchmarks/foundation_cost.py

Sizes are what matters here: the published models run with random weights. Each model runs in a process of its own; memory is that
process's peak, libraries included. One JSON goes to results/foundation_cost.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch

from common import provenance, save

CODE = ("foundation",)
SIZE = (112, 112, 80)
MODELS = ("tiny-sam3d", "tiny-sam", "sam-med3d", "sam-vit-b, mosaic", "sam-vit-b, slices")
SLICES = 2
"""A plain SAM goes slice by slice at the same cost each; so many are measured, and the time is scaled up."""


def build(name: str) -> Any:
    """The model, with random weights where they are not in the package."""
    from scarceseg.foundation.load import load_foundation

    if name.startswith("tiny"):
        return load_foundation(name)
    if name == "sam-med3d":
        from scarceseg.foundation.sam_med3d import SamMed3D
        from scarceseg.foundation.sam_med3d_net import SamMed3DNet

        return SamMed3D(SamMed3DNet())
    from transformers import SamConfig, SamModel

    from scarceseg.foundation.sam_volume import SamOptions, SamPromptable

    return SamPromptable(SamModel(SamConfig()), name, SamOptions(view=name.split(", ")[1], batch=1))


def best(call: Any, repeats: int) -> float:
    """Shortest of some runs, in seconds."""
    times = []
    for _ in range(repeats):
        since = time.perf_counter()
        call()
        times.append(time.perf_counter() - since)
    return min(times)


def peak() -> float:
    """Largest memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str) -> dict[str, Any]:
    """One model in this process."""
    from scarceseg.foundation import Tuning
    from scarceseg.types import Prompt

    torch.manual_seed(0)
    model = build(name)
    depth = SLICES if name.endswith("slices") else SIZE[2]
    image = torch.rand(1, 1, SIZE[0], SIZE[1], depth)
    prompts = [Prompt(torch.tensor([[20.0 + 7 * i, 50.0, float(i % depth)]]), torch.tensor([1])) for i in range(10)]
    large = name.startswith("sam-vit")
    if not hasattr(model, "embed"):  # tuned, not prompted: one pass of the network opened for two classes
        network = model.tunable(1, 2, Tuning(), SIZE).eval()
        with torch.no_grad():
            embed = best(lambda: network(image), 3)
        return {"model": name, "size": SIZE, "slices_measured": depth, "embed": embed, "peak_mb": peak()}
    embedding, embed = None, float("inf")
    for _ in range(1 if large else 3):
        since = time.perf_counter()
        embedding = model.embed(image, (0.625,) * 3)
        embed = min(embed, time.perf_counter() - since)
    one = best(lambda: model.segment(embedding, prompts[:1]), 1 if large else 3)
    ten = best(lambda: [model.segment(embedding, [prompt]) for prompt in prompts], 1 if large else 3)
    scale = SIZE[2] / depth
    return {
        "model": name,
        "size": SIZE,
        "slices_measured": depth,
        "embed": embed * scale,
        "prompt": one,
        "ten_prompts": ten,
        "ten_over_embed": ten / (embed * scale),
        "peak_mb": peak(),
    }


def main() -> None:
    """Measure all models, or the one named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="measure this one here and print it")
    parser.add_argument("--models", default=";".join(MODELS), help="separated by ;")
    args = parser.parse_args()
    if args.model:
        print(json.dumps(measure(args.model)))
        return
    for name in args.models.split(";"):
        done = subprocess.run([sys.executable, __file__, "--model", name], capture_output=True, text=True, check=True)
        values = json.loads(done.stdout.splitlines()[-1])
        print(
            {key: round(value, 3) if isinstance(value, float) else value for key, value in values.items()}, flush=True
        )
        save(f"foundation_cost/{name.replace(', ', '_')}", values | provenance(CODE))


if __name__ == "__main__":
    main()
