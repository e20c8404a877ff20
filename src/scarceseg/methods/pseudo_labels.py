"""Terms that learn from guessed labels of whole volumes, and the folder such labels are kept in.

A guess is made once for a volume, offline, and cropped and turned with the image from then on.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from scarceseg.data.cache import load, store
from scarceseg.errors import Interrupted, RunError
from scarceseg.files import write_text
from scarceseg.functional.components import largest_component as keep_largest
from scarceseg.functional.pseudo import confidence, pseudo_label_loss, soft_label_loss
from scarceseg.methods.base import FieldKind, Term, TermOptions
from scarceseg.types import IGNORE_LABEL, LabelMap, Logits, Step, Unlabelled

if TYPE_CHECKING:
    from scarceseg.data.prepare import PreparedCase
    from scarceseg.engine.workspace import Workspace


class PseudoLabels:
    """Guessed labels of a pool of volumes, each an entry of the cache's format: arrays that are memory-mapped.

    ``<case>-probability.npy`` is ``[K, X, Y, Z]`` float16, ``<case>-label.npy`` ``[X, Y, Z]`` uint8 and ``<case>-weight.npy``
    ``[X, Y, Z]`` float16, all on the prepared grid; ``confidence.json`` is the table of how sure they are.

    Args:
        folder: of a stage.
    """

    TABLE = "confidence.json"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, case: str) -> bool:
        """Whether a case's guess is there, whole."""
        return load(self._entry(case, "label")) is not None and load(self._entry(case, "probability")) is not None

    def write(
        self,
        case: str,
        probability: NDArray[np.float32],
        *,
        weight: NDArray[np.floating[Any]] | None = None,
        largest_component: bool = False,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep one guess.

        Args:
            case: name.
            probability: ``[K, X, Y, Z]``.
            weight: ``[X, Y, Z]`` in [0, 1], how far each voxel can be trusted.
            largest_component: the label keeps the largest component of each class only.
            notes: anything worth a place in the table.
        """
        label = probability.argmax(0).astype(np.uint8)
        if largest_component:
            label = keep_largest(label)
        sure, inside = confidence(probability)
        about = {"confidence": sure, "foreground_confidence": inside, **(notes or {})}
        if weight is not None:
            store(self._entry(case, "weight"), weight.astype(np.float16), {})
        store(self._entry(case, "probability"), probability.astype(np.float16), {})
        store(self._entry(case, "label"), label, about)

    def write_nothing(
        self, case: str, probability: NDArray[np.floating[Any]], notes: Mapping[str, Any] | None = None
    ) -> None:
        """Keep a case without a label: every voxel is ignored (255), has weight 0 and no class, in every form a loss may read.

        Args:
            case: name.
            probability: ``[K, X, Y, Z]``, for the table of confidences.
            notes: see `write`.
        """
        size = probability.shape[1:]
        sure, inside = confidence(probability)
        store(self._entry(case, "weight"), np.zeros(size, dtype=np.float16), {})
        store(self._entry(case, "probability"), np.zeros(probability.shape, dtype=np.float16), {})
        about = {"confidence": sure, "foreground_confidence": inside, "left_out": True, **(notes or {})}
        store(self._entry(case, "label"), np.full(size, IGNORE_LABEL, dtype=np.uint8), about)

    def label(self, case: str) -> LabelMap:
        """Guessed classes ``[X, Y, Z]``."""
        return self._read(case, "label")[0]

    def probability(self, case: str) -> NDArray[np.float16]:
        """Class probabilities ``[K, X, Y, Z]``."""
        return self._read(case, "probability")[0]

    def weight(self, case: str) -> NDArray[np.float16]:
        """Trust in each voxel ``[X, Y, Z]``."""
        return self._read(case, "weight")[0]

    def notes(self, case: str) -> dict[str, Any]:
        """Confidence and what else was noted."""
        kept = self._read(case, "label")[1]
        return {key: value for key, value in kept.items() if key not in {"shape", "dtype", "bytes"}}

    def require_space(self, cases: Iterable[PreparedCase], classes: int) -> None:
        """Refuse to begin where the guesses of `cases` that are missing do not fit on the disk.

        Args:
            cases: of the pool.
            classes: K.

        Raises:
            RunError: there is less space than they take.
        """
        voxels = sum(math.prod(case.geometry.size) for case in cases if not self.has(case.name))
        needed = voxels * (2 * classes + 3)  # probabilities, weight, label
        place = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
        free = shutil.disk_usage(place).free
        if needed > free:
            raise RunError(
                f"the guesses for the unlabelled volumes take {needed / 1e9:.1f} GB in {self.folder}, {free / 1e9:.1f} GB are "
                "free: make room and --resume, or start a run elsewhere or with a coarser --spacing"
            )

    def drop_probabilities(self, cases: Iterable[str]) -> None:
        """Remove the probabilities, the largest part, of guesses that nothing reads any more."""
        for case in cases:
            self._entry(case, "probability").unlink(missing_ok=True)

    def finish(self, cases: Iterable[str], **about: Any) -> dict[str, dict[str, Any]]:
        """Write the table of all cases, with the settings in `about`; returns the rows."""
        rows = {case: self.notes(case) for case in cases}
        write_text(self.folder / self.TABLE, json.dumps({**about, "cases": rows}, indent=1) + "\n")
        return rows

    def surest(self, share: float) -> set[str]:
        """The cases of the table with the highest confidence over the foreground, one at least, none without any foreground.

        Args:
            share: of the table's cases that have a label, in (0, 1]; rounded down.
        """
        rows = json.loads((self.folder / self.TABLE).read_text(encoding="utf-8"))["cases"]
        guessed = {name: row for name, row in rows.items() if not row.get("left_out")}
        return surest_of(guessed, "foreground_confidence", share)

    def _entry(self, case: str, kind: str) -> Path:
        return self.folder / f"{case}-{kind}.npy"

    def _read(self, case: str, kind: str) -> tuple[NDArray[Any], dict[str, Any]]:
        found = load(self._entry(case, kind))
        if found is None:
            raise RunError(
                f"the {kind} guessed for {case} is missing in {self.folder} or damaged: remove that folder and --resume"
            )
        return found


def surest_of(rows: Mapping[str, Mapping[str, Any]], measure: str, share: float) -> set[str]:
    """Names of the rows that rank highest, of those in which something was found.

    Args:
        rows: of a table of confidences, by case.
        measure: "confidence" or "foreground_confidence".
        share: of all rows, in (0, 1]; rounded down, one at least.
    """
    able = [name for name, row in rows.items() if row["foreground_confidence"] > 0]
    surest = sorted(able, key=lambda name: (-rows[name][measure], name))
    return set(surest[: max(int(share * len(rows)), 1)])


class PseudoLabelOptions(TermOptions):
    """Options of every term that learns from guessed labels.

    Attributes:
        targets: "hard" classes, as SFR has it, or "soft" probabilities. (ours)
        trust: "all" voxels alike, or each by its "weight": the agreement of atlases, or the largest probability. (ours)
        largest_component: hard guesses keep the largest component of each class only.
        surest: share of the unlabelled volumes whose guesses are learnt, those with the highest confidence over the foreground
            first; on the others the term is silent. None takes all, also those in which nothing was found, as published. "auto"
            is 0.5 for `sfr` and `sfr+` with a single labelled volume, and None otherwise. (ours)
    """

    weight: float = Field(1.0, ge=0)
    targets: Literal["hard", "soft"] = "hard"
    trust: Literal["all", "weight"] = "all"
    largest_component: bool = False
    surest: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] | None = "auto"

    def idle(self) -> dict[str, str]:
        """The cleaning of hard labels, where soft ones are learnt."""
        return super().idle() | ({"largest_component": "with targets: soft"} if self.targets == "soft" else {})


class PseudoLabelTerm(Term):
    """``0.5 (CE + Dice)`` of the student on unlabelled rows against labels guessed offline, weight 1 (SFR's re-training loss)."""

    Options: ClassVar[type[TermOptions]] = PseudoLabelOptions
    reads = frozenset({"unlabelled"})
    surest_of_one: ClassVar[float | None] = None
    """What the option `surest` is by itself with a single labelled volume."""
    options: PseudoLabelOptions

    @property
    def soft(self) -> bool:
        """Whether the loss takes probabilities."""
        return self.options.targets == "soft" or self.options.trust == "weight"

    @property
    def field_kinds(self) -> dict[str, FieldKind]:
        """The guessed label, or its probability and, where voxels are trusted differently, their weight."""
        kinds: dict[str, FieldKind] = {}
        kinds[f"{self.name}/{'probability' if self.options.targets == 'soft' else 'label'}"] = (
            "probability" if self.options.targets == "soft" else "label"
        )
        if self.options.trust == "weight":
            kinds[f"{self.name}/weight"] = "weight"
        return kinds

    def labels(self, work: Workspace) -> PseudoLabels:
        """Where the guesses of the last stage lie."""
        return PseudoLabels(work.folder(self.name, self.stages()[-1]))

    def fields(self, case: str, work: Workspace) -> Mapping[str, NDArray[Any]]:
        """The maps of one case."""
        return self.maps(self.labels(work), case, work)

    def learnt(self, work: Workspace) -> float | None:
        """The share of the guesses that is learnt; None: all."""
        if self.options.surest != "auto":
            return self.options.surest
        return self.surest_of_one if len(work.labelled) == 1 else None

    def maps(self, labels: PseudoLabels, case: str, work: Workspace) -> dict[str, NDArray[Any]]:
        """The maps of one case that are learnt from these guesses: nothing on a volume that is not among the surest."""
        found, share = read_fields(self.field_kinds, labels, case), self.learnt(work)
        if share is None or case in labels.surest(share):
            return found
        nothing = {"label": IGNORE_LABEL, "probability": 0, "weight": 0}
        return {
            key: np.broadcast_to(values.dtype.type(nothing[self.field_kinds[key]]), values.shape)  # takes no memory
            for key, values in found.items()
        }

    def loss(self, step: Step) -> torch.Tensor:
        """Scalar >= 0."""
        if step.unlabelled is None or step.logits_u is None:
            raise ValueError(f"term {self.name!r} needs unlabelled rows in the step, got none")
        return self.against(step.logits_u, self.guessed(step.unlabelled))

    def guessed(self, unlabelled: Unlabelled) -> Mapping[str, torch.Tensor]:
        """The maps that `field_kinds` names, of unlabelled rows."""
        return unlabelled.fields

    def against(self, logits: Logits, fields: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The loss against guesses in the form the options ask for.

        Args:
            logits: of the student, ``[U, K, X, Y, Z]``.
            fields: by name, ``<term>/label`` and ``<term>/weight`` ``[U, X, Y, Z]``, ``<term>/probability`` ``[U, K, X, Y, Z]``.
        """
        if not self.soft:
            return pseudo_label_loss(logits, fields[f"{self.name}/label"])
        weight = fields.get(f"{self.name}/weight") if self.options.trust == "weight" else None
        if self.options.targets == "soft":
            target = fields[f"{self.name}/probability"].float()
        else:
            label = fields[f"{self.name}/label"].long()
            known = label != IGNORE_LABEL
            target = torch.nn.functional.one_hot(label * known, self.classes).movedim(-1, 1).float()
            weight = known.float() if weight is None else weight * known
        return soft_label_loss(logits, target, weight)

    def guess(self, work: Workspace, stage: str, cases: list[PreparedCase], **about: Any) -> PseudoLabels:
        """Label `cases` with `probability_of`, one after the other, and keep what is done; returns the folder."""
        labels = PseudoLabels(work.folder(self.name, stage))

        def one(case: PreparedCase) -> None:
            probability = self.probability_of(work, case)
            self.keep(labels, case.name, probability, probability.max(0))

        self.each(work, stage, cases, labels, one)
        if work.fabric.is_global_zero:
            labels.finish([case.name for case in cases], **about)
        return labels

    def each(
        self,
        work: Workspace,
        what: str,
        cases: Sequence[PreparedCase],
        labels: PseudoLabels,
        make: Callable[[PreparedCase], None],
    ) -> None:
        """Make the guesses that are missing, each process its share, with a progress display and a way to stop in between.

        Args:
            what: is being done.
            labels: where they lie.
            make: makes and keeps the guess of one case.

        Raises:
            Interrupted: stopped by Ctrl-C or SIGTERM; what is done is kept.
            RunError: they do not fit on the disk.
        """
        mine = work.mine(cases)
        if work.fabric.is_global_zero:
            labels.require_space(cases, work.classes)
        with work.display(f"{self.name}: {what}", len(mine)) as display:
            for number, case in enumerate(mine, 1):
                if work.stop():
                    raise Interrupted(f"stopped while {self.name} was labelling; --resume goes on from there")
                if not labels.has(case.name):
                    make(case)
                display.update(number, note=case.name)
        work.fabric.barrier()

    def keep(
        self,
        labels: PseudoLabels,
        case: str,
        probability: NDArray[np.float32],
        weight: NDArray[np.floating[Any]],
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Write one guess in the way the options ask for."""
        labels.write(case, probability, weight=weight, largest_component=self.options.largest_component, notes=notes)

    def probability_of(self, work: Workspace, case: PreparedCase) -> NDArray[np.float32]:
        """The guess for one volume ``[K, X, Y, Z]``."""
        raise NotImplementedError


def read_fields(kinds: Mapping[str, FieldKind], labels: PseudoLabels, case: str) -> dict[str, NDArray[Any]]:
    """The maps of one case that `kinds` names, memory-mapped."""
    readers: dict[FieldKind, Callable[[str], NDArray[Any]]] = {
        "label": labels.label,
        "probability": labels.probability,
        "weight": labels.weight,
    }
    return {key: readers[kind](case) for key, kind in kinds.items()}
