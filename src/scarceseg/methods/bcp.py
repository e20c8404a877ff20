"""BCP: pieces of labelled and unlabelled patches are pasted into each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from scarceseg.data.sampling import Batch, PatchSampler
from scarceseg.errors import RunError
from scarceseg.files import write_atomic
from scarceseg.functional.components import largest_component
from scarceseg.functional.losses import segmentation_loss
from scarceseg.methods.base import METHODS, RampName, Term, TermOptions, build_terms
from scarceseg.networks.ema import EmaTeacher
from scarceseg.seeds import rng
from scarceseg.types import IGNORE_LABEL, ImageBatch, LabelBatch, Labelled, Logits, Step, Unlabelled

if TYPE_CHECKING:
    from scarceseg.engine.workspace import Workspace


class BcpOptions(TermOptions):
    """Options of bidirectional copy-paste.

    Attributes:
        decay: upper limit of the average's factor.
        teacher_norm: "batch" (published) or "running", see `scarceseg.networks.ema.EmaTeacher`.
        side: of the cuboid, as a share of the patch's.
        pseudo_weight: of the voxels that have a pseudo-label; those with a reference label have 1.
        largest_component: of pseudo-labels, keep the largest piece of each class.
        pretrain_iterations: of the stage before; None is 2000 in 15000 of the run's, as published, 0 leaves it out.
    """

    weight: float = Field(1.0, ge=0)
    ramp: RampName = "constant"
    decay: float = Field(0.99, ge=0, lt=1)
    teacher_norm: Literal["batch", "running"] = "batch"
    side: float = Field(2 / 3, gt=0, lt=1)
    pseudo_weight: float = Field(0.5, ge=0)
    largest_component: bool = True
    pretrain_iterations: int | None = Field(None, ge=0)


@METHODS.register("bcp")
class Bcp(Term):
    """Bidirectional copy-paste (Bai et al., CVPR 2023, sec. 3).

    A cuboid of an unlabelled patch is pasted into a labelled one, and one of a labelled into another unlabelled one; the student
    learns both mixtures by ``0.5 (CE + Dice)`` on their reference part plus ``0.5`` times the same on their other part, against
    the EMA teacher's arg-max, the largest component of each class. Stage `pretrain` trains the initial weights on mixtures of
    two labelled patches.

    Differs from the authors' code: any number of classes; the Dice is the squared form, summed over the rows of a direction; the
    supervised term on whole labelled patches stays in the sum (``terms.supervised.weight: 0`` gives the paper's loss); the last
    weights of the pre-training are taken, not the best by evaluation.
    """

    Options: ClassVar[type[TermOptions]] = BcpOptions
    predicts_unlabelled = False
    options: BcpOptions
    teacher: EmaTeacher
    _pasted: tuple[Unlabelled, torch.Tensor] | None = None

    def stages(self) -> list[str]:
        """Pre-training, unless it has no iterations."""
        return [] if self.options.pretrain_iterations == 0 else ["pretrain"]

    def check(self, student: nn.Module, work: Workspace) -> None:
        """The processes have to share the labelled rows of the pre-training."""
        for stage in self.stages():
            work.check_rows(f"{self.name}-{stage}", student, work.config.batch_labeled)

    def prepare(self, stage: str, work: Workspace) -> None:
        """Train a network like the student on mixtures of labelled patches."""
        name = f"{self.name}-{stage}"
        network = work.build_student(name)
        supervised = work.config.terms.get("supervised", {}) | {"weight": 1.0, "ramp": "constant"}
        terms = build_terms("supervised", {"supervised": supervised}, work.classes)
        source = CopyPaste(work.patches(name), self.options.side, work.seed(name))
        iterations = self.options.pretrain_iterations or max(round(work.config.iterations * 2000 / 15000), 1)
        work.fit(name, network, terms, source, iterations)
        if work.fabric.is_global_zero:
            file = work.folder(self.name, stage) / "model.safetensors"
            write_atomic(file, lambda path: save_model(network, str(path)))
        work.discard(name)

    def initialise(self, student: nn.Module, work: Workspace) -> None:
        """Give the student the pre-trained weights.

        Raises:
            RunError: their file is missing, damaged or of another network.
        """
        for stage in self.stages():
            file = work.folder(self.name, stage) / "model.safetensors"
            try:
                load_model(student, file)
            except (OSError, RuntimeError, SafetensorError) as error:
                raise RunError(
                    f"cannot start from the pre-trained weights {file}: {str(error).splitlines()[0]}; "
                    f"remove {file.parent} and --resume"
                ) from None

    def attach(self, student: nn.Module) -> None:
        """Make the teacher: a copy of the student."""
        self.teacher = EmaTeacher(student, self.options.decay, self.options.teacher_norm)

    def extra_inputs(
        self, labelled: Labelled, unlabelled: Unlabelled | None, generator: torch.Generator
    ) -> ImageBatch | None:
        """Mixtures, with the cuboid of the unlabelled row in the even ones and of the labelled row in the odd ones.

        Which voxels are labelled is kept until the loss of the same step.
        """
        if unlabelled is None:
            return None
        rows_l, rows_u = pairs(len(labelled.image), len(unlabelled.image))
        inside = cuboid(labelled.image.shape[2:], self.options.side, generator)
        known = torch.stack([~inside if row % 2 == 0 else inside for row in range(len(rows_l))])
        self._pasted = unlabelled, known
        return torch.where(known[:, None], labelled.image[rows_l], unlabelled.image[rows_u])

    def pseudo_labels(self, x: ImageBatch) -> LabelBatch:
        """The teacher's classes ``[B, X, Y, Z]``."""
        label = self.teacher(x).argmax(1)
        if not self.options.largest_component:
            return label
        cleaned = [largest_component(row) for row in label.byte().cpu().numpy()]
        return torch.from_numpy(np.stack(cleaned)).to(label)

    def loss(self, step: Step) -> torch.Tensor:
        """Sum over both directions, >= 0."""
        if step.unlabelled is None:
            raise ValueError(f"term {self.name!r} needs unlabelled rows in the step, got none")
        if self._pasted is None or self._pasted[0] is not step.unlabelled:
            raise ValueError(f"term {self.name!r}: extra_inputs has not been called for these rows")
        known, logits = self._pasted[1], step.extra[self.name]
        rows_l, rows_u = pairs(len(step.labelled.image), len(step.unlabelled.image))
        reference = step.labelled.label[rows_l]
        guess = self.pseudo_labels(step.unlabelled.image)[rows_u]
        loss = logits.new_zeros(())
        for rows in (slice(0, None, 2), slice(1, None, 2)):
            loss = loss + part_loss(logits[rows], reference[rows], known[rows])
            loss = loss + self.options.pseudo_weight * part_loss(logits[rows], guess[rows], ~known[rows])
        return loss

    def after_update(self, student: nn.Module, iteration: int) -> None:
        """The teacher follows."""
        self._pasted = None
        self.teacher.update(student, iteration)


class CopyPaste:
    """Batches of labelled mixtures: a cuboid of each patch replaced by that of another, labels too.

    Args:
        sampler: makes the labelled patches. With one row in a batch, two batches in turn give the two patches.
        side: of the cuboid, as a share of the patch's.
        seed: of the cuboid's place, which is the same in all processes.
    """

    def __init__(self, sampler: PatchSampler, side: float, seed: int) -> None:
        self.sampler = sampler
        self.side = side
        self.seed = seed
        self.generator = torch.Generator()

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches of the iterations ``start .. stop - 1``."""
        count = 2 if self.sampler.rows["labelled"] == 1 else 1
        source = self.sampler.batches(start * count, stop * count)
        for iteration in range(start, stop):
            yield self.mix([next(source)[0] for _ in range(count)], iteration), None

    def mix(self, batches: Sequence[Labelled], iteration: int) -> Labelled:
        """As many mixtures as the first batch has rows; the cuboid of row i comes from row i + 1."""
        image = torch.cat([batch.image for batch in batches])
        label = torch.cat([batch.label for batch in batches])
        self.generator.manual_seed(int(rng(self.seed, "stage", iteration, 0).integers(2**63 - 1)))
        inside = cuboid(image.shape[2:], self.side, self.generator)
        rows = len(batches[0].image)
        mixed = torch.where(inside, image.roll(-1, 0), image)[:rows]
        return Labelled(mixed, torch.where(inside, label.roll(-1, 0), label)[:rows], batches[0].case)


def pairs(rows_l: int, rows_u: int) -> tuple[list[int], list[int]]:
    """Which labelled and which unlabelled row each mixture is made of: all of them, in turn, and at least two mixtures."""
    count = max(rows_l, rows_u, 2)
    return [row % rows_l for row in range(count)], [row % rows_u for row in range(count)]


def cuboid(size: Sequence[int], side: float, generator: torch.Generator) -> torch.Tensor:
    """A mask ``[X, Y, Z]``, True in a cuboid of `side` times each side (rounded down), anywhere in the patch."""
    mask = torch.ones(tuple(size), dtype=torch.bool, device=generator.device)
    for axis, length in enumerate(size):
        extent = max(int(length * side), 1)
        start = int(torch.randint(length - extent + 1, (), generator=generator, device=generator.device))
        mask.narrow(axis, 0, start).fill_(False)
        mask.narrow(axis, start + extent, length - start - extent).fill_(False)
    return mask


def part_loss(logits: Logits, label: LabelBatch, part: torch.Tensor) -> torch.Tensor:
    """``0.5 (CE + Dice)`` over all classes on the voxels of `part`."""
    return segmentation_loss(logits, label.masked_fill(~part, IGNORE_LABEL), background=True)
