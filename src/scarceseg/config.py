"""One typed config: command-line flags, recipe files and the copy saved in the run folder are the same object."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from scarceseg.errors import ConfigError, near_matches
from scarceseg.types import Augment

FREE = frozenset({"device", "checkpoint_every", "log_every", "validate_every", "terms.atlas.workers"})
"""Settings that do not change what is computed, only where and how often it is told; `select: best` chooses among validations."""


class Section(BaseModel):
    """A group of settings; an unknown key is an error, so that a typing slip never passes silently."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class NetworkConfig(Section):
    """Which network, and its arguments (channels and classes come from the dataset)."""

    name: str = "vnet"
    args: dict[str, Any] = Field(default_factory=dict)


class PlanConfig(Section):
    """Overrides of what the plan would choose; None leaves the choice to the fingerprint.

    `spacing_mm`: one number (isotropic) or three, millimetres. `patch`: three voxel counts.
    """

    spacing_mm: tuple[float, float, float] | None = None
    patch: tuple[int, int, int] | None = None
    normalisation: Literal["auto", "zscore", "ct", "none"] = "auto"

    @field_validator("spacing_mm", mode="before")
    @classmethod
    def _isotropic(cls, value: Any) -> Any:
        return (value, value, value) if isinstance(value, int | float) else value


class OptimConfig(Section):
    """Optimiser and learning-rate schedule (UA-MT recipe by default).

    `schedule`: "step" multiplies by `gamma` every `step` iterations (None: 2500/6000 of the run's length, as published);
    "poly" is ``lr * (1 - t/T) ** power``; "constant". `warmup`: iterations over which the learning rate rises linearly
    from zero. `clip_norm`: largest norm of the gradient over all parameters; None does not clip.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(0.01, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)
    schedule: Literal["step", "poly", "constant"] = "step"
    step: int | None = Field(None, ge=1)
    gamma: float = Field(0.1, ge=0)
    power: float = Field(0.9, ge=0)
    warmup: int = Field(0, ge=0)
    clip_norm: float | None = Field(None, gt=0)


class Config(Section):
    """A whole training run.

    Attributes:
        dataset: folder in nnU-Net raw layout.
        method: terms joined by ``+``; ``supervised`` is always in.
        terms: options by term name (weight, ramp and the term's own).
        labeled: number of labelled cases kept (first by name) or their names; None keeps all that have a label file.
        val: names of validation cases, which are neither trained on nor unlabelled.
        batch_labeled, batch_unlabeled: rows of each kind in a step.
        batch_norm: "joint" normalises the labelled and unlabelled rows of a step together, as published; "split" each kind
            by itself.
        batch_norm_statistics: what batch norm uses in prediction: "pool", the mean over random patches of all training images,
            taken after training without any label; "running", the average over the last training steps, as published;
            "auto", the first with joint batch norm and the second with split.
        iterations: T.
        augment: "deform" bends patches a little and changes their contrast (ours); "all" turns and reflections of the slice
            plane alike; "reflections" flips after every turn, as the published scripts do: the network never sees a patch the
            way the volume lies; "none". True is "deform", False "none".
        foreground: share of labelled patches centred on a labelled foreground voxel; 0 is the published uniform crop.
        select: "last" checkpoint, or "best" mean Dice on `val`.
        validate_every: iterations between validations; 0 validates at the end only.
        precision, memory_format: "auto" decides by a short timed test at the start.
    """

    dataset: str = ""
    method: str = "supervised"
    terms: dict[str, dict[str, Any]] = Field(default_factory=dict)
    labeled: int | list[str] | None = None
    val: list[str] = Field(default_factory=list)
    network: NetworkConfig = Field(default_factory=NetworkConfig)
    foundation: str | None = None
    plan: PlanConfig = Field(default_factory=PlanConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    batch_labeled: int = Field(2, ge=1)
    batch_unlabeled: int = Field(2, ge=1)
    batch_norm: Literal["joint", "split"] = "joint"
    batch_norm_statistics: Literal["auto", "pool", "running"] = "auto"
    iterations: int = Field(6000, ge=1)
    augment: Augment = "deform"
    foreground: float = Field(0.0, ge=0.0, le=1.0)
    seed: int = Field(0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    memory_format: Literal["auto", "contiguous", "channels_last_3d"] = "auto"
    select: Literal["last", "best"] = "last"
    validate_every: int = Field(0, ge=0)
    checkpoint_every: int = Field(250, ge=1)
    log_every: int = Field(10, ge=1)

    @field_validator("dataset", mode="before")
    @classmethod
    def _folder(cls, value: Any) -> Any:
        return str(value) if isinstance(value, os.PathLike) else value

    @field_validator("augment", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return {True: "deform", False: "none"}[value] if isinstance(value, bool) else value

    @property
    def takes_pool_statistics(self) -> bool:
        """Whether batch norm's statistics are taken anew after training."""
        return {"auto": self.batch_norm == "joint", "pool": True, "running": False}[self.batch_norm_statistics]

    def dump(self) -> str:
        """As YAML text, every value written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @classmethod
    def load(cls, path: Path) -> Config:
        """Read a saved config; a recipe is read by `read_recipe`.

        Raises:
            ConfigError: not YAML, or a key or value is not one of ours.
        """
        return cls.build(read_yaml(path), source=str(path))

    @classmethod
    def build(cls, values: dict[str, Any], source: str = "the call") -> Config:
        """Validate plain values; a wrong one is told in one line.

        Raises:
            ConfigError: naming the key, what was expected and what came.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(f"{source}: {one_line(error, cls)}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ConfigError: the file is missing, is not YAML or is not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the settings in {path}: {str(error).splitlines()[0]}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, got {type(values).__name__}")
    return values


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("scarceseg") / "recipes"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def read_recipe(name_or_file: str) -> dict[str, Any]:
    """Values of a recipe, by its name in the package or as a file, on top of those of the recipe it builds on.

    The key ``base`` of a recipe names another one, in the package or as a file beside it; nested settings are merged.

    Raises:
        ConfigError: neither a file nor a known name (near matches are listed), or recipes that build on each other in a
            circle.
    """
    return _with_base(name_or_file, None, ())


def _with_base(name: str, folder: Path | None, above: tuple[Path, ...]) -> dict[str, Any]:
    """Values of one recipe and its bases; `folder` is where relative files are looked for, `above` what led here."""
    path = _recipe_path(name, folder)
    here = path.resolve()
    if here in above:
        circle = " -> ".join(recipe.name for recipe in (*above[above.index(here) :], here))
        raise ConfigError(f"recipes build on each other in a circle: {circle}; remove one 'base'")
    values = read_yaml(path)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: expected the name or the file of one recipe, got {base!r}")
    return merge(_with_base(base, path.parent, (*above, here)), values)


def _recipe_path(name: str, folder: Path | None) -> Path:
    if Path(name).suffix in {".yaml", ".yml"}:
        return (folder or Path()) / name
    if name not in recipe_names():
        raise ConfigError(f"unknown recipe {name!r}: {near_matches(name, recipe_names())}")
    return Path(str(resources.files("scarceseg") / "recipes" / f"{name}.yaml"))


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` on top; nested mappings are merged, everything else is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def one_line(error: ValidationError, model: type[BaseModel]) -> str:
    """All problems of a failed validation in one line, each with its key, what was expected and what came."""
    problems = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            problems.append(
                f"unknown setting {key!r}: {near_matches(str(item['loc'][-1]), _keys(model, item['loc'][:-1]))}"
            )
        else:
            problems.append(f"{key}: {item['msg'].lower()}, got {item['input']!r}")
    return "; ".join(problems)


def _keys(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    for part in path:
        annotation = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
