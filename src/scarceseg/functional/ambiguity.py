"""Which voxels a student and its teacher disagree on: class prototypes in feature space, and confident learning."""

from __future__ import annotations

from typing import Literal

import torch

from scarceseg.types import LabelBatch, Probability

Pruning = Literal["joint", "class", "noise-rate", "both"]


@torch.no_grad()
def nearest_prototype(features: torch.Tensor, probability: Probability) -> LabelBatch:
    """Class of the prototype that lies nearest to each voxel's features, row by row (Xu et al. 2023, prototype strategy).

    The prototype of class c is the mean feature over the voxels whose most probable class is c, weighted with ``p_c``; the
    distance is Euclidean. A class that is nowhere the most probable has no prototype.

    Args:
        features: ``[B, F, ...]``.
        probability: p, ``[B, K, ...]`` of the same size, which says where each class is.

    Returns:
        ``[B, ...]`` int64.
    """
    with torch.autocast(features.device.type, enabled=False):
        z = features.float().flatten(2)
        p = probability.float().flatten(2)
        mask = torch.zeros_like(p).scatter_(1, p.argmax(1, keepdim=True), p.amax(1, keepdim=True))
        total = mask.sum(2)
        prototypes = torch.einsum("bkv,bfv->bkf", mask, z) / total.clamp_min(1e-12)[..., None]
        # |z - c|^2 without |z|^2, which is the same for all classes.
        distance = prototypes.square().sum(2)[..., None] - 2.0 * torch.einsum("bkf,bfv->bkv", prototypes, z)
        distance = distance.masked_fill((total == 0)[..., None], torch.inf)
        return distance.argmin(1).view(probability.shape[0], *probability.shape[2:])


@torch.no_grad()
def confident_class(label: torch.Tensor, probability: torch.Tensor) -> torch.Tensor:
    """The class each voxel belongs to with confidence (Northcutt et al., JAIR 2021, eq. 1-2).

    It is the most probable of those classes j whose probability reaches ``t_j``, the mean of ``p_j`` over the voxels given as j.

    Args:
        label: ``[N]`` int64, the given classes.
        probability: ``[K, N]``.

    Returns:
        ``[N]`` int64; -1 where no class reaches its threshold.
    """
    classes = probability.shape[0]
    own = probability.gather(0, label[None])[0].double()
    count = torch.bincount(label, minlength=classes)
    threshold = torch.bincount(label, weights=own, minlength=classes) / count
    reached = probability >= threshold.nan_to_num(nan=torch.inf)[:, None]  # infinite: no voxel is given as this class
    best = torch.where(reached, probability, -torch.inf).argmax(0)
    return torch.where(reached.any(0), best, -1)


@torch.no_grad()
def confident_joint(label: torch.Tensor, confident: torch.Tensor, classes: int) -> torch.Tensor:
    """How many voxels given as class i are of class j (Northcutt et al., JAIR 2021, eq. 1 and 3, without the division by n).

    Args:
        label: ``[N]`` int64, the given classes.
        confident: ``[N]`` what `confident_class` returns.
        classes: K.

    Returns:
        ``[K, K]`` float64; row i is scaled to the number of voxels given as i, and 0 when none of them is of a confident class.
    """
    seen = confident >= 0
    joint = (
        torch.bincount(label[seen] * classes + confident[seen], minlength=classes**2).view(classes, classes).double()
    )
    return joint * (torch.bincount(label, minlength=classes) / joint.sum(1).clamp_min(1.0))[:, None]


@torch.no_grad()
def label_issues(label: LabelBatch, probability: Probability, prune: Pruning = "both") -> torch.Tensor:
    """Voxels whose given class is likely wrong, by confident learning (Northcutt et al., JAIR 2021, sec. 3.2).

    With the confident joint C: "class" takes, of each given class i, the ``sum_{j != i} C_ij`` voxels with the lowest ``p_i``;
    "noise-rate", for each pair, the ``C_ij`` voxels of i with the largest ``p_j - p_i``; "both" the voxels that both of these
    take; "joint" those that are of another class with confidence. C is rounded to whole voxels, and equal values are taken
    together. A voxel whose given class is the most probable one is never taken.

    Args:
        label: ``[B, ...]`` int64 in 0 .. K - 1.
        probability: ``[B, K, ...]`` of a model that does not simply repeat the labels.
        prune: which of the rules.

    Returns:
        ``[B, ...]`` bool.
    """
    classes = probability.shape[1]
    p = probability.float().movedim(1, 0).flatten(1)
    given = label.flatten()
    confident = confident_class(given, p)
    doubtful = p.argmax(0) != given
    if prune == "joint":
        return (doubtful & (confident >= 0) & (confident != given)).view_as(label)
    joint = confident_joint(given, confident, classes).round().long().tolist()
    by_class, by_rate = torch.zeros_like(doubtful), torch.zeros_like(doubtful)
    for i in range(classes):
        mine = given == i
        by_class |= _largest(-p[i], mine, sum(joint[i]) - joint[i][i])
        for j in range(classes):
            if j != i:
                by_rate |= _largest(p[j] - p[i], mine, joint[i][j])
    taken = {"class": by_class, "noise-rate": by_rate, "both": by_class & by_rate}[prune]
    return (taken & doubtful).view_as(label)


def _largest(score: torch.Tensor, mine: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` voxels of `mine` with the largest score, and those that equal the last of them."""
    if count < 1:
        return torch.zeros_like(mine)
    values = score[mine]
    last = values.kthvalue(max(len(values) - count + 1, 1)).values
    return mine & (score >= last)
