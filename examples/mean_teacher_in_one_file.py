"""Mean Teacher for 3D segmentation in one file: the equations without the library around them.

    L = 0.5 (CE + Dice)(f(x_l), y_l) + w(t) mean((softmax f(x_u) - softmax f'(x_u + noise))^2)
    f' <- a f' + (1 - a) f,  a = min(1 - 1/(t + 1), 0.99),  w(t) = 0.1 exp(-5 (1 - t/T)^2) in 40 steps

(Tarvainen & Valpola 2017; the 3D recipe is that of UA-MT, Yu et al. 2019.) A test checks that the losses are those of
the engine. Run it as it is to train on made-up volumes: ``python examples/mean_teacher_in_one_file.py``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor, Tensor]
"""Labelled images [L, C, X, Y, Z], their labels [L, X, Y, Z], unlabelled images [U, C, X, Y, Z]."""


def dice_loss(probability: Tensor, label: Tensor, smooth: float = 1e-5) -> Tensor:
    """Mean over the foreground classes of 1 - (2 sum p g + s) / (sum p^2 + sum g^2 + s)."""
    losses = []
    for c in range(1, probability.shape[1]):
        p, g = probability[:, c], (label == c).float()
        losses.append(1 - (2 * (p * g).sum() + smooth) / ((p * p).sum() + g.sum() + smooth))
    return torch.stack(losses).mean()


def supervised_loss(logits: Tensor, label: Tensor) -> Tensor:
    """0.5 (CE + Dice)."""
    return 0.5 * (F.cross_entropy(logits, label) + dice_loss(logits.softmax(1), label))


def consistency_weight(t: int, total: int) -> float:
    """0.1 S(e, 40) with e the fortieth of the run that t lies in."""
    return 0.1 * math.exp(-5 * (1 - (t * 40 // total) / 40) ** 2)


def gaussian_noise(x: Tensor) -> Tensor:
    """normal(0, 0.1), clipped to +-0.2."""
    return (0.1 * torch.randn_like(x)).clamp(-0.2, 0.2)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, t: int) -> None:
    """Exponential moving average of the parameters; batch-norm buffers stay the teacher's own."""
    a = min(1 - 1 / (t + 1), 0.99)
    for w, v in zip(teacher.parameters(), student.parameters(), strict=True):
        w.mul_(a).add_(v, alpha=1 - a)


def train(
    student: nn.Module,
    batches: Iterator[Batch],
    total: int,
    noise: Callable[[Tensor], Tensor] = gaussian_noise,
) -> list[tuple[float, float]]:
    """Train in place; returns the supervised and the consistency loss of every iteration."""
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    student.train()
    teacher.train()
    history = []
    for t, (x_l, y_l, x_u) in zip(range(total), batches, strict=False):
        optimizer.param_groups[0]["lr"] = 0.01 * 0.1 ** (t // max(round(total * 2500 / 6000), 1))
        logits = student(torch.cat([x_l, x_u]))
        supervised = supervised_loss(logits[: len(x_l)], y_l)
        with torch.no_grad():
            target = teacher(x_u + noise(x_u)).softmax(1)
        consistency = (logits[len(x_l) :].softmax(1) - target).square().mean()
        optimizer.zero_grad()
        (supervised + consistency_weight(t, total) * consistency).backward()
        optimizer.step()
        follow(teacher, student, t)
        history.append((supervised.item(), consistency.item()))
    return history


def made_up_batches(side: int = 32, seed: int = 0) -> Iterator[Batch]:
    """Bright balls in noise, two labelled and two unlabelled volumes a batch."""
    g = torch.Generator().manual_seed(seed)
    axes = torch.meshgrid(*[torch.arange(side)] * 3, indexing="ij")
    while True:
        centre = torch.randint(side // 4, 3 * side // 4, (4, 3), generator=g)
        distance = torch.stack([sum((a - c) ** 2 for a, c in zip(axes, row, strict=True)) for row in centre]).sqrt()
        label = (distance < side / 5).long()
        image = (label + 0.8 * torch.randn(label.shape, generator=g)).unsqueeze(1)
        yield image[:2], label[:2], image[2:]


def small_network(filters: int = 8) -> nn.Module:
    """Three convolutions, enough for balls."""
    units: list[nn.Module] = []
    for source, target in ((1, filters), (filters, filters)):
        units += [nn.Conv3d(source, target, 3, padding=1), nn.BatchNorm3d(target), nn.ReLU(inplace=True)]
    return nn.Sequential(*units, nn.Conv3d(filters, 2, 1))


if __name__ == "__main__":
    torch.manual_seed(0)
    for t, (supervised, consistency) in enumerate(train(small_network(), made_up_batches(), total=60)):
        if t % 10 == 0:
            print(f"iteration {t:3d}  supervised {supervised:.4f}  consistency {consistency:.6f}")
