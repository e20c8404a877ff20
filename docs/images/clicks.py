"""Makes clicks.png: an unseen phantom and the answers of tiny-sam3d after 1, 2 and 5 clicks. ``python docs/images/clicks.py``."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sheet import save_sheet

from scarceseg.data.phantoms import PhantomConfig, make_phantom
from scarceseg.foundation import Promptable
from scarceseg.foundation.clicks import next_click
from scarceseg.foundation.load import load_foundation
from scarceseg.report import overlay_png
from scarceseg.types import Prompt

SEED = 11
TURNS = (1, 2, 5)


def main() -> None:
    """The first structure of the phantom; clicks are simulated, each in the largest error of the mask before."""
    volume, label, geometry = make_phantom(SEED, PhantomConfig(shape=(96, 96, 72), classes=1))
    target = torch.from_numpy(label == 1)
    model = load_foundation("tiny-sam3d")
    assert isinstance(model, Promptable)
    embedding = model.embed(torch.from_numpy(volume)[None], geometry.spacing_mm)
    mask, previous = torch.zeros_like(target), None
    points: list[tuple[int, int, int]] = []
    inside: list[int] = []
    rows = {}
    for turn in range(1, max(TURNS) + 1):
        click = next_click(mask, target, style="largest")
        if click is not None:
            points.append(click[0])
            inside.append(click[1])
        prompt = Prompt(torch.tensor(points, dtype=torch.float32), torch.tensor(inside))
        previous = model.segment(embedding, [prompt], previous)
        mask = previous.logits[0] > 0
        if turn in TURNS:
            dice = 2 * int((mask & target).sum()) / int(mask.sum() + target.sum())
            png = overlay_png(
                volume[0],
                mask.numpy().astype(np.uint8),
                label,
                spacing_mm=geometry.spacing_mm,
                direction=geometry.direction,
                side=260,
            )
            clicks = "1 click" if turn == 1 else f"{turn} clicks"
            rows[f"{clicks}: Dice {100 * dice:.0f} %"] = Image.open(io.BytesIO(png)).convert("RGB")
    save_sheet(rows, Path(__file__).with_name("clicks.png"))


if __name__ == "__main__":
    main()
