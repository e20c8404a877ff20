"""From a prediction to a prompt: clicks, boxes and dense masks for promptable models, and their way between frames.

Everything here starts from a probability map or a mask that some model made. Nothing takes a reference segmentation, so that a
training term built on these functions cannot look at one.

Places are voxel indices (x, y, z): whole numbers are voxel centres, and a volume of n voxels reaches from -0.5 to n - 0.5. World
positions are ITK's (LPS, millimetres).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from scipy import ndimage

from scarceseg.data.geometry import matrix
from scarceseg.errors import ConfigError, DataError
from scarceseg.foundation.base import Spacing, _check_inside
from scarceseg.foundation.clicks import error_distances
from scarceseg.functional.components import largest_component as keep_largest
from scarceseg.types import Geometry, Prompt

Size = tuple[int, int, int]
Components = Literal["largest", "all"]

_TOUCHING = ndimage.generate_binary_structure(3, 3)


def points_from_probability(
    probability: torch.Tensor,
    count: int = 1,
    *,
    spacing_mm: Spacing,
    threshold: float = 0.5,
    confident: float = 0.9,
    components: Components = "all",
    negative: int = 0,
    ring_mm: float = 10.0,
    generator: torch.Generator | None = None,
) -> Prompt | None:
    """Clicks inside what a model found, where it is sure and far from the border, and clicks around it if wanted.

    Each connected piece (26 neighbours) gets one click, the largest first; further clicks go where the smaller of two
    distances is largest, to the border and to the clicks before. The border of the volume counts as one, so that clicks keep
    away from the faces of a patch. In a piece without a confident voxel, those count whose probability is at least half-way
    between the threshold and the piece's maximum.

    Args:
        probability: ``[X, Y, Z]`` foreground probability in [0, 1].
        count: clicks inside, at most; there are fewer when no further voxel is left.
        spacing_mm: distance of voxel centres along X, Y, Z.
        threshold: above it a voxel is foreground.
        confident: from it on a voxel is sure; up to ``1 - confident`` it is surely background.
        components: click into ``all`` pieces, or into the ``largest`` alone.
        negative: clicks outside, at most: surely background, less than `ring_mm` from any foreground, spread around it.
        ring_mm: width of the ring of clicks outside.
        generator: None takes the best voxel each time; with a generator, one is drawn from all that are at least half as good.

    Returns:
        Points ``[N, 3]`` float32, clicks inside before those outside; None when nothing is above the threshold.

    Raises:
        DataError: not a 3D map of probabilities.
        ConfigError: an impossible count, threshold or name.
    """
    if count < 1 or negative < 0 or not 0 <= threshold < 1 or not threshold <= confident <= 1:
        raise ConfigError(
            "clicks: expected at least 1 inside, 0 or more outside, and 0 <= threshold <= confident <= 1 with threshold below "
            f"1, got {count}, {negative}, {threshold} and {confident}"
        )
    if components not in get_args(Components):
        raise ConfigError(f"components: expected 'largest' or 'all', got {components!r}")
    probability = _probability(probability)
    foreground = probability > threshold
    if not foreground.any():
        return None
    pieces = _pieces(foreground)
    if components == "largest":
        pieces = torch.where(pieces == 1, pieces, 0)
    sure = (pieces > 0) & (probability >= _levels(probability, pieces, threshold, confident)[pieces])
    depth = _depth(pieces > 0, spacing_mm)
    places = sure.nonzero()
    inside = _spread(places, depth[sure], spacing_mm, count, generator, pieces[sure])
    outside = _around(probability, foreground, spacing_mm, negative, (1 - confident, ring_mm), generator)
    points = torch.cat([inside, outside])
    labels = torch.arange(len(points), device=points.device) < len(inside)
    return Prompt(points.float(), labels.long())


def correction_clicks(
    mask: torch.Tensor,
    other: torch.Tensor,
    count: int = 1,
    *,
    spacing_mm: Spacing,
    generator: torch.Generator | None = None,
) -> Prompt | None:
    """Clicks that tell the model behind `other` where `mask` differs, the deepest difference first.

    Depth is the distance to the border of what the one mask has alone; a large flat rim of one voxel comes after a small ball.
    Further clicks go where the smaller of two distances is largest: the depth, and the distance to the clicks before.

    Args:
        mask: wished mask ``[X, Y, Z]``: bool, 0 and 1, or a probability that is cut at 0.5.
        other: mask to correct, the same size.
        count: clicks, at most.
        spacing_mm: distance of voxel centres along X, Y, Z.
        generator: see `points_from_probability`.

    Returns:
        Points ``[N, 3]`` with label 1 where `mask` alone is inside and 0 where `other` alone is; None when the masks agree.

    Raises:
        DataError: not two 3D masks of one size.
        ConfigError: a count below 1.
    """
    if count < 1:
        raise ConfigError(f"correction clicks: expected at least 1, got {count}")
    wished, given = _mask(mask), _mask(other)
    missing, surplus = error_distances(given, wished, spacing_mm)
    depth = missing + surplus  # no voxel is in both
    wrong = depth > 0
    if not wrong.any():
        return None
    points = _spread(wrong.nonzero(), depth[wrong], spacing_mm, count, generator)
    return Prompt(points.float(), wished[tuple(points.T)].long())


def box_from_mask(
    mask: torch.Tensor, margin_voxel: int | Sequence[int] = 0, largest_component: bool = False
) -> Prompt | None:
    """The smallest box around a mask.

    Args:
        mask: ``[X, Y, Z]``: bool, 0 and 1, or a probability that is cut at 0.5.
        margin_voxel: added on every side, one number or one for each axis; the box ends at the border of the volume.
        largest_component: box around the largest connected piece alone.

    Returns:
        Box ``[2, 3]`` float32, lowest and highest voxel inside; None for an empty mask.

    Raises:
        DataError: not a 3D mask.
        ConfigError: a negative margin.
    """
    inside = _mask(mask)
    margin = torch.as_tensor(margin_voxel, device=inside.device).expand(3)
    if (margin < 0).any():
        raise ConfigError(f"margin of a box: expected 0 or more voxels, got {margin_voxel}")
    if largest_component:
        kept = keep_largest(inside.byte().cpu().numpy())
        inside = torch.from_numpy(kept).to(inside.device) > 0
    if not inside.any():
        return None
    places = inside.nonzero()
    last = places.new_tensor(inside.shape) - 1
    low = (places.amin(dim=0) - margin).clamp_min(0)
    high = (places.amax(dim=0) + margin).minimum(last)
    return Prompt(box_voxel=torch.stack([low, high]).float())


def mask_prompt(probability: torch.Tensor) -> Prompt:
    """A dense prompt ``[X, Y, Z]`` float32 of a probability map or a mask, without gradient.

    Raises:
        DataError: not a 3D map of numbers in [0, 1].
    """
    return Prompt(mask=_probability(probability))


def add_click(prompt: Prompt, voxel: Sequence[float], inside: bool, *, size: Size | None = None) -> Prompt:
    """The prompt with one more click.

    Args:
        prompt: unchanged.
        voxel: index (x, y, z).
        inside: whether the click lies on the object.
        size: of the volume; taken from the mask of the prompt when there is one.

    Raises:
        DataError: a click outside the volume.
    """
    home = next((part for part in (prompt.points_voxel, prompt.box_voxel, prompt.mask) if part is not None), None)
    device = None if home is None else home.device
    points = torch.as_tensor(voxel, dtype=torch.float32, device=device).reshape(1, -1)
    click = Prompt(points, torch.tensor([int(inside)], device=device))
    if size is None and prompt.mask is not None:
        size = _size(prompt.mask)
    return combine(prompt, check_prompt(click, size))


def combine(*prompts: Prompt | None) -> Prompt:
    """One prompt of several: all clicks in order, and the last box and the last mask; None is passed over.

    Raises:
        DataError: clicks without labels, or another fault that `check_prompt` finds without a size.
    """
    given = [check_prompt(prompt, None) for prompt in prompts if prompt is not None]
    points = [prompt.points_voxel for prompt in given if prompt.points_voxel is not None]
    labels = [prompt.point_labels for prompt in given if prompt.point_labels is not None]
    boxes = [prompt.box_voxel for prompt in given if prompt.box_voxel is not None]
    masks = [prompt.mask for prompt in given if prompt.mask is not None]
    return Prompt(
        torch.cat(points) if points else None,
        torch.cat(labels) if labels else None,
        boxes[-1] if boxes else None,
        masks[-1] if masks else None,
    )


def to_voxel(points_world: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Fractional voxel indices ``[N, 3]`` float64 of world positions in mm; a place outside the grid is none of its errors."""
    points = points_world.to(torch.float64)
    axes = points.new_tensor(matrix(geometry).tolist())
    along = torch.linalg.solve(axes, (points - points.new_tensor(geometry.origin)).T).T
    return along / points.new_tensor(geometry.spacing_mm)


def to_world(points_voxel: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """World positions ``[N, 3]`` float64 in mm of (fractional) voxel indices."""
    points = points_voxel.to(torch.float64)
    axes = points.new_tensor(matrix(geometry).tolist())
    return (points * points.new_tensor(geometry.spacing_mm)) @ axes.T + points.new_tensor(geometry.origin)


def crop_prompt(
    prompt: Prompt, start: Sequence[int], size: Size, *, outside: Literal["refuse", "drop"] = "refuse"
) -> Prompt:
    """The prompt in the frame of a window of the volume.

    Args:
        prompt: in the frame of the volume.
        start: voxel of the volume where the window begins; negative when it begins before the volume.
        size: voxels of the window; it may end behind the volume. A mask is cut, and continued with zeros.
        outside: of places outside the window, ``refuse`` raises, ``drop`` leaves them away. A box that meets the window is
            always cut at its border.

    Raises:
        DataError: a place outside the window.
    """
    _check_size(size)
    points, labels, box, mask = prompt.points_voxel, prompt.point_labels, prompt.box_voxel, prompt.mask
    if points is not None:
        points = points - points.new_tensor(start)
        if outside == "refuse":
            _check_inside("point, counted from the start of the window,", points, size)
        elif labels is not None:
            kept = ((points >= 0) & (points < points.new_tensor(size))).all(dim=1)
            points, labels = (points[kept], labels[kept]) if kept.any() else (None, None)
    if box is not None:
        box = box - box.new_tensor(start)
        last = box.new_tensor(size) - 1
        meets = bool(((box[1] >= 0) & (box[0] <= last)).all())
        if meets:
            box = box.clamp_min(0).minimum(last)
        elif outside == "drop":
            box = None
        else:
            raise DataError(
                f"the box lies outside the window of {tuple(size)} voxels from {tuple(start)}: choose a window around it"
            )
    if mask is not None:
        pads = [(-begin, begin + side - full) for begin, side, full in zip(start, size, mask.shape, strict=True)]
        mask = F.pad(mask, [n for pair in reversed(pads) for n in pair])
    return check_prompt(Prompt(points, labels, box, mask), size)


def resize_prompt(prompt: Prompt, from_size: Size, to_size: Size) -> Prompt:
    """The prompt on another grid over the same box, such as the resized input of a model.

    The grids share their outer edges. With s = to / from a point p goes to ``(p + 0.5) s - 0.5``, and at most to the outermost
    voxel centres; a box keeps its outer edges (or, thinner than a new voxel, its middle); a mask is interpolated linearly.

    Raises:
        DataError: a place outside the volume, or sizes that are not positive.
    """
    _check_size(to_size)
    check_prompt(prompt, from_size)
    points, box, mask = prompt.points_voxel, prompt.box_voxel, prompt.mask
    if points is not None:
        points = _scaled(points, from_size, to_size, 0.5)
    if box is not None:
        edges = torch.stack([_scaled(box[:1], from_size, to_size, 0.0), _scaled(box[1:], from_size, to_size, 1.0)])[
            :, 0
        ]
        middle = _scaled(box.float().mean(dim=0, keepdim=True), from_size, to_size, 0.5)
        box = torch.where(edges[0] <= edges[1], edges, middle)
    if mask is not None and tuple(from_size) != tuple(to_size):
        mask = F.interpolate(mask[None, None].float(), size=to_size, mode="trilinear", align_corners=False)[0, 0]
    return replace(prompt, points_voxel=points, box_voxel=box, mask=mask)


def check_prompt(prompt: Prompt, size: Size | None) -> Prompt:
    """The prompt itself, if it can be one of a volume of this size (None: of unknown size).

    Raises:
        DataError: clicks without labels, a box whose corners are exchanged, a place that is not finite or outside the
            volume, or a mask of another size.
    """
    if size is not None:
        _check_size(size)
    limit = size or (2**31, 2**31, 2**31)
    points, labels, box = prompt.points_voxel, prompt.point_labels, prompt.box_voxel
    for what, places, rows in (("point", points, None), ("box corner", box, 2)):
        if places is None:
            continue
        if places.ndim != 2 or places.shape[1] != 3 or rows not in (None, len(places)):
            raise DataError(f"{what}: expected [{rows or 'N'}, 3] voxel indices (x, y, z), got {list(places.shape)}")
        if not torch.isfinite(places).all():
            raise DataError(f"{what}: expected finite voxel indices, got {places.tolist()}")
        _check_inside(what, places, limit)
    clicks = 0 if points is None else len(points)
    if clicks != (0 if labels is None else len(labels)):
        raise DataError(f"expected one label (1 inside, 0 outside) for each of {clicks} points")
    if box is not None and (box[0] > box[1]).any():
        raise DataError(f"box: expected the lowest corner first, then the highest, got {box.tolist()}")
    if prompt.mask is not None and size is not None and tuple(prompt.mask.shape) != tuple(size):
        raise DataError(f"mask prompt: expected the volume's size {tuple(size)}, got {tuple(prompt.mask.shape)}")
    return prompt


def _scaled(places: torch.Tensor, from_size: Size, to_size: Size, anchor: float) -> torch.Tensor:
    """Voxel indices on the other grid of the spot `anchor` in the voxel (0 near edge, 0.5 centre, 1 far edge)."""
    end = torch.tensor(to_size, dtype=torch.float32, device=places.device)
    moved = (places + anchor) * (end / end.new_tensor(from_size)) - anchor
    return moved.clamp_min(0).minimum(end - 1)


def _spread(
    places: torch.Tensor,
    depth: torch.Tensor,
    spacing_mm: Spacing,
    count: int,
    generator: torch.Generator | None,
    pieces: torch.Tensor | None = None,
) -> torch.Tensor:
    """Choose up to `count` of ``places [M, 3]``, deep and far from each other; the first of them one for each piece.

    Among equals the first click (of a piece) goes into their middle, a further one far from those before.
    """
    position = places * torch.tensor(spacing_mm, dtype=torch.float32, device=places.device)
    near = torch.full_like(depth, torch.inf)
    ranks = [] if pieces is None else pieces.unique().tolist()
    chosen: list[int] = []
    for turn in range(min(count, len(places))):
        score = torch.minimum(depth, near)
        first = turn == 0 or turn < len(ranks)
        if first and pieces is not None:
            score = torch.where(pieces == ranks[turn], score, 0)
        best = score.max()
        if best <= 0:
            break
        if generator is None:
            equal = score >= best * (1 - 1e-6)
            goal = -(position - position[equal].mean(dim=0)).norm(dim=1) if first else near
            pick = int(torch.where(equal, goal, -torch.inf).argmax())
        else:
            pool = (score >= best / 2).nonzero()[:, 0]
            pick = int(pool[int(torch.randint(len(pool), (), generator=generator, device=generator.device))])
        chosen.append(pick)
        near = torch.minimum(near, (position - position[pick]).norm(dim=1))
    return places[chosen]


def _around(
    probability: torch.Tensor,
    foreground: torch.Tensor,
    spacing_mm: Spacing,
    count: int,
    limits: tuple[float, float],
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Up to `count` places of sure background within a ring around the foreground; `limits`: probability, and width in mm."""
    level, ring_mm = limits
    if count == 0:
        return foreground.new_empty((0, 3), dtype=torch.long)
    found = foreground.nonzero()
    reach = found.new_tensor([int(ring_mm / step) + 1 for step in spacing_mm])
    low = (found.amin(dim=0) - reach).clamp_min(0)
    high = (found.amax(dim=0) + reach + 1).minimum(found.new_tensor(foreground.shape))
    box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    distance = ndimage.distance_transform_edt(~foreground[box].cpu().numpy(), sampling=spacing_mm)
    away = torch.from_numpy(distance).to(probability)
    sure = (away > 0) & (away < ring_mm) & (probability[box] <= level)
    return _spread(sure.nonzero(), away[sure], spacing_mm, count, generator) + low


def _depth(inside: torch.Tensor, spacing_mm: Spacing) -> torch.Tensor:
    """Distance in mm to the nearest voxel outside, or beyond the volume."""
    return error_distances(torch.zeros_like(inside), inside, spacing_mm)[0]


def largest_piece(inside: torch.Tensor) -> torch.Tensor:
    """The largest connected piece (26 neighbours) of a mask ``[X, Y, Z]`` bool."""
    return _pieces(inside) == 1


def _pieces(inside: torch.Tensor) -> torch.Tensor:
    """Connected pieces ``[X, Y, Z]`` numbered by size: 1 is the largest, 0 is outside."""
    numbers = torch.from_numpy(ndimage.label(inside.cpu().numpy(), structure=_TOUCHING)[0]).long()
    sizes = numbers.flatten().bincount()
    sizes[0] = 0
    order = sizes.argsort(descending=True, stable=True)
    rank = torch.zeros_like(sizes)
    rank[order] = torch.arange(1, len(order) + 1)
    rank[0] = 0
    return rank[numbers].to(inside.device)


def _levels(probability: torch.Tensor, pieces: torch.Tensor, threshold: float, confident: float) -> torch.Tensor:
    """From which probability on a voxel of each piece is sure."""
    highest = probability.new_zeros(int(pieces.max()) + 1)
    highest = highest.scatter_reduce(0, pieces.flatten(), probability.flatten(), "amax")
    return torch.where(highest >= confident, confident, (threshold + highest) / 2)


def _probability(values: torch.Tensor) -> torch.Tensor:
    values = values.detach().float()
    if values.ndim != 3 or 0 in values.shape or not ((values >= 0) & (values <= 1)).all():
        raise DataError(
            f"expected probabilities [X, Y, Z] in [0, 1], got {_described(values)}: take one class, and softmax or sigmoid first"
        )
    return values


def _mask(values: torch.Tensor) -> torch.Tensor:
    return _probability(values) > 0.5


def _described(values: torch.Tensor) -> str:
    span = f" from {float(values.min()):.3g} to {float(values.max()):.3g}" if values.numel() else ""
    return f"{list(values.shape)}{span}"


def _size(mask: torch.Tensor) -> Size:
    x, y, z = mask.shape
    return x, y, z


def _check_size(size: Sequence[int]) -> None:
    if len(size) != 3 or min(size) < 1:
        raise DataError(f"expected a size of three positive numbers of voxels, got {tuple(size)}")
