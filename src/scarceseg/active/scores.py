"""The arithmetic of a suggestion: uncertainty, disagreement, ranks, and the greedy choice. NumPy only, no files.

    I(v) = mean of rank(U(v)) and rank(D(v))                informativeness, ranks within the pool, in (0, 1]
    next = argmax_v I(v) * N(d(v)),   d(v) = min_s |f(v) - f(s)| over s labelled or chosen before

U is the entropy of the student's prediction where it sees structures, D one minus the Dice between the student and another
teacher, f are features, and N turns a distance into its rank within the pool.

Sources: entropy is the oldest query score (Settles, Active Learning Literature Survey, 2009, sec. 3.1), two labellers who
disagree the next one (query by committee, Seung et al. 1992; Dice between two segmentations as a volume's uncertainty: Roy et
al., NeuroImage 2019, sec. 3.3); to take next what is far from everything taken is the greedy k-centre of core-sets (Sener and
Savarese, ICLR 2018, alg. 1); uncertainty times distance is the idea behind BADGE (Ash et al., ICLR 2020), and uncertainty
first, then diversity, that of suggestive annotation (Yang et al., MICCAI 2017). The mean over classes keeps small structures
from drowning, as in ClaSP PE (Lüth et al. 2026). The combination by ranks is ours: it has no weights to tune, and one odd
scan far from all others cannot stretch the scale.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.special import entr
from scipy.stats import rankdata

from scarceseg.types import IGNORE_LABEL, LabelMap

RIM = 2
"""Voxels around a predicted structure that count as its rim."""

Floats = NDArray[np.float64]


def entropy_map(probability: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """``-sum_c p_c ln p_c / ln K`` per voxel: 0 certain, 1 all classes alike.

    Args:
        probability: ``[K, X, Y, Z]``.

    Returns:
        ``[X, Y, Z]``.
    """
    total = np.zeros(probability.shape[1:], dtype=np.float32)
    for values in probability:
        total += entr(values)
    return np.clip(total / np.float32(np.log(len(probability))), 0.0, 1.0)


def class_uncertainty(
    entropy: NDArray[np.floating[Any]], label: LabelMap, classes: int, rim: int = RIM
) -> list[float | None]:
    """Mean entropy over each predicted structure and its rim.

    The mean over the whole volume would say how much easy background there is. The rim holds what the student leaves out
    although it half believes in it.

    Args:
        entropy: ``[X, Y, Z]``, see `entropy_map`.
        label: the student's classes ``[X, Y, Z]``.
        classes: K.
        rim: its width in voxels, along the axes (6 neighbours).

    Returns:
        One value in [0, 1] for each of the classes 1 .. K-1; None where the student finds none of it.
    """
    found: list[float | None] = [None] * (classes - 1)
    for index, box in enumerate(ndimage.find_objects(label, max_label=classes - 1)):
        if box is None:
            continue
        wide = tuple(slice(max(side.start - rim, 0), side.stop + rim) for side in box)
        region = label[wide] == index + 1
        if rim:
            region = ndimage.binary_dilation(region, iterations=rim)
        found[index] = float(entropy[wide][region].mean(dtype=np.float64))
    return found


def volume_uncertainty(by_class: Sequence[float | None], expected: Collection[int], whole: float) -> float:
    """U: mean over the structures of a volume, each counted alike whatever its size.

    A structure that every labelled volume has and the student does not find counts as 1, the largest value; one that may
    be absent is left out when it is not found.

    Args:
        by_class: of `class_uncertainty`.
        expected: classes (from 1) that every labelled volume has.
        whole: mean entropy over the whole volume, for one in which nothing is found and nothing expected.

    Returns:
        In [0, 1].
    """
    values = [
        1.0 if value is None else value for c, value in enumerate(by_class, 1) if value is not None or c in expected
    ]
    return float(np.mean(values)) if values else whole


def disagreement(label: LabelMap, other: LabelMap, classes: int) -> float | None:
    """D: ``1 - mean_c Dice_c`` between two labellers, over the foreground classes that either of them finds.

    Args:
        label, other: classes ``[X, Y, Z]``; voxels that are 255 in `other` are left out.
        classes: K.

    Returns:
        In [0, 1], 0 when both find nothing; None when `other` says nothing about any voxel.
    """
    known = other != IGNORE_LABEL
    if not known.any():
        return None
    overlaps = []
    for index in range(1, classes):
        mine, theirs = (label == index) & known, other == index
        if total := int(mine.sum()) + int(theirs.sum()):
            overlaps.append(2.0 * int((mine & theirs).sum()) / total)
    return 1.0 - float(np.mean(overlaps)) if overlaps else 0.0


def rank_share(values: NDArray[np.floating[Any]]) -> Floats:
    """Rank from the smallest, over their number: in (0, 1], ties share their mean rank. NaN stays NaN and does not count."""
    shares: Floats = np.full(len(values), np.nan)
    known = ~np.isnan(values)
    if known.any():
        shares[known] = rankdata(values[known]) / int(known.sum())
    return shares


def informativeness(uncertainty: Floats, disagree: Floats) -> Floats:
    """I: mean of the two ranks; of the first alone where there is no second labeller (NaN)."""
    first, second = rank_share(uncertainty), rank_share(disagree)
    return np.where(np.isnan(second), first, (first + second) / 2)


def novelty(distance: Floats, pool: Floats) -> Floats:
    """N: rank share of a distance among the distances of the pool to the labelled volumes, linear in between.

    Args:
        distance: d of each volume, to whatever is taken by now.
        pool: d of each volume at the start.

    Returns:
        In [0, 1]; 0 for the copy of a taken volume, 1 for the farthest one at the start. 1 for all when the whole pool lies
        on the labelled volumes: such features tell nothing.
    """
    if not pool.any():
        return np.ones(len(distance))
    order = np.argsort(pool, kind="stable")
    places, ranks = np.concatenate([[0.0], pool[order]]), np.concatenate([[0.0], rank_share(pool)[order]])
    return np.where(distance > 0, np.interp(distance, places, ranks), 0.0)


@dataclass(frozen=True)
class Pick:
    """One choice: index in the pool, its score then, and its distance then to what was taken before."""

    index: int
    score: float
    distance: float
    after: int | None
    """The chosen volume nearest to it, when that is nearer than every labelled one."""


def greedy(inform: Floats, to_labelled: Floats, between: Floats) -> list[Pick]:
    """Order a pool: always the volume with the largest ``I * N(d)``, then what is near it counts for less.

    Equal scores go to the larger I, then to the one that comes first. Scores never rise along the order, and the first n
    do not depend on n.

    Args:
        inform: I ``[n]``.
        to_labelled: distance of each volume to the nearest labelled one ``[n]``.
        between: distances within the pool ``[n, n]``.
    """
    distance, after = to_labelled.astype(np.float64).copy(), np.full(len(inform), -1)
    waiting = list(range(len(inform)))
    order: list[Pick] = []
    while waiting:
        score = inform * novelty(distance, to_labelled)
        best = max(waiting, key=lambda i: (score[i], inform[i], -i))
        order.append(
            Pick(best, float(score[best]), float(distance[best]), int(after[best]) if after[best] >= 0 else None)
        )
        waiting.remove(best)
        nearer = between[best] < distance
        distance[nearer] = between[best][nearer]
        after[nearer] = best
    return order
