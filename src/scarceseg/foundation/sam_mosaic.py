"""A volume as one mosaic of its slices: prompts are moved onto the canvas, masks are cut back into the volume.

Clicks: all of them are one prompt on the canvas; a model tuned on mosaics answers in every tile, a plain SAM in the tile that was
clicked. Box: one prompt for each tile of its range (a box around several tiles would hold what lies between them), and each
answer counts in its own tile alone. Dense mask: laid out like the image, with the point deepest inside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import SamModel

from scarceseg.errors import ConfigError
from scarceseg.foundation.sam import image_size_of
from scarceseg.foundation.sam_ask import EMPTY, Ask, answer, mask_logits, prompt_of_mask
from scarceseg.foundation.stitching import Stitch
from scarceseg.types import Prompt


def lay_out(size: tuple[int, int, int], canvas: int, axis: int) -> Stitch:
    """One canvas for a volume: at full size if the slices have room, else with every slice scaled to its cell.

    One canvas and not several, because a prompt reaches only the slices that stand on its own canvas.

    Raises:
        ConfigError: more slices than the canvas has pixels.
    """
    try:
        whole = Stitch.fit(size, canvas, axis=axis)
    except ConfigError:
        whole = None
    return whole if whole is not None and whole.canvases == 1 else Stitch.fit(size, canvas, resize=True, axis=axis)


@dataclass(frozen=True)
class _Question:
    """An ask, and the slices whose tiles take the answer (None: all)."""

    row: int
    ask: Ask
    slices: tuple[int, ...] | None


def segment_mosaic(
    sam: SamModel,
    canvases: torch.Tensor,
    stitch: Stitch,
    prompts: Sequence[Prompt],
    previous: torch.Tensor | None,
    *,
    batch: int,
    multimask: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Answer one prompt for each row.

    Args:
        sam: the model.
        canvases: embeddings ``[R, D, E, E]``.
        stitch: the layout, of one canvas.
        prompts: in voxels.
        previous: ``[R, 4E, 4E]`` logits of the last round; they are the mask prompt where none is given.
        batch: asks in one call of the decoder.
        multimask: see `answer`.

    Returns:
        Logits ``[R, X, Y, Z]``, quality ``[R]`` (mean estimated IoU of the asks that found something, 0 if none did) and
        low-resolution logits ``[R, 4E, 4E]``.
    """
    device, side = next(sam.parameters()).device, 4 * canvases.shape[-1]
    size = image_size_of(sam)
    whole = torch.full((len(prompts), size, size), EMPTY, device=device)
    exact: dict[int, torch.Tensor] = {}
    scores: list[list[float]] = [[] for _ in prompts]
    questions = [
        question
        for row, prompt in enumerate(prompts)
        for question in _questions(
            row, canvases[row], stitch, prompt, None if previous is None else previous[row], side
        )
    ]
    for start in range(0, len(questions), batch):
        part = questions[start : start + batch]
        logits, quality = answer(sam, [question.ask for question in part], batch, multimask)
        masks = F.interpolate(logits[:, None], size=(size, size), mode="bilinear", align_corners=False)[:, 0]
        for question, coarse, mask, score in zip(part, logits, masks, quality.tolist(), strict=True):
            if question.slices is None:
                exact[question.row] = coarse
            regions = _regions(stitch, question.slices)
            for region in regions:
                whole[question.row][region] = torch.maximum(whole[question.row][region], mask[region])
            if any((mask[region] > 0).any() for region in regions):
                scores[question.row].append(score)
    low_res = F.interpolate(whole[:, None], size=(side, side), mode="area")[:, 0]
    for row, coarse in exact.items():  # SAM refines its own logits best when they come back as they were
        low_res[row] = coarse
    mean = [sum(found) / len(found) if found else 0.0 for found in scores]
    return stitch.unstitch(whole[:, None])[:, 0], torch.tensor(mean, device=device), low_res


def _questions(
    row: int, image: torch.Tensor, stitch: Stitch, prompt: Prompt, previous: torch.Tensor | None, side: int
) -> list[_Question]:
    numbers, points, labels = _clicks(stitch, prompt)
    mask = None if prompt.mask is None else _mask(stitch, prompt.mask, side)
    given = mask is not None
    if mask is None and previous is not None and (previous > 0).any():
        mask = previous.detach().cpu().float()
    boxes = _boxes(stitch, prompt.box_voxel)
    questions = []
    for number, box in boxes.items():
        own = numbers == number
        questions.append(_Question(row, Ask(image, points[own], labels[own], box, mask), (number,)))
    outside = ~torch.isin(numbers, torch.tensor(list(boxes), dtype=torch.long))
    clicked = outside & (labels == 1)
    if clicked.any():
        slices = tuple(sorted(set(numbers[clicked].tolist()))) if boxes else None
        questions.append(_Question(row, Ask(image, points[outside], labels[outside], None, mask), slices))
    elif given and mask is not None and not boxes:
        point, _ = prompt_of_mask(mask, stitch.canvas[0])
        ask = Ask(
            image, torch.cat([points, point[None]]), torch.cat([labels, torch.ones(1, dtype=torch.long)]), None, mask
        )
        questions.append(_Question(row, ask, None))
    return questions


def _clicks(stitch: Stitch, prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slice numbers ``[N]``, pixels ``[N, 2]`` and labels ``[N]`` of the clicks."""
    if prompt.points_voxel is None or prompt.point_labels is None or not len(prompt.points_voxel):
        none = torch.zeros(0, dtype=torch.long)
        return none, torch.zeros(0, 2), none
    points = prompt.points_voxel.detach().cpu().float()
    last = stitch.size[stitch.axis] - 1
    numbers = points[:, stitch.axis].add(0.5).floor().long().clamp(max=last)
    return numbers, stitch.to_canvas(points)[1], prompt.point_labels.detach().cpu().long()


def _mask(stitch: Stitch, mask: torch.Tensor, side: int) -> torch.Tensor | None:
    canvas = stitch.stitch(mask.detach().cpu().float()[None, None])[:, 0]
    logits = mask_logits(canvas, side)[0]
    return logits if (logits > 0).any() else None


def _boxes(stitch: Stitch, box_voxel: torch.Tensor | None) -> dict[int, torch.Tensor]:
    """First and last pixel ``[4]`` of a 3D box in the tile of each slice of its range."""
    if box_voxel is None:
        return {}
    corners = box_voxel.detach().cpu().float()
    corners = torch.stack([corners.amin(dim=0), corners.amax(dim=0)])
    slices = stitch.size[stitch.axis]
    first, last = (min(int(value + 0.5), slices - 1) for value in corners[:, stitch.axis].tolist())
    numbers = torch.arange(first, last + 1)
    ends = []
    for corner in corners:
        points = corner.repeat(len(numbers), 1)
        points[:, stitch.axis] = numbers.float()
        ends.append(stitch.to_canvas(points)[1])
    scale = torch.tensor([stitch.tile[1] / _plane(stitch)[1], stitch.tile[0] / _plane(stitch)[0]])
    rim = (scale - 1) / 2  # half of what a voxel is larger than a pixel: the box holds whole voxels
    boxes = torch.cat([ends[0] - rim, torch.maximum(ends[1] + rim, ends[0] - rim)], dim=1)
    return dict(zip(numbers.tolist(), boxes, strict=True))


def _plane(stitch: Stitch) -> tuple[int, int]:
    columns, rows = (stitch.size[i] for i in range(3) if i != stitch.axis)
    return rows, columns


def _regions(stitch: Stitch, slices: tuple[int, ...] | None) -> list[tuple[slice, slice]]:
    """Rows and columns of the canvas that the tiles of these slices take; the whole canvas for None."""
    if slices is None:
        return [(slice(None), slice(None))]
    regions = []
    for number in slices:
        row, column = divmod(stitch.first_slot + number, stitch.grid[1])
        top = stitch.origin[0] + row * stitch.cell[0] + stitch.padding[0]
        left = stitch.origin[1] + column * stitch.cell[1] + stitch.padding[1]
        regions.append((slice(top, top + stitch.tile[0]), slice(left, left + stitch.tile[1])))
    return regions
