"""Atlas: the labelled volumes registered to every unlabelled one, their masks carried along and fused."""

from __future__ import annotations

from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from scarceseg.atlas.fuse import Fusion
from scarceseg.atlas.register import Registration
from scarceseg.atlas.teacher import AtlasOptions, atlas_labels, expected_dice
from scarceseg.data.cache import cache_folder
from scarceseg.errors import Interrupted
from scarceseg.methods.base import METHODS, TermOptions
from scarceseg.methods.pseudo_labels import PseudoLabelOptions, PseudoLabels, PseudoLabelTerm

if TYPE_CHECKING:
    from scarceseg.atlas.spread import Progress
    from scarceseg.engine.workspace import Workspace


class AtlasTermOptions(PseudoLabelOptions):
    """Options of the atlas teacher.

    Attributes:
        registration: last step taken, "affine" or "deformable"; further options of it are in `scarceseg.atlas`.
        registration_mm: resolution it works at; None chooses it by the volumes.
        max_atlases: so many of the labelled volumes, the most similar ones, are registered fully to each volume and fused.
        fusion: of their masks, see `scarceseg.atlas.fuse.Fusion`.
        workers: processes; None is one for each core, shared with the other processes of the run; fewer where memory is short.
        estimate: with two labelled volumes or more (and at most ``max_atlases + 1``), label each from the others and note the
            Dice: how good the labels are, known from labelled volumes alone.
    """

    registration: Literal["affine", "deformable"] = "deformable"
    registration_mm: float | None = Field(None, gt=0)
    max_atlases: int = Field(5, ge=1)
    fusion: Literal["mean", "majority", "local", "joint"] = Fusion().kind
    workers: int | None = Field(None, ge=1)
    estimate: bool = True


@METHODS.register("atlas")
class Atlas(PseudoLabelTerm):
    """Multi-atlas segmentation as a teacher of the student (ours; classical: Iglesias & Sabuncu, MedIA 2015).

    Each labelled volume is registered to an unlabelled one (affine by mutual information, then deformable), its mask is
    warped, and the masks are fused (joint label fusion by default). How sure the fusion is there is the weight of a voxel,
    for ``trust: weight``. No network and no foundation model is needed; labels are made once and used as SFR's are.
    """

    Options: ClassVar[type[TermOptions]] = AtlasTermOptions
    options: AtlasTermOptions

    def stages(self) -> list[str]:
        """The labels."""
        return ["label"]

    def how(self) -> AtlasOptions:
        """The options in the words of `scarceseg.atlas`."""
        registration = Registration(stage=self.options.registration, spacing_mm=self.options.registration_mm)
        return AtlasOptions(
            registration=registration, fusion=Fusion(kind=self.options.fusion), max_atlases=self.options.max_atlases
        )

    def prepare(self, stage: str, work: Workspace) -> None:
        """Label the pool; alignments are kept in the cache, so that a stopped stage and other runs go on from them."""
        labels = PseudoLabels(work.folder(self.name, stage))
        folder = (work.cache or cache_folder()) / "atlas"
        if work.fabric.is_global_zero:
            labels.require_space(work.unlabelled, work.classes)
        missing = [case for case in work.mine(work.unlabelled) if not labels.has(case.name)]
        with work.display(f"{self.name}: {stage}", 1) as display:

            def tell(done: int, total: int, note: str) -> None:
                if work.stop():
                    raise Interrupted("stopped while registering atlases; --resume goes on from there")
                display.resize(done, total, note)

            for one in atlas_labels(
                missing, work.labelled, work.classes, self.how(), self.options.workers, folder, tell
            ):
                notes = {"atlases": list(one.atlases), "notes": list(one.notes)}
                self.keep(labels, one.name, one.probability, one.agreement, notes)
            work.fabric.barrier()
            names = [case.name for case in work.unlabelled]
            for name in names:  # of earlier, stopped attempts and of other processes too
                work.warnings.extend(labels.notes(name).get("notes", ()))
            if work.fabric.is_global_zero:
                labels.finish(names, **self.about(work, folder, tell))

    def about(self, work: Workspace, folder: Path, tell: Progress | None = None) -> dict[str, Any]:
        """What the table of confidences says of the atlases."""
        known: dict[str, Any] = {"atlases": [case.name for case in work.labelled], **self.how().model_dump(mode="json")}
        if self.options.estimate and 2 <= len(work.labelled) <= self.options.max_atlases + 1:
            found = expected_dice(work.labelled, work.classes, self.how(), self.options.workers, folder, tell)
            cases = {name: [None if isnan(v) else v for v in values] for name, values in found.cases.items()}
            known["expected_dice"] = {"mean": None if isnan(found.mean) else found.mean, "cases": cases}
        return known
