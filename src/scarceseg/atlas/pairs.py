"""One atlas and one target: what is known of them, and their alignment on disk."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from scarceseg.atlas.frame import box_size_mm
from scarceseg.atlas.register import Alignment, Registration, align_affine, align_deformable, working_spacing
from scarceseg.data.cache import entry_path, load, store
from scarceseg.data.prepare import PreparedCase
from scarceseg.errors import RunError
from scarceseg.types import Geometry, Volume

ATLAS_VERSION = 1
"""Part of every cache key; raised when alignments change."""

PROCESS = 200 * 2**20
"""Bytes of a worker process by itself, about, beside the libraries that all share."""


@dataclass(frozen=True)
class Scan:
    """What a registration may know of a case: there is no label, by design.

    Attributes:
        name: of the case.
        image: ``[C, X, Y, Z]`` float32.
        geometry: its grid.
        digest: hash of both, the identity of the case in the cache.
    """

    name: str
    image: Volume
    geometry: Geometry
    digest: str


@dataclass(frozen=True)
class Pair:
    """An atlas to be aligned to a target, and where the result is kept."""

    fixed: Scan
    moving: Scan
    registration: Registration
    folder: Path

    def with_registration(self, registration: Registration) -> Pair:
        """The same two scans, aligned in another way."""
        return replace(self, registration=registration)

    @property
    def entry(self) -> Path:
        """Cache entry, by content of both scans and all options that matter for the stage."""
        how: dict[str, Any] = {
            "version": ATLAS_VERSION,
            "fixed": self.fixed.digest,
            "moving": self.moving.digest,
            "registration": self.registration.relevant(),
        }
        name = f"{self.fixed.name}-from-{self.moving.name}-{self.registration.stage}"
        return entry_path(self.folder, name, [], how)


def scan_of(case: PreparedCase) -> Scan:
    """A prepared case without its label."""
    image = np.ascontiguousarray(case.image)
    digest = hashlib.sha256(repr((image.shape, image.dtype.str, asdict(case.geometry))).encode())
    digest.update(image.data)
    return Scan(case.name, image, case.geometry, digest.hexdigest())


def registration_memory(fixed: Scan, moving: Scan, how: Registration) -> float:
    """Bytes that aligning two scans takes in a process of its own, about: both images as they come, the channel that is
    looked at, and what the deformation works with (measured: 560 to 620 bytes a voxel there)."""
    images = sum(8 * scan.image.size + 12 * math.prod(scan.geometry.size) for scan in (fixed, moving))
    if how.stage != "deformable":
        return PROCESS + images
    spacing = working_spacing(fixed.geometry, moving.geometry, how)
    return PROCESS + images + 640 * float(box_size_mm(fixed.geometry).prod()) / spacing**3


def is_kept(pair: Pair) -> bool:
    """Whether the alignment is in the cache, whole."""
    return load(pair.entry) is not None


def aligned(pair: Pair) -> None:
    """Align the two scans and keep the result. Needs nothing but its argument, so any process can do it."""
    fixed, moving, how = pair.fixed, pair.moving, pair.registration
    args = (fixed.image, fixed.geometry, moving.image, moving.geometry)
    if how.stage == "deformable":
        first = pair.with_registration(how.up_to("affine"))
        start = kept_alignment(first) if is_kept(first) else align_affine(*args, first.registration)
        found = align_deformable(*args, start, how)
    else:
        found = align_affine(*args, how)
    field = np.zeros((3, 0, 0, 0), dtype=np.float32) if found.field is None else found.field
    notes = {
        "affine": found.affine.tolist(),
        "grid": None if found.grid is None else asdict(found.grid),
        "stage": found.stage,
        "similarity": found.similarity,
        "note": found.note,
    }
    store(pair.entry, field, notes)


def kept_alignment(pair: Pair) -> Alignment:
    """The alignment from the cache.

    Raises:
        RunError: it is not there any more.
    """
    found = load(pair.entry)
    if found is None:
        raise RunError(f"the alignment {pair.entry} was removed while it was in use; start again")
    field, notes = found
    grid = notes["grid"]
    return Alignment(
        np.asarray(notes["affine"]),
        None if grid is None else np.asarray(field),
        None if grid is None else Geometry(**{key: tuple(value) for key, value in grid.items()}),
        notes["stage"],
        notes["similarity"],
        notes["note"],
    )
