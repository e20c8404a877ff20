"""SemiSAM: a promptable model, prompted by the student, is one more opinion on the unlabelled patches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from safetensors.torch import save_file
from torch import nn

from scarceseg.errors import ConfigError
from scarceseg.files import write_atomic
from scarceseg.foundation.base import HeadTunable, Promptable, Spacing
from scarceseg.foundation.dialogue import Asking, Kind
from scarceseg.foundation.redrawing import Redrawing
from scarceseg.functional.ramps import RAMPS
from scarceseg.functional.reliability import rise
from scarceseg.methods.base import METHODS, RampName, Term, TermOptions, parse_method
from scarceseg.methods.panel import Gate, Opinion, Panel
from scarceseg.methods.proven_masks import ProvenMasks
from scarceseg.methods.pseudo_labels import PseudoLabelTerm
from scarceseg.methods.redrawing import STEPS, load_tuned, train_to_redraw
from scarceseg.types import ImageBatch, Step

if TYPE_CHECKING:
    from scarceseg.engine.workspace import Workspace


PROOF_EVERY = 10
"""Questions from one look at labelled rows to the next."""
SHUT = 0.01
"""Mean weight over all classes below which a run is told that the gate was shut."""


class SemiSamOptions(TermOptions):
    """Options of SemiSAM.

    Attributes:
        weight, ramp: the paper has 0.1 and ``semisam-down``; its script ramps by ``laine-down``. The gate leaves a part of the
            weight only, hence more here. ``auto`` is the paper's ramp for models that stay as they are, whose masks a
            better student outgrows, and ``constant`` where all are tuned.
        foundation: promptable models, one or several (SemiSAM+); none takes the run's.
        channel: of the image that the models are shown, from 0; None shows all, which not every model takes.
        view: how a 2D model sees a patch: as one ``mosaic`` of its slices, or ``slices`` one by one.
        prompts: what is asked, see `scarceseg.foundation.dialogue.Asking`; ``point`` is the paper's.
        clicks, outside, corrections, components, threshold, confident: see `Asking` there.
        gate: weigh masks and voxels by how far the model may be trusted; False is the paper's method.
        agreement: soft Dice of student and model below which a mask counts for nothing, and from which on it may count for all.
        quality: the same for the IoU the model estimates.
        proof: with several classes, the same for the soft Dice of the model's masks of a class on labelled rows, where it is
            asked too, each tenth time: masks that are too large take the place of classes that the student does not find yet.
        doubt: share of a voxel's weight that is left to voxels in which the student is unsure.
        enough: labelled volumes with which the term has its `weight`; with N of them it has that times
            ``max(0, log2(2 enough / N))``, as much again for every halving, and from twice as many on nothing is asked: the
            student then knows more than the model, which none of the other measures shows. Beside a term that labels the
            pool (sfr, atlas and the like) the factor is at most 1. None: `weight` with any number.
        every: iterations from one question to the next; between them the term is silent.
        tune_iterations: steps in which the models' heads learn on the labelled volumes to redraw spoilt references, from the
            prompts of this term (ours; a stage before the training). None is 300, or as many as the run has where these are
            fewer, of each model that can; 0 leaves the models as they are, as in the paper.
        tune_lr: of AdamW with a poly schedule in these steps.
        remember: embeddings kept for patches that come again, as they do when volumes are no larger than a patch. A run that
            was resumed has none of them and may differ from an unbroken one by rounding.
    """

    weight: float = Field(1.0, ge=0)
    ramp: RampName | Literal["auto"] = "auto"  # type: ignore[assignment]
    foundation: tuple[str, ...] = ()
    channel: int | None = Field(None, ge=0)
    view: Literal["mosaic", "slices"] = "mosaic"
    prompts: tuple[Kind, ...] = Field(("uncertainty", "mask"), min_length=1)
    clicks: int = Field(3, ge=1)
    outside: int = Field(0, ge=0)
    corrections: int = Field(0, ge=0)
    components: Literal["largest", "all"] = "largest"
    threshold: float = Field(0.5, gt=0, lt=1)
    confident: float = Field(0.9, gt=0, le=1)
    gate: bool = True
    agreement: tuple[float, float] = (0.2, 0.5)
    quality: tuple[float, float] = (0.0, 0.3)
    proof: tuple[float, float] = (0.7, 0.9)
    doubt: float = Field(0.8, ge=0, le=1)
    enough: int | None = Field(4, ge=1)
    every: int = Field(1, ge=1)
    tune_iterations: int | None = Field(None, ge=0)
    tune_lr: float = Field(2e-3, gt=0)
    remember: int = Field(0, ge=0)

    @field_validator("foundation", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def idle(self) -> dict[str, str]:
        """Those of the gate without it, those of clicks without clicks."""
        found = super().idle()
        if not self.gate:
            found |= dict.fromkeys(("agreement", "quality", "proof", "doubt", "enough"), "with gate: false")
        if not {"point", "uncertainty"} & set(self.prompts):
            found |= dict.fromkeys(("clicks", "outside"), f"with prompts: [{', '.join(self.prompts)}]")
        if self.tune_iterations == 0:
            found["tune_lr"] = "with tune_iterations: 0"
        return found


def need(labelled: int, enough: int, pool: bool = False) -> float:
    """How much a student needs the models (ours): ``max(0, log2(2 n / N))``, at most 1 if it has labels of the pool.

    Args:
        labelled: volumes, N.
        enough: n, with which a student needs them once.
        pool: whether another term labels the unlabelled volumes.

    Returns:
        3, 2, 1, 0 with 1, 2, 4, 8 labelled volumes and n = 4; in sums with a term that labels the pool 1, 1, 1, 0.
    """
    factor = max(math.log2(2 * enough / labelled), 0.0)
    return min(factor, 1.0) if pool else factor


@METHODS.register("semisam")
class SemiSam(Term):
    """``mean(w (p_u - s_u)^2)`` against the mask ``s_u`` of a model that the student prompts (Zhang et al. 2023, eq. 3).

    Each foreground class that the student finds in an unlabelled patch is asked for once, with clicks, a box and/or its
    probability map; the answers are merged into class probabilities. A class it does not find is not asked for and adds no
    loss. The model works on detached predictions: the gradient reaches the student through ``p_u`` alone.

    Differs from the paper: before the training, the head of the model learns on the labelled volumes to redraw spoilt references
    (`scarceseg.foundation.redrawing`; ``tune_iterations: 0`` leaves it frozen), after which it is frozen and asked throughout
    instead of less and less; masks and voxels are weighed by a gate (``w = 1`` without), see
    `scarceseg.functional.reliability`; the default prompt is the probability map with single clicks, whose answers
    are averaged. The mean runs over the foreground classes; with one, that is the paper's mean over both.
    """

    Options: ClassVar[type[TermOptions]] = SemiSamOptions
    options: SemiSamOptions
    reads = frozenset({"unlabelled"})
    foundation = "tiny-sam3d"

    def __init__(self, options: TermOptions, classes: int) -> None:
        super().__init__(options, classes)
        self.proven = ProvenMasks(classes - 1) if classes > 2 and self.options.gate else None

    def check(self, student: nn.Module, work: Workspace) -> None:
        """Refuse what a model would refuse at the first question, and say when none will be put."""
        if not self._need_in(work):
            work.warnings.append(
                f"with {len(work.labelled)} labelled volumes {self.name} asks nothing "
                f"(terms.{self.name}.enough: {self.options.enough}), so this run is that of the other terms: its masks help "
                "where labels are fewer; enough: null asks all the same"
            )
            return
        models = {name: self._promptable(work, name) for name in self._names(work)}
        for name, model in models.items():
            self._check(model, name, len(work.plan.channels))
            if self.options.tune_iterations and not isinstance(model, HeadTunable):
                work.warnings.append(
                    f"terms.{self.name}.tune_iterations changes nothing for {name!r}: its head cannot be tuned"
                )

    def stages(self) -> list[str]:
        """The models' heads are tuned before the training."""
        return [] if self.options.tune_iterations == 0 else ["tune"]

    def prepare(self, stage: str, work: Workspace) -> None:
        """Tune a copy of each model's head, where it can be and something will be asked."""
        for number, opened in self._opened(work).items():
            name = f"{self.name}-{stage}-{number}"
            steps = self.options.tune_iterations or min(STEPS, work.config.iterations)
            train_to_redraw(work, name, opened, steps, self.options.tune_lr)
            if work.fabric.is_global_zero:
                write_atomic(_head(work.folder(self.name, stage), number), partial(save_file, opened.tuned_state()))
            work.discard(name)

    def _opened(self, work: Workspace) -> dict[int, Redrawing]:
        """The models that are tuned, by their number; none where nothing is asked."""
        if self.options.tune_iterations == 0 or not self._need_in(work):
            return {}
        models = enumerate(self._seen(work, name) for name in self._names(work))
        asking = self._asking()
        return {
            number: Redrawing(model, asking, work.plan.spacing_mm, self.options.channel).to(work.fabric.device)
            for number, model in models
            if isinstance(model, HeadTunable)
        }

    def _names(self, work: Workspace) -> tuple[str, ...]:
        return self.options.foundation or (work.foundation_of(self),)

    def _seen(self, work: Workspace, name: str) -> Promptable:
        model = self._promptable(work, name)
        return model.seen_as(self.options.view) if self.options.view in model.views else model

    def _need_in(self, work: Workspace) -> float:
        """The factor of the loss in a run."""
        if not self.options.gate or self.options.enough is None:
            return 1.0
        pool = any(issubclass(METHODS.get(name), PseudoLabelTerm) for name in parse_method(work.config.method))
        return need(len(work.labelled), self.options.enough, pool)

    def _promptable(self, work: Workspace, name: str) -> Promptable:
        model = work.model(name)
        if not isinstance(model, Promptable):
            raise ConfigError(
                f"{self.name}: the foundation model {name!r} cannot be prompted; name one that can with --foundation or "
                f"terms.{self.name}.foundation (scarceseg foundations list)"
            )
        return model

    def initialise(self, student: nn.Module, work: Workspace) -> None:
        """Take the models, each built once a run, and the size of the voxels; no models where nothing is asked."""
        if not (factor := self._need_in(work)):
            self.consult((), work.plan.spacing_mm, factor)
            return
        models = [self._seen(work, name) for name in self._names(work)]
        if self.options.view != "mosaic" and not any(model.views for model in models):
            work.warnings.append(f"terms.{self.name}.view changes nothing: no model of slices is asked")
        heads = self._opened(work)
        for number, opened in heads.items():
            load_tuned(opened, _head(work.folder(self.name, "tune"), number))
            models[number] = opened.frozen()
        self.consult(models, work.plan.spacing_mm, factor, tuned=len(heads) == len(models))

    def _check(self, model: Promptable, name: str, channels: int) -> None:
        options, mine = self.options, f"terms.{self.name}"
        wanted = {"point" if kind == "uncertainty" else kind for kind in options.prompts}
        if options.corrections:
            wanted.add("point")
        if wanted - model.prompt_kinds:
            raise ConfigError(
                f"{mine}.prompts: {name!r} understands {', '.join(sorted(model.prompt_kinds))}, not "
                f"{', '.join(sorted(wanted - model.prompt_kinds))}: choose other prompts or another model"
            )
        if options.channel is not None and options.channel >= channels:
            raise ConfigError(f"{mine}.channel: the images have {channels} (0 first), got {options.channel}")
        if options.channel is None and model.channels and channels not in model.channels:
            takes = " or ".join(str(count) for count in sorted(model.channels))
            raise ConfigError(
                f"{mine}.channel: {name!r} takes images of {takes} channels, these have {channels}: "
                f"choose the one it is shown, 0 to {channels - 1}"
            )

    def weight(self, iteration: int, total: int) -> float:
        """Weight of the term at iteration t of T."""
        chosen = self.options.ramp
        ramp = ("constant" if self._tuned else "semisam-down") if chosen == "auto" else chosen
        return self.options.weight * RAMPS[ramp](iteration, total, self.options.ramp_epochs)

    def consult(
        self, models: Sequence[Promptable], spacing_mm: Spacing, factor: float = 1.0, tuned: bool = False
    ) -> None:
        """Say whom to ask; `initialise` does so in a run.

        Args:
            models: frozen.
            spacing_mm: of the patches' voxels.
            factor: of the loss, see `need`; with 0 nothing is asked.
            tuned: whether the heads of all of them have learnt from the labelled volumes.
        """
        self._need, self._tuned = factor, tuned
        gate = Gate(self.options.agreement, self.options.quality, self.options.doubt) if self.options.gate else None
        # A panel is no submodule: frozen weights are no part of the term's state.
        self._panel = Panel(models, self._asking(), spacing_mm, gate, self.options.channel, self.options.remember)
        self._numbers: dict[str, float] = {}
        self._shown: dict[str, Any] = {}

    def _asking(self) -> Asking:
        return Asking(
            kinds=self.options.prompts,
            clicks=self.options.clicks,
            outside=self.options.outside,
            corrections=self.options.corrections,
            threshold=self.options.threshold,
            confident=self.options.confident,
            components=self.options.components,
        )

    def loss(self, step: Step) -> torch.Tensor:
        """Scalar from 0 to `consult`'s factor; 0 with a gradient of 0 when the student finds nothing, or nothing is asked."""
        if step.unlabelled is None or step.logits_u is None:
            raise ValueError(f"term {self.name!r} needs unlabelled rows in the step, got none")
        if step.iteration % self.options.every or not self._need:
            self._numbers = {}
            return step.logits_u.sum() * 0
        foreground = step.logits_u.float().softmax(1)[:, 1:]
        if self.proven is not None and step.iteration // self.options.every % PROOF_EVERY == 0:
            found = step.logits_l.detach().float().softmax(1)[:, 1:]
            proof = self._panel.ask(step.labelled.image, found, step.generator)
            self.proven.see(proof.masks, proof.asked, step.labelled.label)
        opinion = self.opinion(step.unlabelled.image, foreground.detach(), step.generator)
        self._note(step, foreground.detach(), opinion)
        return self._need * (opinion.weight * (foreground - opinion.probability).square()).mean()

    @torch.no_grad()
    def opinion(self, image: ImageBatch, foreground: torch.Tensor, generator: torch.Generator) -> Opinion:
        """Ask all models about all foreground classes the student finds, and whose masks have proved to be of use.

        Args:
            image: unlabelled patches ``[U, C, X, Y, Z]``.
            foreground: the student's probabilities ``[U, K-1, X, Y, Z]``.
            generator: of the clicks.
        """
        if self.proven is None:
            return self._panel.ask(image, foreground, generator)
        trust = rise(self.proven.dice(), *self.options.proof)[:, None, None, None]
        opinion = self._panel.ask(image, foreground * (trust > 0), generator)  # the others would be asked for nothing
        return replace(opinion, weight=opinion.weight * trust)

    def _note(self, step: Step, foreground: torch.Tensor, opinion: Opinion) -> None:
        """Keep what the log and the pictures show of this step."""
        asked = opinion.asked
        self._numbers = {
            "asked": float(asked.float().mean()),
            "agreement": sum(opinion.agreement) / len(opinion.agreement),
            "quality": sum(opinion.quality) / len(opinion.quality),
            "gate": float(opinion.weight[asked].mean()) if bool(asked.any()) else 0.0,
        }
        if self.proven is not None:
            self._numbers |= {f"proof_{number}": value for number, value in enumerate(self.proven.dice().tolist(), 1)}
        if len(self._panel.models) > 1:
            for number, (agreement, quality) in enumerate(zip(opinion.agreement, opinion.quality, strict=True), 1):
                self._numbers |= {f"agreement_{number}": agreement, f"quality_{number}": quality}
        assert step.unlabelled is not None
        self._shown = {"image": step.unlabelled.image, "student": foreground, "opinion": opinion}

    def numbers(self) -> Mapping[str, float]:
        """Share of classes asked for, agreement with the student, the model's own quality, the mean weight; of several models the
        means, and each by its number.
        """
        return self._numbers

    def conclude(self, log: Sequence[Mapping[str, Any]]) -> str | None:
        """Whether nothing was asked, or next to nothing was left of the answers: such a run is its base method's."""
        lines = [line for line in log if f"gate/{self.name}" in line]
        if not lines or not self.options.weight:
            return None

        def mean(key: str, among: Sequence[Mapping[str, Any]]) -> float:
            return sum(line[f"{key}/{self.name}"] for line in among) / len(among)

        asked = [line for line in lines if line[f"asked/{self.name}"] > 0]
        gate = sum(line[f"gate/{self.name}"] * line[f"asked/{self.name}"] for line in lines) / len(lines)
        if gate >= SHUT or (asked and not self.options.gate):
            return None
        if self.proven is not None:
            proof = [lines[-1][f"proof_{number}/{self.name}"] for number in range(1, self.classes)]
            low = self.options.proof[0]
            if max(proof) <= low:
                found = ", ".join(f"{value:.2f}" for value in proof)
                return (
                    f"the models' masks have not proved themselves on labelled rows (Dice of each class {found}; they count from "
                    f"{low:g} on), so this run is nearly one without {self.name}: try another foundation model"
                )
        if not asked:
            return "the student found nothing in any unlabelled patch, so no model was asked: train longer, or lower threshold"
        return (
            f"the gate left the models' masks {100 * gate:.1f} % of their weight, so this run is nearly one without {self.name}. "
            f"Agreement with the student was {mean('agreement', asked):.2f} in the mean (it counts from "
            f"{self.options.agreement[0]:g} on), the models' own quality {mean('quality', asked):.2f}, and "
            f"{mean('asked', lines):.2f} of the classes were asked for: "
            f"try another foundation model, or terms.{self.name}.gate: false, the paper's method"
        )

    def picture(self) -> NDArray[Any] | None:
        """Patches with the student's mask, the clicks and the model's mask, of the latest step."""
        from scarceseg.report.patches import dialogue_picture

        if not self._shown:
            return None
        opinion: Opinion = self._shown["opinion"]
        return dialogue_picture(
            self._shown["image"], self._shown["student"], opinion.probability, opinion.weight, opinion.prompts
        )


def _head(folder: Path, number: int) -> Path:
    return folder / f"head-{number}.safetensors"
