"""Time to lay a volume out as a mosaic and to cut it back, with gradient and without, in milliseconds.

    python benchmarks/stitching_speed.py [--size 112,112,80] [--canvas 1024] [--repeats 50] [--device cpu] [--threads 1]

Layouts: the fitted one at full size, the published one, and slices resized to half the canvas.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

from common import provenance, save
from scarceseg.foundation.stitching import Stitch

PARTS = ("foundation/stitching.py",)


def milliseconds(call: Callable[[], object], repeats: int, device: torch.device) -> dict[str, float]:
    """Best and median time of a call after two warm-up calls."""
    times = []
    for t in range(repeats + 2):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if t >= 2:
            times.append(1000 * (time.perf_counter() - start))
    return {"best": round(min(times), 3), "median": round(median(times), 3)}


def measure(stitch: Stitch, repeats: int, device: torch.device) -> dict[str, dict[str, float]]:
    """One volume of one channel there; two classes back; and the gradient of each."""
    volume = torch.randn(1, 1, *stitch.size, device=device)
    label = (volume[:, 0] > 0).long()
    canvas = torch.randn(stitch.canvases, 2, *stitch.canvas, device=device)
    traced, traced_canvas = volume.clone().requires_grad_(), canvas.clone().requires_grad_()
    calls: dict[str, Callable[[], object]] = {
        "stitch": lambda: stitch.stitch(volume),
        "stitch_label": lambda: stitch.stitch_label(label),
        "unstitch": lambda: stitch.unstitch(canvas),
        "stitch + gradient": lambda: stitch.stitch(traced).sum().backward(),
        "unstitch + gradient": lambda: stitch.unstitch(traced_canvas).sum().backward(),
    }
    return {name: milliseconds(call, repeats, device) for name, call in calls.items()}


def main() -> None:
    """Measure all layouts and save one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="112,112,80")
    parser.add_argument("--canvas", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    size = tuple(map(int, options.size.split(",")))
    layouts = {
        "fitted": Stitch.fit(size, options.canvas),
        "published": Stitch.published(size, options.canvas),
        "resized to half the canvas": Stitch.fit(size, options.canvas // 2, resize=True),
    }
    results = {}
    for name, stitch in layouts.items():
        results[name] = measure(stitch, options.repeats, device)
        print(name, {call: times["best"] for call, times in results[name].items()}, flush=True)
    save(
        f"stitching_speed/{'x'.join(map(str, size))}_{options.canvas}_{device.type}",
        {
            "size": size,
            "canvas": options.canvas,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "milliseconds": results,
            **provenance(PARTS),
        },
    )


if __name__ == "__main__":
    main()
