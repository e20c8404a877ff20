"""A student's prediction and a promptable model in conversation: prompts from the one, masks of the other, and how sure they are.

All that is asked comes from the probability map it is handed; there is no place where a reference label could come in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from scarceseg.errors import ConfigError
from scarceseg.foundation.base import Embedding, Masks, Promptable, Spacing
from scarceseg.foundation.prompts import (
    Components,
    box_from_mask,
    combine,
    correction_clicks,
    largest_piece,
    mask_prompt,
    points_from_probability,
)
from scarceseg.types import Prompt

Kind = Literal["point", "box", "mask", "uncertainty"]


@dataclass(frozen=True)
class Asking:
    """What is asked about one mask.

    Attributes:
        kinds: ``point``, ``box`` and ``mask`` go into one prompt together. ``uncertainty`` asks with each click alone and
            takes the mean of the answers (SemiSAM+).
        clicks: inside the mask, where the student is sure.
        outside: clicks outside, around it.
        corrections: further clicks, one at a time, where the model's answer and the student's mask differ most. From the first
            on the model goes on from its own answer, so that a dense prompt is given once, at the start.
        threshold: of the student's probability.
        confident: from it on the student is sure.
        margin_voxel: of the box.
        components: ask about ``all`` connected pieces of the student's mask, or about the ``largest`` alone.
    """

    kinds: tuple[Kind, ...] = ("point",)
    clicks: int = 1
    outside: int = 0
    corrections: int = 0
    threshold: float = 0.5
    confident: float = 0.9
    margin_voxel: int = 1
    components: Components = "largest"


@dataclass(frozen=True)
class Answers:
    """What a model said about N masks.

    Attributes:
        probability: ``[N, X, Y, Z]`` float32.
        quality: ``[N]`` the model's own estimate of the IoU, in [0, 1].
        spread: ``[N, X, Y, Z]`` variance over the answers to the single clicks or, in a dialogue with corrections, over its
            rounds; in [0, 1/4], zero after one answer.
        prompts: the last ones.
    """

    probability: torch.Tensor
    quality: torch.Tensor
    spread: torch.Tensor
    prompts: tuple[Prompt, ...]


def first_prompts(
    probability: torch.Tensor, asking: Asking, spacing_mm: Spacing, generator: torch.Generator | None = None
) -> list[Prompt]:
    """Prompts that describe one predicted mask: one, or one a click for ``uncertainty``; none when nothing is predicted.

    Args:
        probability: ``[X, Y, Z]`` of one class by the student.
        asking: what to ask.
        spacing_mm: of its voxels.
        generator: of the clicks, see `points_from_probability`.

    Raises:
        ConfigError: no kind of prompt.
    """
    if not asking.kinds:
        raise ConfigError("prompts: expected at least one of point, box, mask, uncertainty, got none")
    probability = probability.detach().float().clamp(0, 1)
    if not bool((probability > asking.threshold).any()):
        return []
    points = box = dense = None
    if {"point", "uncertainty"} & set(asking.kinds):
        points = points_from_probability(
            probability,
            asking.clicks,
            spacing_mm=spacing_mm,
            threshold=asking.threshold,
            confident=max(asking.confident, asking.threshold),
            components=asking.components,
            negative=asking.outside,
            generator=generator,
        )
    if "box" in asking.kinds:
        box = box_from_mask(
            (probability > asking.threshold).float(), asking.margin_voxel, asking.components == "largest"
        )
    if "mask" in asking.kinds:
        dense = mask_prompt(probability)
    if points is not None and "uncertainty" in asking.kinds:
        return [combine(one, box, dense) for one in _one_by_one(points)]
    return [combine(points, box, dense)]


def converse(
    model: Promptable,
    embedding: Embedding,
    rows: Sequence[int],
    probability: torch.Tensor,
    prompts: Sequence[Sequence[Prompt]],
    asking: Asking,
    spacing_mm: Spacing,
    generator: torch.Generator | None = None,
) -> Answers:
    """Ask about N predicted masks, all in one batch, and correct the answers as often as `asking` says.

    Args:
        model: frozen.
        embedding: of the volumes.
        rows: row of the embedding for each of the N masks.
        probability: ``[N, X, Y, Z]`` of the student; corrections are clicked where the answer differs from it.
        prompts: of `first_prompts`, for each mask one or several.
        asking, spacing_mm, generator: as there.
    """
    flat = [prompt for own in prompts for prompt in own]
    owner = torch.tensor([number for number, own in enumerate(prompts) for _ in own], device=probability.device)
    chosen = embedding.select([rows[number] for number in owner.tolist()])
    masks = model.segment(chosen, flat)
    rounds = [masks.probability.float()]
    wished = _wished(probability, asking)[owner]
    for _ in range(asking.corrections):
        flat = _corrected(flat, wished, rounds[-1], spacing_mm, generator)
        masks = model.segment(chosen, flat, masks)
        rounds.append(masks.probability.float())
    mean, quality = _by_owner(rounds[-1], owner, len(prompts)), _by_owner(_quality(masks), owner, len(prompts))
    several = torch.stack(rounds).mean(0) if len(rounds) > 1 else rounds[0]
    centre = _by_owner(several, owner, len(prompts))
    squares = torch.stack([(one - centre[owner]) ** 2 for one in rounds]).mean(0)
    return Answers(mean, quality, _by_owner(squares, owner, len(prompts)), tuple(flat))


def _wished(probability: torch.Tensor, asking: Asking) -> torch.Tensor:
    """The masks ``[N, X, Y, Z]`` that are asked about, without the pieces that no prompt is for."""
    masks = probability.detach().float() > asking.threshold
    if asking.corrections and asking.components == "largest":
        masks = torch.stack([largest_piece(mask) for mask in masks])
    return masks


def _one_by_one(points: Prompt) -> list[Prompt]:
    """Each click inside alone, with all those outside."""
    assert points.points_voxel is not None and points.point_labels is not None
    inside = points.point_labels == 1
    alone = []
    for number in inside.nonzero()[:, 0].tolist():
        kept = ~inside
        kept[number] = True
        alone.append(Prompt(points.points_voxel[kept], points.point_labels[kept]))
    return alone


def _corrected(
    prompts: Sequence[Prompt],
    wished: torch.Tensor,
    given: torch.Tensor,
    spacing_mm: Spacing,
    generator: torch.Generator | None,
) -> list[Prompt]:
    """The prompts with one more click each, and without a dense mask; one whose answer is as wished stays as it is."""
    corrected = []
    for prompt, want, got in zip(prompts, wished, given, strict=True):
        click = correction_clicks(want, got > 0.5, spacing_mm=spacing_mm, generator=generator)
        corrected.append(prompt if click is None else replace(combine(prompt, click), mask=None))
    return corrected


def _quality(masks: Masks) -> torch.Tensor:
    return masks.quality.detach().float().clamp(0, 1)


def _by_owner(values: torch.Tensor, owner: torch.Tensor, count: int) -> torch.Tensor:
    """Mean over the answers that belong to the same mask."""
    total = values.new_zeros(count, *values.shape[1:]).index_add_(0, owner, values)
    share = owner.bincount(minlength=count).to(values)
    return total / share.reshape(-1, *[1] * (values.ndim - 1))
