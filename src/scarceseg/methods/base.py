"""What a term is, and how a sum such as ``mean-teacher+sfr`` becomes a list of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationError
from torch import nn

from scarceseg.config import Section, one_line
from scarceseg.errors import ConfigError, near_matches
from scarceseg.functional.ramps import RAMPS
from scarceseg.registry import Registry
from scarceseg.types import ImageBatch, Labelled, Step, Unlabelled

RampName = Literal["constant", "laine", "laine-down", "semisam", "semisam-down"]


class TermOptions(Section):
    """Options every term has.

    Attributes:
        weight: factor of the term in the sum, >= 0.
        ramp: curve of the weight over the run, see `scarceseg.functional.ramps`.
        ramp_epochs: number of equal parts the run is cut into for the quantised ramps.
    """

    weight: float = Field(1.0, ge=0)
    ramp: RampName = "constant"
    ramp_epochs: int = Field(40, ge=1)


class Term(nn.Module):
    """One summand of the training loss.

    A term owns what it needs (a teacher, extra heads, pseudo-labels) as submodules and buffers, so that its state is
    saved and restored with the run. It touches no optimiser, loader, logger or device.

    Order of calls: ``attach`` once, ``prepare`` once for each of its stages, then in every step ``extra_inputs``, the
    one forward pass of the student, ``loss``, the update, ``after_update``. Three published methods were drafted on
    these hooks before they were frozen:

    - ICT: ``extra_inputs`` gives the mixed unlabelled rows, ``loss`` compares ``step.extra`` with the teacher's mix.
    - MagicNet: ``extra_inputs`` gives the images with swapped cubes, ``loss`` puts the predictions back; its position
      head is a submodule made in ``attach`` and trained because ``trainable_parameters`` returns it.
    - BCP: ``extra_inputs`` gives both copy-paste mixtures, ``loss`` weighs reference and pseudo-label parts; its
      pre-training is a stage.

    Class attributes:
        reads: which rows of the student's output the term looks at, of {"labelled", "unlabelled"}. Unlabelled rows
            are loaded and computed only when some term reads them.
    """

    Options: ClassVar[type[TermOptions]] = TermOptions
    reads: ClassVar[frozenset[str]] = frozenset({"labelled", "unlabelled"})
    name: str = ""

    def __init__(self, options: TermOptions, classes: int) -> None:
        super().__init__()
        self.options = options
        self.classes = classes

    def attach(self, student: nn.Module) -> None:
        """Build what depends on the student. Called once, before the first step; the student is on its device."""

    def stages(self) -> list[str]:
        """Names of the term's offline stages, in order; each is run once and resumed by its artefact."""
        return []

    def prepare(self, stage: str, folder: Path) -> None:
        """Run one offline stage and leave its artefact in `folder`."""

    def extra_inputs(
        self, labelled: Labelled, unlabelled: Unlabelled | None, generator: torch.Generator
    ) -> ImageBatch | None:
        """Further rows for the student's one forward pass; their output arrives as ``step.extra[name]``."""
        return None

    def loss(self, step: Step) -> torch.Tensor:
        """Raw scalar loss of the step; finite for any class count and batch split."""
        raise NotImplementedError

    def after_update(self, student: nn.Module, iteration: int) -> None:
        """Called after the optimiser's update, under no_grad."""

    def trainable_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters of the term's own modules that the optimiser trains with the student's."""
        return (p for p in self.parameters() if p.requires_grad)

    def weight(self, iteration: int, total: int) -> float:
        """Weight of the term at iteration t of T."""
        return self.options.weight * RAMPS[self.options.ramp](iteration, total, self.options.ramp_epochs)


METHODS: Registry[type[Term]] = Registry("method", "scarceseg.methods")


def parse_method(method: str) -> list[str]:
    """Term names of a sum; ``supervised`` is always in and comes first.

    Raises:
        ConfigError: empty or repeated summand, or an unknown one (near matches are listed).
    """
    names = [part.strip() for part in method.split("+")]
    if not all(names):
        raise ConfigError(f"method {method!r} has an empty summand: write terms joined by '+', as in mean-teacher+sfr")
    if len(set(names)) != len(names):
        raise ConfigError(f"method {method!r} names a term twice: each term may stand once")
    for name in names:
        METHODS.get(name)
    return ["supervised", *(name for name in names if name != "supervised")]


def build_terms(method: str, options: dict[str, dict[str, Any]], classes: int) -> dict[str, Term]:
    """The terms of a sum with their options, in order.

    Args:
        method: such as ``"ua-mt"`` or ``"mean-teacher+sfr"``.
        options: option values by term name; what is not named keeps its default.
        classes: K, background included.

    Raises:
        ConfigError: unknown term or option, or options for a term that is not in the sum.
    """
    names = parse_method(method)
    for name in options:
        if name not in names:
            raise ConfigError(f"terms.{name}: {name!r} is not part of method {method!r}: {near_matches(name, names)}")
    terms = {}
    for name in names:
        kind = METHODS.get(name)
        term = kind(build_options(kind, name, options.get(name, {})), classes)
        term.name = name
        terms[name] = term
    return terms


def build_options(kind: type[Term], name: str, values: dict[str, Any]) -> TermOptions:
    """Validated options of one term.

    Raises:
        ConfigError: in one line, naming the option.
    """
    try:
        return kind.Options.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"terms.{name}: {one_line(error, kind.Options)}") from None
