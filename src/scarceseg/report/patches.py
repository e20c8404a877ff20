"""Unlabelled patches as a training term saw them: what the student found, what was asked, what a model answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from scarceseg.report.figures import (
    ARRAY_VIEWS,
    UNCERTAINTY_LEVELS,
    Picture,
    grey_strip,
    mask_strip,
    picture,
    uncertainty_strip,
)
from scarceseg.types import ImageBatch, Prompt

SIDE, GAP, HEAD = 192, 6, 20
INSIDE, OUTSIDE, BOX, PAPER, INK = (70, 230, 110), (255, 80, 80), (255, 230, 90), (0, 0, 0), (215, 215, 215)
TITLES = ("patch and student", "prompts", "model", "weight")


def dialogue_picture(
    image: ImageBatch,
    student: torch.Tensor,
    model: torch.Tensor,
    weight: torch.Tensor,
    prompts: Mapping[tuple[int, int], Sequence[Prompt]],
) -> NDArray[np.uint8]:
    """One line for each patch: student's mask, clicks and boxes, model's mask, and how far it is trusted.

    The slice (along z) is that of the first click, or the one with most of the student's mask. Clicks of other slices are drawn
    as rings.

    Args:
        image: ``[U, C, X, Y, Z]``; the first channel is shown.
        student, model: foreground probabilities ``[U, K-1, X, Y, Z]``.
        weight: of the model's masks, the same shape, in [0, 1].
        prompts: by row and foreground class.

    Returns:
        ``[rows, columns, 3]`` uint8.
    """
    lines = [
        _line(
            image[row, 0].float().cpu().numpy(),
            {"student": _labels(student[row]), "model": _labels(model[row])},
            weight[row].float().amax(0).cpu().numpy(),
            [prompt for (of, _), own in prompts.items() if of == row for prompt in own],
        )
        for row in range(len(image))
    ]
    width = max(line.width for line in lines)
    whole = Image.new("RGB", (width, HEAD + sum(line.height + GAP for line in lines)), PAPER)
    draw = ImageDraw.Draw(whole)
    for number, title in enumerate(TITLES):
        draw.text((number * (width + GAP) / len(TITLES) + 2, 4), title, fill=INK)
    top = HEAD
    for line in lines:
        whole.paste(line, (0, top))
        top += line.height + GAP
    return np.asarray(whole)


def _labels(foreground: torch.Tensor) -> NDArray[np.uint8]:
    """The class of each voxel that is more likely than not, 0 elsewhere ``[X, Y, Z]``."""
    best, index = foreground.float().max(0)
    return torch.where(best > 0.5, index + 1, 0).to(torch.uint8).cpu().numpy()


def _line(
    image: NDArray[Any], masks: Mapping[str, NDArray[np.uint8]], weight: NDArray[Any], prompts: Sequence[Prompt]
) -> Image.Image:
    shown = picture(image, dict(masks))
    view = ARRAY_VIEWS[0]
    scale = SIDE / max(image.shape[:2])
    size = (round(image.shape[0] * scale), round(image.shape[1] * scale))
    at = _slice(shown, prompts)
    grey = grey_strip(shown, view, [at], size).convert("RGBA")
    panes = [grey.copy() for _ in TITLES]
    for pane, name in ((panes[0], "student"), (panes[2], "model")):
        pane.alpha_composite(mask_strip(shown.masks[name], view, [at], size, False).convert("RGBA"))
    _draw_prompts(panes[1], prompts, at, scale)
    levels = (weight.clip(0, 1) * (UNCERTAINTY_LEVELS - 1)).round().astype(np.uint8)
    panes[3].alpha_composite(uncertainty_strip(levels, view, [at], size).convert("RGBA"))
    line = Image.new("RGB", (len(panes) * (size[0] + GAP) - GAP, size[1]), PAPER)
    for number, pane in enumerate(panes):
        line.paste(pane.convert("RGB"), (number * (size[0] + GAP), 0))
    return line


def _slice(shown: Picture, prompts: Sequence[Prompt]) -> int:
    for prompt in prompts:
        if prompt.points_voxel is not None and len(prompt.points_voxel):
            return int(prompt.points_voxel[0, 2])
    return int((shown.masks["student"] > 0).sum((0, 1)).argmax())


def _draw_prompts(pane: Image.Image, prompts: Sequence[Prompt], at: int, scale: float) -> None:
    draw = ImageDraw.Draw(pane)
    for prompt in prompts:
        if prompt.box_voxel is not None:
            (x0, y0, _), (x1, y1, _) = prompt.box_voxel.tolist()
            draw.rectangle([x0 * scale, y0 * scale, (x1 + 1) * scale - 1, (y1 + 1) * scale - 1], outline=BOX)
        if prompt.points_voxel is None or prompt.point_labels is None:
            continue
        for (x, y, z), label in zip(prompt.points_voxel.tolist(), prompt.point_labels.tolist(), strict=True):
            colour, here = INSIDE if label else OUTSIDE, round(z) == at
            middle = ((x + 0.5) * scale, (y + 0.5) * scale)
            ends = [middle[0] - 3, middle[1] - 3, middle[0] + 3, middle[1] + 3]
            draw.ellipse(ends, outline=colour, fill=colour if here else None)
