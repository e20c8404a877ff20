"""What a term is, and how a sum such as ``mean-teacher+sfr`` becomes a list of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, ValidationError
from torch import nn

from scarceseg.config import Section, one_line
from scarceseg.errors import ConfigError, near_matches
from scarceseg.functional.ramps import RAMPS
from scarceseg.registry import Registry
from scarceseg.types import ImageBatch, Labelled, Step, Unlabelled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from scarceseg.engine.workspace import Workspace

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

    def idle(self) -> dict[str, str]:
        """Options that do nothing beside the others, each with the words why; those that were set are warned of."""
        return {} if self.ramp.startswith("laine") else {"ramp_epochs": f"with ramp: {self.ramp}"}


class Parts(NamedTuple):
    """The loss of a term that also trains heads or networks of its own.

    Attributes:
        ramped: raw scalar that the term's weight and ramp multiply.
        fixed: scalar that enters the sum as it is: supervision of the term's own heads, whatever the ramp.
    """

    ramped: torch.Tensor
    fixed: torch.Tensor


FieldKind = Literal["label", "probability", "weight"]


class Term(nn.Module):
    """One summand of the training loss.

    A term owns what it needs (a teacher, extra heads) as submodules and buffers, so that its state is saved and restored
    with the run; what is made offline (pseudo-labels, tuned weights) lies in the folders of its stages. It touches no
    optimiser, loader, logger or device.

    Order of calls: ``check`` before any work, ``prepare`` once for each of its stages, ``initialise`` and ``attach`` once,
    then in every step ``extra_inputs``, the one forward pass of the student, ``loss``, the update, ``after_update``. Before
    the iterations that ``rounds`` names, ``refresh`` may make the term's fields anew.

    Class attributes:
        reads: which rows of the student's output the term looks at, of {"labelled", "unlabelled"}. Unlabelled rows
            are loaded and computed only when some term reads them.
        predicts_unlabelled: False for a term that takes unlabelled images but not the student's output on them; the
            student does not see those rows unless another term of the sum wants their output.
        shares_features: ask for ``step.encoded`` and ``step.decoded``.
        foundation: the foundation model it works with when the run names none, see `usual_foundation`; None for a term that
            needs no such model.
    """

    Options: ClassVar[type[TermOptions]] = TermOptions
    reads: ClassVar[frozenset[str]] = frozenset({"labelled", "unlabelled"})
    predicts_unlabelled: ClassVar[bool] = True
    shares_features: ClassVar[bool] = False
    foundation: ClassVar[str | None] = None
    name: str = ""

    def __init__(self, options: TermOptions, classes: int) -> None:
        super().__init__()
        self.options = options
        self.classes = classes

    @classmethod
    def usual_foundation(cls, options: Mapping[str, Any], labelled: int) -> str | None:
        """The foundation model for this number of labelled volumes when none is named.

        A term for which that is not always `foundation` has the option ``foundation``, into which it is written.

        Args:
            options: of the term, as the user gave them.
            labelled: volumes.
        """
        return cls.foundation

    @property
    def field_kinds(self) -> dict[str, FieldKind]:
        """Names of the maps the term reads from ``step.unlabelled.fields``, and what they hold.

        A "label" is ``[X, Y, Z]`` uint8 with 255 = ignore, a "probability" ``[K, X, Y, Z]``, a "weight" ``[X, Y, Z]`` in
        [0, 1].
        """
        return {}

    def stages(self) -> list[str]:
        """Names of the term's offline stages, in order; each is run once and resumed by its artefact."""
        return []

    def check(self, student: nn.Module, work: Workspace) -> None:
        """Refuse what cannot be, before the stages of any term; called in the first process alone, and changes nothing.

        Args:
            student: with its first weights.
            work: the run; of a resumed one, stages may be done already and what they needed gone.

        Raises:
            ConfigError, DataError, RunError: the run folder is free again.
        """

    def prepare(self, stage: str, work: Workspace) -> None:
        """Run one offline stage and leave its artefact in ``work.folder(self.name, stage)``."""

    def initialise(self, student: nn.Module, work: Workspace) -> None:
        """Give the student other initial weights, from the artefact of a stage. Called once, before ``attach``."""

    def attach(self, student: nn.Module) -> None:
        """Build what depends on the student. Called once, before the first step; the student is on its device."""

    def fields(self, case: str, work: Workspace) -> Mapping[str, NDArray[Any]]:
        """Maps of one unlabelled case, named as in `field_kinds`, on the prepared grid; usually memory-mapped."""
        return {}

    def rounds(self, total: int) -> list[int]:
        """Iterations of T before which `refresh` is called, ascending, each in ``1 .. T - 1``."""
        return []

    def refresh(self, iteration: int, student: nn.Module, work: Workspace) -> None:
        """Start a round: make new fields with the student as it is. Called again after a resume, it reads its artefact."""

    def extra_inputs(
        self, labelled: Labelled, unlabelled: Unlabelled | None, generator: torch.Generator
    ) -> ImageBatch | None:
        """Further rows for the student's one forward pass; their output arrives as ``step.extra[name]``."""
        return None

    def loss(self, step: Step) -> torch.Tensor | Parts:
        """Raw scalar loss of the step, or its `Parts`; finite for any class count and batch split."""
        raise NotImplementedError

    def after_update(self, student: nn.Module, iteration: int) -> None:
        """Called after the optimiser's update, under no_grad."""

    def numbers(self) -> Mapping[str, float]:
        """What the log shall say of the latest step besides the loss, by name; no reference of an unlabelled case in it."""
        return {}

    def conclude(self, log: Sequence[Mapping[str, Any]]) -> str | None:
        """What the user should know of the training once it is over, told as a warning; None: nothing.

        Args:
            log: lines of the run's log of the training, in order; what `numbers` said is there as ``<name>/<term>``.
        """
        return None

    def picture(self) -> NDArray[Any] | None:
        """An RGB picture ``[rows, columns, 3]`` uint8 of the latest step, for TensorBoard and the report; None: no picture."""
        return None

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
    names: list[str] = []
    for part in (part.strip() for part in method.split("+")):
        if not part and names and f"{names[-1]}+" in METHODS.names():
            names[-1] += "+"  # a name may end with a plus sign itself: sfr+
        else:
            names.append(part)
    if not all(names):
        raise ConfigError(f"method {method!r} has an empty summand: write terms joined by '+', as in mean-teacher+sfr")
    if len(set(names)) != len(names):
        raise ConfigError(f"method {method!r} names a term twice: each term may stand once")
    for name in names:
        METHODS.get(name)
    return ["supervised", *(name for name in names if name != "supervised")]


def check_options(method: str, options: Mapping[str, Mapping[str, Any]]) -> dict[str, TermOptions]:
    """Validated options of the terms of a sum, in order; the number of classes need not be known.

    Args:
        method: such as ``"ua-mt"`` or ``"mean-teacher+sfr"``.
        options: option values by term name; what is not named keeps its default.

    Raises:
        ConfigError: unknown term or option, or options for a term that is not in the sum.
    """
    names = parse_method(method)
    for name in options:
        if name not in names:
            raise ConfigError(f"terms.{name}: {name!r} is not part of method {method!r}: {near_matches(name, names)}")
    return {name: build_options(METHODS.get(name), name, options.get(name, {})) for name in names}


def build_terms(method: str, options: Mapping[str, Mapping[str, Any]], classes: int) -> dict[str, Term]:
    """The terms of a sum with their options, in order.

    Args:
        method, options: see `check_options`.
        classes: K, background included.

    Raises:
        ConfigError: as of `check_options`.
    """
    terms = {}
    for name, values in check_options(method, options).items():
        terms[name] = METHODS.get(name)(values, classes)
        terms[name].name = name
    return terms


def build_options(kind: type[Term], name: str, values: Mapping[str, Any]) -> TermOptions:
    """Validated options of one term.

    Raises:
        ConfigError: in one line, naming the option.
    """
    try:
        return kind.Options.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"terms.{name}: {one_line(error, kind.Options)}") from None
