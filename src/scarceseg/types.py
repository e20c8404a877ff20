"""Tensor aliases with their axes, and the few objects that travel between the folders.

Axes: ``B`` batch, ``L`` labelled rows, ``U`` unlabelled rows, ``C`` image channels, ``K`` classes (background is 0),
``X, Y, Z`` voxel indices of the prepared volume in the order of the image's own index (x fastest on disk in ITK terms).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

Volume = NDArray[np.float32]
"""Image array ``[C, X, Y, Z]``, float32."""
LabelMap = NDArray[np.uint8]
"""Class index per voxel ``[X, Y, Z]``, uint8."""
ImageBatch = torch.Tensor
"""``[B, C, X, Y, Z]`` float32, normalised intensities."""
LabelBatch = torch.Tensor
"""``[B, X, Y, Z]`` int64 class indices; 255 is ignored."""
Logits = torch.Tensor
"""``[B, K, X, Y, Z]`` raw network output."""
Probability = torch.Tensor
"""``[B, K, X, Y, Z]`` in [0, 1], sums to one over K."""

Augment = Literal["deform", "all", "reflections", "none"]
"""What training does to its patches, see `scarceseg.data.sampling.PatchSampler`."""

IGNORE_LABEL = 255


@dataclass(frozen=True)
class Geometry:
    """Where a voxel grid lies in the patient (ITK conventions, LPS world, millimetres).

    Attributes:
        size: voxels along each index axis ``(X, Y, Z)``.
        spacing_mm: distance of voxel centres along each index axis.
        origin: world position of the centre of voxel (0, 0, 0).
        direction: row-major 3x3 cosine matrix; column j is the world direction of index axis j.
    """

    size: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    origin: tuple[float, float, float]
    direction: tuple[float, ...]


@dataclass(frozen=True)
class Labelled:
    """Patches with reference labels. ``fields`` holds further per-voxel maps cut and turned with the image."""

    image: ImageBatch
    label: LabelBatch
    case: tuple[str, ...]
    fields: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Unlabelled:
    """Patches of the unlabelled pool. There is no label attribute, by design: a term cannot read what is not there."""

    image: ImageBatch
    case: tuple[str, ...]
    fields: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """What a promptable model is asked: clicks, a box and/or a dense mask, in voxel indices of the volume it embeds.

    Attributes:
        points_voxel: ``[N, 3]`` voxel indices (x, y, z), or None.
        point_labels: ``[N]`` 1 for inside, 0 for outside, or None.
        box_voxel: ``[2, 3]`` lowest and highest corner, both inside, or None.
        mask: ``[X, Y, Z]`` probability in [0, 1], or None.
    """

    points_voxel: torch.Tensor | None = None
    point_labels: torch.Tensor | None = None
    box_voxel: torch.Tensor | None = None
    mask: torch.Tensor | None = None


@dataclass
class Step:
    """Everything a term may look at in one training step.

    Attributes:
        iteration: t, counted from 0.
        total: T, number of iterations of the stage.
        labelled: labelled patches.
        unlabelled: unlabelled patches, or None when no term of the run reads them.
        logits_l: student output on the labelled rows ``[L, K, X, Y, Z]``.
        logits_u: student output on the unlabelled rows ``[U, K, X, Y, Z]``, or None.
        extra: student output on the rows a term added through ``extra_inputs``, by term name.
        encoded, decoded: what the student's encoder and decoder gave for the same rows, lists from the finest to the
            coarsest level; keys are "labelled", "unlabelled" and the names in `extra`. Empty unless a term of the run
            asks for them (``Term.shares_features``).
        generator: seeded generator on the tensors' device; all randomness of a term comes from it.
    """

    iteration: int
    total: int
    labelled: Labelled
    unlabelled: Unlabelled | None
    logits_l: Logits
    logits_u: Logits | None
    generator: torch.Generator
    extra: dict[str, Logits] = field(default_factory=dict)
    encoded: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    decoded: dict[str, list[torch.Tensor]] = field(default_factory=dict)
