"""What is not the network: batches per second of the loader, start of the command, volumes labelled per minute.

    python benchmarks/pipeline_speed.py [--parts loader,help,labels] [--patch 112,112,80]

Loader: 2 + 2 patches out of prepared volumes of LA's size on disk, with a network that takes no time, against the time of a
training step of `step_speed.py`. Command: `scarceseg --help` from a cold start of Python, median of 7. Labels: volumes of
104x104x44 voxels (LA at 1.25 mm) through tuned `tiny-sam` and `tiny-sam3d`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import PIPELINE, RESULTS, processor, provenance, save
from scarceseg.data.sampling import MOST_WORKERS, PatchSampler, Source
from scarceseg.foundation.base import Tuning
from scarceseg.foundation.load import load_foundation


def loader(patch: tuple[int, int, int]) -> dict[str, Any]:
    """Seconds a batch, with one thread and with as many as there are cores, and the share of a training step the first is."""
    with tempfile.TemporaryDirectory() as folder:
        sources = []
        for number in range(16):
            image, label = Path(folder) / f"{number}.npy", Path(folder) / f"{number}-label.npy"
            np.save(image, np.random.default_rng(number).normal(size=(1, 208, 208, 88)).astype(np.float32))
            np.save(label, np.zeros((208, 208, 88), np.uint8))
            sources.append(Source(str(number), np.load(image, mmap_mode="r"), np.load(label, mmap_mode="r")))
        free = [Source(s.name, s.image) for s in sources]
        sampler = PatchSampler(sources, free, patch, 2, 2, 0)
        for _ in sampler.batches(0, 8):
            pass
        by_threads = {}
        for threads in {1, min(os.cpu_count() or 1, MOST_WORKERS)}:
            start = time.perf_counter()
            for _ in sampler.batches(8, 48, workers=threads):
                pass
            by_threads[threads] = (time.perf_counter() - start) / 40
    seconds = by_threads[1]
    found: dict[str, Any] = {"loader_seconds": seconds, "seconds_by_threads": by_threads, "patch": patch}
    kind = "_bf16" if "bf16" in processor() else ""
    step = RESULTS / "step_speed" / f"mean-teacher_{'x'.join(map(str, patch))}_cpu{kind}.json"
    if step.exists():
        fastest = min(json.loads(step.read_text(encoding="utf-8"))["seconds"].values())
        found |= {"step_seconds": fastest, "loader_share": seconds / fastest}
    return found


def start_up() -> dict[str, Any]:
    """Median seconds of the command's help."""
    times = []
    for _ in range(7):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "scarceseg", "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return {"help_seconds": statistics.median(times)}


def labels() -> dict[str, Any]:
    """Volumes per minute of tuned models."""
    size = (104, 104, 44)
    volume = torch.randn(1, 1, *size)
    found = {}
    for name in ("tiny-sam", "tiny-sam3d"):
        model: Any = load_foundation(name)
        network = model.tunable(1, 2, Tuning("lora" if name == "tiny-sam" else "decoder"), size).eval()
        with torch.inference_mode():
            network(volume)
            start = time.perf_counter()
            for _ in range(3):
                network(volume).softmax(1)
        found[name] = 180 / (time.perf_counter() - start)
    return {"labels_per_minute": found}


def main() -> None:
    """Measure the parts asked for and keep the others of an earlier call out: one JSON a part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="loader,help,labels")
    parser.add_argument("--patch", default="112,112,80")
    options = parser.parse_args()
    x, y, z = map(int, options.patch.split(","))
    parts: dict[str, Any] = {"loader": lambda: loader((x, y, z)), "help": start_up, "labels": labels}
    for part in options.parts.split(","):
        result = parts[part]()
        save(f"pipeline_speed/{part}", result | provenance(PIPELINE[part]))
        print(result, flush=True)


if __name__ == "__main__":
    main()
