"""A volume as single slices: prompts on their own slices, and masks that find their way to the neighbours.

A slice that is prompted itself (a click inside, a slice of the box, a slice of the dense mask) is asked first. From slices with
a click inside, the mask is then handed up and down: the neighbour is asked with it as mask prompt, with the box around it and the
point deepest inside it, until nothing is found. All open ends, of all volumes of a batch, take their next step in one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import SamModel

from scarceseg.foundation.sam import upsample_masks
from scarceseg.foundation.sam_ask import EMPTY, Ask, answer, mask_logits, prompt_of_mask
from scarceseg.types import Prompt


@dataclass(frozen=True, eq=False)
class SliceFrame:
    """Embedded slices of a batch of volumes, and how a slice lies in SAM's image.

    Attributes:
        volumes: for each volume, embeddings ``[slices, D, E, E]``; kept here, not in the embedding's features, so that
            selecting a volume for ten prompts does not copy its slices ten times.
        size: voxels (X, Y, Z).
        axis: index axis along which the volumes are sliced.
        shown: rows and columns of the image_size x image_size image that a slice takes.
        image_size: S.
    """

    volumes: tuple[torch.Tensor, ...]
    size: tuple[int, int, int]
    axis: int
    shown: tuple[int, int]
    image_size: int

    @property
    def order(self) -> tuple[int, int, int]:
        """Index axes of slices, rows and columns: rows run along the later of the two remaining axes, as in a mosaic."""
        first, second = (i for i in range(3) if i != self.axis)
        return self.axis, second, first

    @property
    def plane(self) -> tuple[int, int]:
        """Rows and columns of a slice in voxels."""
        _, rows, columns = self.order
        return self.size[rows], self.size[columns]

    @property
    def side(self) -> int:
        """4E, side of the low-resolution logits."""
        return 4 * self.volumes[0].shape[-1]

    def scale(self) -> torch.Tensor:
        """Pixels per voxel along x (columns) and y (rows)."""
        return torch.tensor([self.shown[1] / self.plane[1], self.shown[0] / self.plane[0]])

    def to_slice(self, points_voxel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Slice numbers ``[N]`` and pixel indices ``[N, 2]`` (x, y) of voxels ``[N, 3]``; voxel centres stay centres."""
        points = points_voxel.detach().cpu().float()
        number = points[:, self.axis].add(0.5).floor().long().clamp(max=self.size[self.axis] - 1)
        inside = points[:, [self.order[2], self.order[1]]]
        return number, (inside + 0.5) * self.scale() - 0.5

    def to_box(self, box_voxel: torch.Tensor) -> tuple[range, torch.Tensor]:
        """The slices of a 3D box ``[2, 3]`` and its first and last pixel in each ``[4]``, whole voxels on both ends."""
        corners = box_voxel.detach().cpu().float()
        corners = torch.stack([corners.amin(dim=0), corners.amax(dim=0)])
        numbers, _ = self.to_slice(corners)
        inside, scale = corners[:, [self.order[2], self.order[1]]], self.scale()
        first, last = inside[0] * scale, (inside[1] + 1) * scale - 1
        return range(int(numbers[0]), int(numbers[1]) + 1), torch.cat([first, torch.maximum(last, first)])

    def to_masks(self, mask: torch.Tensor) -> dict[int, torch.Tensor]:
        """Mask prompts ``[4E, 4E]`` of those slices in which a dense mask ``[X, Y, Z]`` has foreground."""
        slices = mask.detach().cpu().float().permute(self.order)
        found = {}
        for number in (slices > 0.5).flatten(1).any(dim=1).nonzero()[:, 0].tolist():
            image = F.interpolate(slices[None, number : number + 1], self.shown, mode="bilinear", align_corners=False)
            padding = (0, self.image_size - self.shown[1], 0, self.image_size - self.shown[0])
            logits = mask_logits(F.pad(image[0], padding), self.side)[0]
            if (logits > 0).any():  # a speck smaller than a pixel of the prompt is no mask
                found[number] = logits
        return found


@dataclass
class _Plan:
    """What one row asks for, slice by slice, and what it has found."""

    clicks: dict[int, list[tuple[torch.Tensor, int]]] = field(default_factory=dict)
    box_range: range | None = None
    box: torch.Tensor | None = None
    masks: dict[int, torch.Tensor] = field(default_factory=dict)
    earlier: torch.Tensor | None = None
    logits: dict[int, torch.Tensor] = field(default_factory=dict)
    quality: dict[int, float] = field(default_factory=dict)

    def clicked(self) -> list[int]:
        """Slices with a click inside: masks spread from there."""
        return [number for number, clicks in self.clicks.items() if any(label == 1 for _, label in clicks)]

    def prompted(self) -> list[int]:
        """Slices that are asked without waiting for a neighbour; a click outside alone says nothing about what is meant."""
        masks = [number for number in self.masks if self.box_range is None or number in self.box_range]
        return sorted({*self.clicked(), *(self.box_range or ()), *masks})

    def within(self, number: int, slices: int) -> bool:
        """Whether a mask may spread to this slice: a box bounds the object."""
        return 0 <= number < slices and (self.box_range is None or number in self.box_range)


def segment_slices(
    sam: SamModel,
    frame: SliceFrame,
    rows: Sequence[int],
    prompts: Sequence[Prompt],
    previous: torch.Tensor | None,
    *,
    batch: int,
    multimask: bool,
    stop_quality: float,
    stop_overlap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Answer one prompt for each row.

    Args:
        sam: the model.
        frame: the embedded slices.
        rows: which volume each prompt is about.
        prompts: in voxels.
        previous: ``[R, slices, 4E, 4E]`` logits of the last round; they are the mask prompts of slices with clicks.
        batch: asks in one call of the decoder.
        multimask: see `answer`.
        stop_quality: a neighbour's mask with a lower estimated IoU ends the spreading.
        stop_overlap: so does one that shares less than this (IoU) with the mask it came from.

    Returns:
        Logits ``[R, X, Y, Z]``, quality ``[R]`` (mean estimated IoU over slices with a mask, 0 if there are none) and
        low-resolution logits ``[R, slices, 4E, 4E]``.
    """
    plans = [_plan(frame, p, None if previous is None else previous[i]) for i, p in enumerate(prompts)]
    todo = [(row, number) for row, plan in enumerate(plans) for number in plan.prompted()]
    ends: list[tuple[int, int, int]] = []
    if todo:
        asks = [_first_ask(frame, plans[row], number, frame.volumes[rows[row]]) for row, number in todo]
        found, quality = answer(sam, asks, batch, multimask)
        for (row, number), logits, score in zip(todo, found, quality.tolist(), strict=True):
            plan = plans[row]
            plan.logits[number], plan.quality[number] = _cut(frame, logits), score
            if number in plan.clicked() and (plan.logits[number] > 0).any():
                ends += [(row, number, 1), (row, number, -1)]
    while ends:
        steps: dict[tuple[int, int], tuple[int, int]] = {}
        for row, number, way in ends:
            following = number + way
            if plans[row].within(following, frame.size[frame.axis]) and following not in plans[row].logits:
                steps.setdefault((row, following), (number, way))
        if not steps:
            break
        asks = [
            _next_ask(frame, plans[row], number, plans[row].logits[source], frame.volumes[rows[row]])
            for (row, number), (source, _) in steps.items()
        ]
        found, quality = answer(sam, asks, batch, multimask)
        ends = []
        for ((row, number), (source, way)), logits, score in zip(steps.items(), found, quality.tolist(), strict=True):
            plan, mask = plans[row], _cut(frame, logits)
            if score >= stop_quality and (mask > 0).any() and _overlap(mask, plan.logits[source]) >= stop_overlap:
                plan.logits[number], plan.quality[number] = mask, score
                ends.append((row, number, way))
    return _compose(frame, plans, batch, next(sam.parameters()).device)


def _plan(frame: SliceFrame, prompt: Prompt, earlier: torch.Tensor | None) -> _Plan:
    plan = _Plan(earlier=earlier)
    if prompt.points_voxel is not None and prompt.point_labels is not None and len(prompt.points_voxel):
        numbers, pixels = frame.to_slice(prompt.points_voxel)
        for number, pixel, label in zip(numbers.tolist(), pixels, prompt.point_labels.tolist(), strict=True):
            plan.clicks.setdefault(number, []).append((pixel, int(label)))
    if prompt.box_voxel is not None:
        plan.box_range, plan.box = frame.to_box(prompt.box_voxel)
    if prompt.mask is not None:
        plan.masks = frame.to_masks(prompt.mask)
    return plan


def _points(clicks: Sequence[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    if not clicks:
        return torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)
    return torch.stack([pixel for pixel, _ in clicks]), torch.tensor([label for _, label in clicks])


def _first_ask(frame: SliceFrame, plan: _Plan, number: int, embeddings: torch.Tensor) -> Ask:
    clicks = list(plan.clicks.get(number, []))
    mask = plan.masks.get(number)
    box = plan.box if plan.box_range is not None and number in plan.box_range else None
    if mask is not None and box is None and not any(label == 1 for _, label in clicks):
        point, box = prompt_of_mask(mask, frame.image_size)
        clicks.append((point, 1))
    if mask is None and plan.earlier is not None and (plan.earlier[number] > 0).any():
        mask = plan.earlier[number].cpu().float()
    return Ask(embeddings[number], *_points(clicks), box, mask)


def _next_ask(frame: SliceFrame, plan: _Plan, number: int, source: torch.Tensor, embeddings: torch.Tensor) -> Ask:
    """Ask a slice with the mask of its neighbour, and with its own clicks (which lie outside, or it had been asked first)."""
    point, box = prompt_of_mask(source, frame.image_size)
    return Ask(embeddings[number], *_points([(point, 1), *plan.clicks.get(number, [])]), box, source)


def _cut(frame: SliceFrame, logits: torch.Tensor) -> torch.Tensor:
    """Low-resolution logits without what SAM found in the padding beside the slice."""
    rows, columns = (-(-n * frame.side // frame.image_size) for n in frame.shown)
    cut = torch.full_like(logits, EMPTY)
    cut[:rows, :columns] = logits[:rows, :columns]
    return cut


def _overlap(mask: torch.Tensor, other: torch.Tensor) -> float:
    first, second = mask > 0, other > 0
    return float((first & second).sum() / (first | second).sum().clamp(min=1))


def _compose(
    frame: SliceFrame, plans: Sequence[_Plan], batch: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    slices = frame.size[frame.axis]
    volume = torch.full((len(plans), slices, *frame.plane), EMPTY, device=device)
    low_res = torch.full((len(plans), slices, frame.side, frame.side), EMPTY, device=device)
    quality = torch.zeros(len(plans), device=device)
    for row, plan in enumerate(plans):
        numbers = sorted(plan.logits)
        for start in range(0, len(numbers), batch):
            part = numbers[start : start + batch]
            stack = torch.stack([plan.logits[number] for number in part])
            low_res[row, part] = stack
            volume[row, part] = upsample_masks(stack[:, None], frame.image_size, frame.shown, frame.plane)[:, 0]
        scores = [plan.quality[number] for number in numbers if (plan.logits[number] > 0).any()]
        if scores:
            quality[row] = sum(scores) / len(scores)
    back = [1 + frame.order.index(i) for i in range(3)]
    return volume.permute(0, *back).contiguous(), quality, low_res
