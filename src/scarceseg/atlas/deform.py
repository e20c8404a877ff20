"""Deformable registration on self-similarity features: a discrete search for the start, gradient descent for the rest.

Both volumes lie on one grid already (after an affine step). Every voxel is described by how alike the patches around
it are to each other (MIND-SSC), which survives another contrast or a bias field, unlike intensity differences. The
displacement is then found in two stages:

1. *Convex search* (Heinrich, Papiez, Schnabel & Handels, WBIR 2014): the cost of every displacement of a small cube is
   tabulated for every node of a coarse grid, and the pointwise best one is taken in turn with smoothing of the field,
   while a growing quadratic term ties the two together. This does not get caught in the nearest local minimum. Done
   both ways between the volumes, and again on a finer grid.
2. *Descent* (Siebert, Hansen & Heinrich, Learn2Reg 2021): Adam on the nodes of a finer grid, squared feature differences plus
   squared first differences of the field.

Everything is deterministic: no sampling, no initial guess by chance.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F

NEIGHBOURS = ((-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1))
PAIRS = tuple(
    (a, b)
    for a, b in itertools.combinations(NEIGHBOURS, 2)
    if sum((i - j) ** 2 for i, j in zip(a, b, strict=True)) == 2
)
"""The twelve pairs of face neighbours that lie a diagonal apart."""

COUPLING = (0.003, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Weights of the term between the smooth field and the pointwise best displacements, one per round of the search."""

FEATURE_WEIGHT = 12.0
"""Of the mean squared feature difference against the smoothness term, in the descent."""


def self_similarity(volume: torch.Tensor, dilation: int = 2) -> torch.Tensor:
    """MIND-SSC features (Heinrich et al., MICCAI 2013).

    ``exp(-(D_k - min_k D_k) / V)`` for the twelve pairs k of face neighbours of a voxel, where ``D_k`` is the mean
    squared difference of the 3x3x3 patches around the two, and V is the mean of these over k, kept within a factor of
    1000 of its mean over the volume.

    Args:
        volume: ``[X, Y, Z]``.
        dilation: distance of the neighbours, voxels.

    Returns:
        ``[1, 12, X, Y, Z]`` in [0, 1].
    """
    padded = F.pad(volume[None, None], (dilation,) * 6, mode="replicate")[0, 0]

    def shifted(offset: tuple[int, int, int]) -> torch.Tensor:
        window = tuple(
            slice(dilation * (o + 1), dilation * (o + 1) + n) for o, n in zip(offset, volume.shape, strict=True)
        )
        return padded[window]

    distance = smooth(torch.stack([(shifted(a) - shifted(b)).square_() for a, b in PAIRS])[None])
    distance -= distance.amin(1, keepdim=True)
    scale = distance.mean(1, keepdim=True)
    typical = scale.mean().clamp(min=torch.finfo(scale.dtype).tiny)
    return torch.exp(-distance / scale.clamp(float(typical) * 1e-3, float(typical) * 1e3))


def smooth(field: torch.Tensor) -> torch.Tensor:
    """Mean over 3x3x3 of ``[..., X, Y, Z]``, border values going on; not for gradients (see `smoothing`)."""
    for axis in (-3, -2, -1):
        n = field.shape[axis]
        total = field.clone()
        total.narrow(axis, 1, n - 1).add_(field.narrow(axis, 0, n - 1))
        total.narrow(axis, 0, n - 1).add_(field.narrow(axis, 1, n - 1))
        for end in (0, n - 1):
            total.narrow(axis, end, 1).add_(field.narrow(axis, end, 1))
        field = total.div_(3)
    return field


def smoothing(side: int) -> torch.Tensor:
    """Matrix ``[side, side]`` that does along one axis what `smooth` does three times: nearly a cubic B-spline."""
    inner = torch.eye(side + 2)
    mean = (inner[:-2] + inner[1:-1] + inner[2:]) / 3
    mean[:, 1] += mean[:, 0]  # border values go on
    mean[:, -2] += mean[:, -1]
    return torch.linalg.matrix_power(mean[:, 1:-1], 3)


def warp(values: torch.Tensor, displacement: torch.Tensor) -> torch.Tensor:
    """Values ``[1, C, X, Y, Z]`` read at every node plus its displacement ``[1, 3, X, Y, Z]`` (voxels), linear."""
    axes = [torch.arange(n, dtype=values.dtype) for n in displacement.shape[2:]]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None] + displacement
    size = torch.tensor(values.shape[2:], dtype=values.dtype).reshape(1, 3, 1, 1, 1)
    unit = (2 * place + 1) / size - 1
    return F.grid_sample(
        values, unit.movedim(1, -1).flip(-1), mode="bilinear", padding_mode="border", align_corners=False
    )


def enlarge(displacement: torch.Tensor, size: Sequence[int], factor: float) -> torch.Tensor:
    """A field on the grid of another resolution over the same box, in voxels of that grid."""
    return F.interpolate(displacement, size=tuple(size), mode="trilinear", align_corners=False) * factor


def cost_table(fixed: torch.Tensor, moving: torch.Tensor, radius: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared feature difference of every node for every displacement of a cube.

    Args:
        fixed, moving: ``[1, C, X, Y, Z]``.
        radius: of the cube, nodes.

    Returns:
        ``[X, Y, Z, D]``, and the displacements ``[D, 3]`` in nodes.
    """
    padded = F.pad(moving, (radius,) * 6, mode="replicate")
    steps = list(itertools.product(range(-radius, radius + 1), repeat=3))
    size = fixed.shape[2:]
    table = fixed.new_empty((len(steps), *size))
    for row, step in zip(table, steps, strict=True):
        x, y, z = (slice(radius + s, radius + s + n) for s, n in zip(step, size, strict=True))
        torch.sum((fixed - padded[:, :, x, y, z]).square_()[0], 0, out=row)
    return table.movedim(0, -1).contiguous(), torch.tensor(steps, dtype=fixed.dtype)


def convex_search(table: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """A smooth field of low cost, ``[1, 3, X, Y, Z]`` in nodes (see the top of this file)."""
    size = table.shape[:3]
    flat = table.flatten(0, 2)

    def best(costs: torch.Tensor) -> torch.Tensor:
        return smooth(steps[costs.argmin(1)].T.reshape(1, 3, *size))

    # From no displacement, so that flat places, where all steps cost the same, stay where they are.
    field = flat.new_zeros(1, 3, *size)
    length = steps.square().sum(1)
    for coupling in COUPLING:
        # |step - field|^2 without the part that is the same for all steps
        tied = torch.addmm(flat, field.reshape(3, -1).T, steps.T, alpha=-2 * coupling)
        field = best(tied.add_(length, alpha=coupling))
    return field


def consistent(forward: torch.Tensor, backward: torch.Tensor, rounds: int = 15) -> torch.Tensor:
    """The forward field, after both were drawn towards being each other's inverse."""
    for _ in range(rounds):
        forward, backward = (forward - warp(backward, forward)) / 2, (backward - warp(forward, backward)) / 2
    return forward


def descend(
    fixed: torch.Tensor, moving: torch.Tensor, start: torch.Tensor, iterations: int, smoothness: float
) -> torch.Tensor:
    """Adam from `start` on squared feature difference plus squared first differences of the field (nodes).

    The field is the smoothed version (three times `smooth`) of the free parameters, as with cubic B-splines.
    """
    nodes = start.clone().requires_grad_()
    along = [smoothing(side) for side in start.shape[2:]]

    def spline(values: torch.Tensor) -> torch.Tensor:
        for axis, matrix in zip((2, 3, 4), along, strict=True):
            values = torch.tensordot(values, matrix, dims=([axis], [1])).movedim(-1, axis)
        return values

    optimiser = torch.optim.Adam([nodes], lr=1.0)
    for _ in range(iterations):
        field = spline(nodes)
        bending = sum((field.diff(dim=axis).square().mean() for axis in (2, 3, 4)), start=field.new_zeros(()))
        loss = FEATURE_WEIGHT * (warp(moving, field) - fixed).square().mean() + smoothness * bending
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return spline(nodes.detach())


def search_levels(
    fixed: torch.Tensor, moving: torch.Tensor, levels: Sequence[tuple[int, int]], control: int
) -> torch.Tensor:
    """Displacement by convex searches, each starting from what the one before has found.

    Args:
        fixed, moving: features ``[1, C, X, Y, Z]``.
        levels: (voxels between nodes, radius of the search in nodes).
        control: voxels between nodes of the result.

    Returns:
        ``[1, 3, X/control, Y/control, Z/control]`` in nodes.
    """
    field, before = fixed.new_zeros(1, 3, 1, 1, 1), 1
    for stride, radius in levels:
        a, b = F.avg_pool3d(fixed, stride), F.avg_pool3d(moving, stride)
        field = enlarge(field, a.shape[2:], before / stride)
        b = warp(b, field)
        forward = convex_search(*cost_table(a, b, radius))
        backward = convex_search(*cost_table(b, a, radius))
        step = consistent(forward, backward)
        field, before = step + warp(field, step), stride
    return enlarge(field, [n // control for n in fixed.shape[2:]], before / control)


def deformable(
    fixed: torch.Tensor,
    moving: torch.Tensor,
    levels: Sequence[tuple[int, int]] = ((4, 4), (3, 2)),
    control: int = 3,
    iterations: int = 30,
    smoothness: float = 0.3,
) -> torch.Tensor:
    """Displacement of fixed voxels to where they are in the moving volume.

    Args:
        fixed, moving: ``[X, Y, Z]`` float32 on one grid; sides are multiples of all strides and of `control`.
        levels: of the discrete search, see `search_levels`.
        control: voxels between nodes of the descent.
        iterations: of the descent; 0 leaves it out.
        smoothness: weight of the field's first differences in the descent.

    Returns:
        ``[3, X/control, Y/control, Z/control]`` in voxels of the volumes.
    """
    with torch.no_grad():
        a, b = self_similarity(fixed), self_similarity(moving)
        field = search_levels(a, b, levels, control)
        a, b = F.avg_pool3d(a, control), F.avg_pool3d(b, control)
    if iterations:
        field = descend(a, b, field, iterations, smoothness)
    return field[0] * control
