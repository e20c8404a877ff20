"""The task of `tiny-sam3d`: find the target from clicks that are drawn where the last mask is wrong, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from scarceseg.foundation.tiny_sam3d_net import EncodedPrompt, TinySam3DNet
from scarceseg.functional.spoilt import spoilt_masks
from scarceseg.pretrain.volumes import TRAINING, Setting, Shape, SyntheticVolume, draw_target, make_volume

Name = TypeVar("Name", str, int)
Answer = Callable[[EncodedPrompt], tuple[torch.Tensor, torch.Tensor]]
"""Prompts in; logits ``[R, X, Y, Z]`` and quality ``[R]`` out."""

STARTS = {"click": 0.72, "box": 0.14, "mask": 0.14}
CLICKS = {1: 0.3, 2: 0.2, 3: 0.2, 5: 0.2, 8: 0.1}


class ClickTask:
    """Interactive segmentation of synthetic volumes.

    Each volume is embedded once and asked for several targets. A target starts from one click, a loose box or a spoilt mask; then
    clicks follow, each in the largest error of the mask before (or, now and then, anywhere in the error). All clicks but the
    last two are answered without gradient.

    Args:
        network: the model.
        batch: volumes a step.
        targets: targets of each volume.
        sizes: pairs of (until which part of the training, size of the volumes).
        setting: of the generator.
    """

    def __init__(
        self,
        network: TinySam3DNet,
        batch: int = 2,
        targets: int = 3,
        sizes: tuple[tuple[float, Shape], ...] = ((0.55, (48, 48, 32)), (1.0, (64, 64, 48))),
        setting: Setting = TRAINING,
    ) -> None:
        self.network = network
        self.batch, self.targets, self.sizes, self.setting = batch, targets, sizes, setting

    def _size(self, rng: np.random.Generator, done: float) -> Shape:
        size = next(shape for until, shape in self.sizes if done < until)
        order = rng.permutation(3)
        return size[order[0]], size[order[1]], size[order[2]]

    def draw(self, rng: np.random.Generator, shape: Shape) -> tuple[list[SyntheticVolume], torch.Tensor]:
        """A batch of volumes with their targets ``[batch * targets, X, Y, Z]``."""
        volumes: list[SyntheticVolume] = []
        masks: list[np.ndarray] = []
        while len(volumes) < self.batch:
            volume = make_volume(rng, shape, self.setting)
            found = [mask for _ in range(self.targets) if (mask := draw_target(rng, volume)) is not None]
            if found:
                volumes.append(volume)
                masks += [found[i % len(found)] for i in range(self.targets)]
        return volumes, torch.from_numpy(np.stack(masks))

    def loss(self, rng: np.random.Generator, done: float) -> dict[str, torch.Tensor]:
        """Dice and cross-entropy of the masks, error of the quality, and how well features tell regions apart."""
        volumes, target = self.draw(rng, self._size(rng, done))
        image = torch.from_numpy(np.stack([v.image for v in volumes]))[:, None]
        maps = self.network.encoder(image)
        similar = region_loss(
            maps["similar"], [v.region[::2, ::2, ::2] for v in volumes], rng, self.network.config.similarities
        )
        rows = {key: value.repeat_interleave(self.targets, 0) for key, value in maps.items()}
        losses = target_losses(dialogue(lambda prompt: self.network.head(rows, prompt), target, rng), target)
        total = losses["mask"] + 0.2 * losses["quality"] + 0.2 * similar
        return {"loss": total, "similar": similar, **losses}


def dialogue(
    answer: Answer,
    target: torch.Tensor,
    rng: np.random.Generator,
    starts: Mapping[str, float] = STARTS,
    clicks: Mapping[int, float] = CLICKS,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ask a model for each target in turns; every click lies where the last mask was wrong.

    Args:
        answer: the model, asked for all rows at once.
        target: ``[R, X, Y, Z]`` bool.
        rng: all randomness comes from it.
        starts: shares of the first prompt's kinds: ``click``, ``box`` (loose) and ``mask`` (spoilt).
        clicks: shares of the number of turns.

    Returns:
        Logits ``[R, X, Y, Z]`` and quality ``[R]`` of the last two turns; those before are asked without gradient.
    """
    length = _draw(rng, clicks)
    start = _draw(rng, starts)
    count = len(target)
    points, labels = torch.zeros(count, 0, 3), torch.zeros(count, 0, dtype=torch.long)
    boxes, mask = torch.full((count, 2, 3), float("nan")), None
    guess = torch.zeros_like(target)
    if start == "box":
        boxes = loose_boxes(target, rng)
    elif start == "mask":
        mask = spoilt_masks(target, rng)
        guess = mask[:, 0] > 0.5
    answers = []
    for turn in range(length):
        if turn == 0 and start == "box":  # a place that holds no click
            points, labels = torch.zeros(count, 1, 3), torch.full((count, 1), -1)
        else:
            new, inside = error_clicks(guess, target, rng)
            points, labels = torch.cat([points, new[:, None]], 1), torch.cat([labels, inside[:, None]], 1)
        prompt = EncodedPrompt(points, labels, boxes, mask, torch.full((count,), float(mask is not None)))
        counts = turn >= length - 2
        with torch.set_grad_enabled(counts and torch.is_grad_enabled()):
            logits, quality = answer(prompt)
        if counts:
            answers.append((logits, quality))
        mask = torch.sigmoid(logits.detach())[:, None]
        guess = logits.detach() > 0
    return answers


def _draw(rng: np.random.Generator, shares: Mapping[Name, float]) -> Name:
    names = list(shares)
    return names[int(rng.choice(len(names), p=list(shares.values())))]


def target_losses(answers: list[tuple[torch.Tensor, torch.Tensor]], target: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean over the answers of ``mask`` (Dice and cross-entropy) and ``quality``; ``dice`` of the last answer."""
    found = [_iou(logits, target) for logits, _ in answers]
    return {
        "mask": torch.stack([mask_loss(logits, target) for logits, _ in answers]).mean(),
        "quality": torch.stack([F.mse_loss(q, iou) for (_, q), iou in zip(answers, found, strict=True)]).mean(),
        "dice": (2 * found[-1] / (1 + found[-1])).mean(),
    }


def mask_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Soft Dice of each row plus cross-entropy, both averaged."""
    wanted = target.float()
    p = torch.sigmoid(logits).flatten(1)
    t = wanted.flatten(1)
    dice = 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)
    return dice.mean() + F.binary_cross_entropy_with_logits(logits, wanted)


def _iou(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    guess = logits.detach() > 0
    both = (guess & target).flatten(1).sum(1)
    return both / (guess | target).flatten(1).sum(1).clamp_min(1)


def region_loss(
    similar: torch.Tensor, regions: list[np.ndarray], rng: np.random.Generator, heads: int, samples: int = 160
) -> torch.Tensor:
    """Cross-entropy of 'same region' for pairs of random voxels, from the cosine of their features (contrastive)."""
    losses = []
    for features, region in zip(similar, regions, strict=True):
        half = torch.from_numpy(region.astype(np.int64)).flatten()
        at = torch.from_numpy(rng.integers(0, half.numel(), samples))
        unit = F.normalize(features.flatten(1)[:, at].reshape(heads, -1, samples), dim=1)
        logit = 8 * (torch.einsum("hwn,hwm->hnm", unit, unit).mean(0) - 0.5)
        same = half[at][:, None] == half[at]
        off = ~torch.eye(samples, dtype=torch.bool)
        positive = F.softplus(-logit[same & off])
        negative = F.softplus(logit[~same])
        if positive.numel() and negative.numel():
            losses.append(positive.mean() + negative.mean())
    return torch.stack(losses).mean() if losses else similar.sum() * 0


def error_clicks(
    guess: torch.Tensor, target: torch.Tensor, rng: np.random.Generator, anywhere: float = 0.25
) -> tuple[torch.Tensor, torch.Tensor]:
    """One click per row in the error of a mask: deep inside the larger error, or in `anywhere` of the rows at random.

    Args:
        guess: ``[R, X, Y, Z]`` bool, the mask so far; no side is shorter than 10 voxels.
        target: ``[R, X, Y, Z]`` bool.
        rng: all randomness comes from it.
        anywhere: share of clicks drawn from all error voxels.

    Returns:
        Voxels ``[R, 3]`` and labels ``[R]``: 1 inside, 0 outside, -1 where there is no error left.
    """
    wrong = torch.stack([target & ~guess, guess & ~target], 1).float()
    rows = len(target)
    size = target.shape[1:]
    depth = F.avg_pool3d(wrong, 2)
    for window in (3, 5, 5):
        depth = F.avg_pool3d(depth, window, stride=1, padding=window // 2)
    depth = F.interpolate(depth, size=size, mode="nearest") * wrong
    # The last slice of an odd size falls out of the coarse map; errors that lie there alone are still errors.
    depth = torch.where(depth > 0, depth, 1e-6 * wrong)
    spread = torch.from_numpy(rng.random((rows, *size), dtype=np.float32))
    random_rows = torch.from_numpy(rng.random(rows) < anywhere)
    score = torch.where(
        random_rows[:, None, None, None, None], wrong * spread[:, None], depth * (0.7 + 0.3 * spread[:, None])
    )
    best, index = score.flatten(2).max(2)
    kind = best.argmax(1)
    flat = index.gather(1, kind[:, None])[:, 0]
    points = torch.stack([flat // (size[1] * size[2]), flat // size[2] % size[1], flat % size[2]], 1).float()
    labels = torch.where(best.amax(1) > 0, 1 - kind, -1)
    return points, labels


def loose_boxes(target: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Corners ``[R, 2, 3]`` of each target's box, each face moved by up to a tenth of the side and at least a voxel."""
    boxes = []
    for mask in target:
        inside = mask.nonzero()
        low, high = inside.amin(0).numpy(), inside.amax(0).numpy()
        room = np.maximum((high - low) * 0.1, 1.0)
        limit = np.asarray(mask.shape) - 1
        low, high = low + rng.uniform(-1, 0.5, 3) * room, high + rng.uniform(-0.5, 1, 3) * room
        boxes.append(np.stack([np.clip(low, 0, limit), np.clip(high, 0, limit)]))
    return torch.from_numpy(np.stack(boxes).astype(np.float32))
