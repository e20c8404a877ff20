"""AC-MT, CPS, ICT and BCP, voxel by voxel, from the equations."""

from __future__ import annotations

import math

import numpy as np

from tests.reference.losses import cross_entropy, dice_loss, softmax


def voxels(array: np.ndarray) -> list[tuple[int, ...]]:
    """Row and position of every voxel of ``[B, K, ...]``."""
    return [(b, *v) for b in range(len(array)) for v in np.ndindex(array.shape[2:])]


def at(array: np.ndarray, where: tuple[int, ...]) -> np.ndarray:
    """The K values of one voxel."""
    return np.asarray(array[(where[0], slice(None), *where[1:])])


def ramped(first: float, last: float, t: int, total: int) -> float:
    """From the first to the last value by exp(-5 (1 - t/T)^2)."""
    return first + (last - first) * math.exp(-5 * (1 - t / total) ** 2)


def entropy_share(probability: np.ndarray) -> np.ndarray:
    """Entropy as a share of ln K."""
    k = probability.shape[1]
    return -(probability * np.log(probability + 1e-6)).sum(1) / math.log(k)


def masked(student: np.ndarray, teacher: np.ndarray, mask: np.ndarray) -> float:
    """Squared difference of the softmax outputs over classes and the voxels of the mask ``[B, ...]``."""
    p, q = softmax(student.astype(np.float64)), softmax(teacher.astype(np.float64))
    values = [float(((at(p, v) - at(q, v)) ** 2).sum()) for v in voxels(p) if mask[v]]
    return sum(values) / (student.shape[1] * len(values)) if values else 0.0


def nearest_prototype(features: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """Class of the nearest class mean of each row, means weighted with the class's probability."""
    winner = probability.argmax(1)
    result = np.zeros_like(winner)
    for b in range(len(features)):
        places = list(np.ndindex(winner[b].shape))
        prototypes = {}
        for c in range(probability.shape[1]):
            inside = [v for v in places if winner[(b, *v)] == c]
            if inside:
                weights = np.array([probability[(b, c, *v)] for v in inside])
                vectors = np.stack([at(features, (b, *v)) for v in inside])
                prototypes[c] = (weights[:, None] * vectors).sum(0) / weights.sum()
        for v in places:
            z = at(features, (b, *v))
            result[(b, *v)] = min(prototypes, key=lambda c: float(np.linalg.norm(z - prototypes[c])))
    return result


def confident_joint(label: np.ndarray, probability: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Northcutt's confident joint, its rows scaled to the class counts, and each voxel's confident class (-1: none).

    `label` is ``[N]``, `probability` ``[N, K]``.
    """
    n, k = probability.shape
    threshold = [np.mean(probability[label == j, j]) if (label == j).any() else math.inf for j in range(k)]
    joint, classes = np.zeros((k, k)), []
    for v in range(n):
        above = [j for j in range(k) if probability[v, j] >= threshold[j]]
        classes.append(max(above, key=lambda j: probability[v, j]) if above else -1)
        if above:
            joint[label[v], classes[-1]] += 1
    for i in range(k):
        if joint[i].sum():
            joint[i] *= (label == i).sum() / joint[i].sum()
    return joint, classes


def label_issues(label: np.ndarray, probability: np.ndarray, prune: str) -> np.ndarray:
    """Which of ``[N]`` labels confident learning calls wrong; no two scores may be equal."""
    n, k = probability.shape
    joint, classes = confident_joint(label, probability)
    joint = np.round(joint)
    by_class, by_rate = set(), set()
    for i in range(k):
        mine = [v for v in range(n) if label[v] == i]
        off = int(joint[i].sum() - joint[i, i])
        by_class.update(sorted(mine, key=lambda v: probability[v, i])[:off])
        for j in set(range(k)) - {i}:
            ranked = sorted(mine, key=lambda v: probability[v, i] - probability[v, j])
            by_rate.update(ranked[: int(joint[i, j])])
    off_diagonal = {v for v in range(n) if classes[v] not in (-1, label[v])}
    taken = {"class": by_class, "noise-rate": by_rate, "both": by_class & by_rate, "joint": off_diagonal}[prune]
    return np.array([v in taken and probability[v].argmax() != label[v] for v in range(n)])


def cps(first: np.ndarray, second: np.ndarray) -> float:
    """Each learns the other's arg-max."""
    return cross_entropy(first, second.argmax(1)) + cross_entropy(second, first.argmax(1))


def ict(mixed: np.ndarray, teacher: np.ndarray, shares: np.ndarray) -> float:
    """Student on the mixtures against the mixtures of the teacher's probabilities of row i and the one after it."""
    p, q = softmax(mixed.astype(np.float64)), softmax(teacher.astype(np.float64))
    total = 0.0
    for i, share in enumerate(shares):
        after = q[(i + 1) % len(q)]
        total += float(((p[i] - (share * q[i] + (1 - share) * after)) ** 2).mean())
    return total / len(shares)


def part(logits: np.ndarray, label: np.ndarray, mask: np.ndarray) -> float:
    """Half of cross-entropy and Dice over all classes, on the voxels of the mask."""
    inside = np.where(mask, label, 255)
    return 0.5 * (cross_entropy(logits, inside) + dice_loss(logits, inside, background=True))


def bcp(logits: np.ndarray, reference: np.ndarray, pseudo: np.ndarray, known: np.ndarray, weight: float) -> float:
    """Both directions (even and odd mixtures): reference part, and the part with pseudo-labels times the weight."""
    total = 0.0
    for first in (0, 1):
        rows = list(range(first, len(logits), 2))
        total += part(logits[rows], reference[rows], known[rows])
        total += weight * part(logits[rows], pseudo[rows], ~known[rows])
    return total
