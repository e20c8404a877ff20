"""Prepared volumes -> two-stream batches of patches: labelled rows and unlabelled rows, cropped, and bent or turned.

Every row is a pure function of (seed, stream, row number). Batches can therefore be made ahead in threads, on any
number of processes, and from any iteration on, and are always the same.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from scarceseg.data.augment import deform
from scarceseg.data.crop import crop_padded, padded_size
from scarceseg.seeds import rng
from scarceseg.types import IGNORE_LABEL, Augment, Labelled, LabelMap, Unlabelled, Volume

Array = NDArray[Any]


@dataclass(frozen=True)
class Source:
    """One volume a patch can be cut from.

    Attributes:
        name: case.
        image: ``[C, X, Y, Z]`` float32, usually memory-mapped.
        label: ``[X, Y, Z]`` uint8 for a labelled case, None for an unlabelled one.
        fields: further maps ``[..., X, Y, Z]`` that are cut and turned with the image, such as pseudo-labels.
    """

    name: str
    image: Volume
    label: LabelMap | None = None
    fields: Mapping[str, Array] | None = None


def turn(array: Array, quarter_turns: int, flip_axis: int | None) -> Array:
    """Rotate by 90-degree steps in the slice plane (axes X, Y), then flip along X (0), Y (1) or not at all (None)."""
    turned = np.rot90(array, quarter_turns, axes=(-3, -2)) if quarter_turns else array
    return turned if flip_axis is None else np.flip(turned, axis=flip_axis - 3)


Batch = tuple[Labelled, Unlabelled | None]


def numpys_blas() -> ThreadpoolController:
    """The OpenBLAS that NumPy and SciPy bring; one that PyTorch computes with is left alone."""
    every = ThreadpoolController().select(internal_api="openblas")
    return every.select(filepath=[path for one in every.info() if re.search("numpy|scipy", path := one["filepath"])])


MOST_WORKERS = 4


def workers_here() -> int:
    """Threads that make batches: one where the training itself computes on the processor, up to four that feed a GPU."""
    if not torch.cuda.is_available():
        return 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(max((os.cpu_count() or 1) // processes - 1, 1), MOST_WORKERS)


def made_ahead(
    make: Callable[[int], Batch], start: int, stop: int, ahead: int = 2, workers: int | None = None
) -> Iterator[Batch]:
    """``make(start) .. make(stop - 1)`` in this order, made ahead of their use in background threads.

    Until the last one NumPy's OpenBLAS has one thread: its others keep a core busy for a while after every product, which
    with these small products is most of the time, and the training waits for that core.

    Args:
        make: the batch of an iteration, a pure function of it; called in several threads at once.
        start, stop: iterations.
        ahead: batches that wait to be used, at least one a thread.
        workers: threads; None: `workers_here`.
    """
    count = workers_here() if workers is None else workers
    with numpys_blas().limit(limits=1), ThreadPoolExecutor(count, thread_name_prefix="patches") as pool:
        waiting: list[Future[Batch]] = []
        try:
            for iteration in range(start, stop):
                while len(waiting) <= max(ahead, count) and iteration + len(waiting) < stop:
                    waiting.append(pool.submit(make, iteration + len(waiting)))
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


class PatchSampler:
    """Makes the batch of any iteration.

    Cases are visited in a new random order per round, each once a round. A patch position is uniform over the volume,
    or, for the share `foreground` of labelled rows, centred (as far as the border allows) on a voxel of a foreground class of the
    case, each class as often as the others.

    Args:
        labelled: sources with labels.
        unlabelled: sources without; may be empty when `batch_unlabelled` is 0.
        patch: voxels ``(X, Y, Z)``.
        batch_labelled, batch_unlabelled: rows.
        seed: of the run.
        augment: what is done to a patch. "deform" bends it a little, changes its contrast (`scarceseg.data.augment.deform`)
            and leaves it in the volume's frame. The next two draw an orientation in the slice plane: "all" each of the four
            turns and four reflections alike; "reflections" flips after every turn, along X or Y, as the published scripts
            do. Quarter turns need X = Y, otherwise only half turns are drawn. "none" only crops.
        foreground: share in [0, 1].
        spacing_mm: of the prepared voxels, in which "deform" draws.
    """

    def __init__(
        self,
        labelled: Sequence[Source],
        unlabelled: Sequence[Source],
        patch: tuple[int, int, int],
        batch_labelled: int,
        batch_unlabelled: int,
        seed: int,
        *,
        augment: Augment = "deform",
        foreground: float = 0.0,
        spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        self.sources = {"labelled": list(labelled), "unlabelled": list(unlabelled)}
        self.rows = {"labelled": batch_labelled, "unlabelled": batch_unlabelled}
        self.patch = patch
        self.seed = seed
        self.augment = augment
        self.foreground = foreground
        self.spacing_mm = spacing_mm
        self._foreground_voxels: dict[str, list[NDArray[np.int64]]] = {}

    def set_fields(self, fields: Mapping[str, Mapping[str, Array]]) -> None:
        """Other maps for the unlabelled cases, by case; batches made from now on have them."""
        self.sources["unlabelled"] = [
            replace(source, fields=fields.get(source.name)) for source in self.sources["unlabelled"]
        ]

    def batch(self, iteration: int) -> Batch:
        """Labelled and unlabelled rows of one iteration, as CPU tensors."""
        image, label, fields, names = self._stack("labelled", iteration)
        if label is None:
            raise ValueError("a labelled source has no label")
        labelled = Labelled(image, label.long(), names, fields)
        if not self.rows["unlabelled"]:
            return labelled, None
        return labelled, self.unlabelled(iteration)

    def unlabelled(self, iteration: int) -> Unlabelled:
        """Unlabelled rows of one iteration, as CPU tensors."""
        image, _, fields, names = self._stack("unlabelled", iteration)
        return Unlabelled(image, names, fields)

    def batches(self, start: int, stop: int, ahead: int = 2, workers: int | None = None) -> Iterator[Batch]:
        """Batches of the iterations ``start .. stop - 1``, made ahead of their use, see `made_ahead`."""
        return made_ahead(self.batch, start, stop, ahead, workers)

    def _stack(
        self, stream: str, iteration: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor], tuple[str, ...]]:
        count = self.rows[stream]
        rows = [self._row(stream, iteration * count + i) for i in range(count)]
        maps = {key: torch.from_numpy(np.stack([row[key] for _, row in rows])) for key in rows[0][1]}
        return maps.pop("image"), maps.pop("label", None), maps, tuple(name for name, _ in rows)

    def _row(self, stream: str, number: int) -> tuple[str, dict[str, Array]]:
        sources = self.sources[stream]
        epoch, place = divmod(number, len(sources))
        order = rng(self.seed, stream, 0, epoch).permutation(len(sources))
        source = sources[int(order[place])]
        draw = rng(self.seed, stream, 1, number)
        maps: dict[str, Array] = {"image": source.image, **(source.fields or {})}
        if source.label is not None:
            maps["label"] = source.label
        start = self._start(source, padded_size(source.image.shape[-3:], self.patch), draw)
        if self.augment == "deform":
            return source.name, deform(maps, start, self.patch, draw, spacing_mm=self.spacing_mm)
        turns, flip = self._turn(draw)
        return source.name, {
            key: np.ascontiguousarray(turn(crop_padded(value, start, self.patch, self.patch), turns, flip))
            for key, value in maps.items()
        }

    def _start(self, source: Source, size: Sequence[int], draw: np.random.Generator) -> list[int]:
        room = [side - patch for side, patch in zip(size, self.patch, strict=True)]
        uniform = [int(draw.integers(0, r + 1)) for r in room]
        if source.label is None or not self.foreground or draw.random() >= self.foreground:
            return uniform
        classes = self._foreground(source)
        if not classes:
            return uniform
        voxels = classes[int(draw.integers(len(classes)))] if len(classes) > 1 else classes[0]
        centre = np.unravel_index(int(voxels[draw.integers(len(voxels))]), source.label.shape)
        shift = [(side - own) // 2 for side, own in zip(size, source.label.shape, strict=True)]
        return [
            int(np.clip(c + s - patch // 2, 0, r))
            for c, s, patch, r in zip(centre, shift, self.patch, room, strict=True)
        ]

    def _foreground(self, source: Source) -> list[NDArray[np.int64]]:
        """Voxels of each foreground class that a case has."""
        if source.name not in self._foreground_voxels:
            assert source.label is not None
            label = np.ravel(source.label)
            known = sorted({int(value) for value in np.unique(label)} - {0, IGNORE_LABEL})
            self._foreground_voxels[source.name] = [np.flatnonzero(label == value) for value in known]
        return self._foreground_voxels[source.name]

    def _turn(self, draw: np.random.Generator) -> tuple[int, int | None]:
        if self.augment == "none":
            return 0, None
        turns = int(draw.integers(4)) if self.patch[0] == self.patch[1] else 2 * int(draw.integers(2))
        other = int(draw.integers(2))
        return turns, other if self.augment == "reflections" else (None if other else 0)
