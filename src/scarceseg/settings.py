"""What the user typed -> one `Config`: defaults, then the recipe, then flags, then ``--set``."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from scarceseg.config import Config, merge, read_recipe, read_yaml
from scarceseg.errors import ConfigError


def config_from_flags(recipe: str | None, saved: Path | None, assignments: list[str], flags: dict[str, Any]) -> Config:
    """Build the config of a command.

    Args:
        recipe: recipe name or file.
        saved: config of a run that is resumed; what is not typed keeps its value there.
        assignments: ``KEY=VALUE`` with dots in KEY and YAML in VALUE.
        flags: values of the command's flags by name; None means not typed.

    Raises:
        ConfigError: a value cannot be read, or is not possible.
    """
    values: dict[str, Any] = read_yaml(saved) if saved is not None and saved.exists() else {}
    if recipe is not None:
        values = merge(values, read_recipe(recipe))
    values = merge(values, _nested({key: value for key, value in flags.items() if value is not None}))
    values = merge(values, read_assignments(assignments))
    if not values.get("dataset"):
        raise ConfigError(
            "no dataset given: name a folder in nnU-Net raw layout, as in 'scarceseg train DATASET --out RUN'"
        )
    values["val"] = _patterns(values.get("val", []), Path(str(values["dataset"])))
    return Config.build(values, source="settings")


def read_assignments(assignments: list[str]) -> dict[str, Any]:
    """Values of ``KEY=VALUE`` texts, dots in KEY making groups and VALUE being YAML.

    Raises:
        ConfigError: a text of another form.
    """
    values: dict[str, Any] = {}
    for text in assignments:
        values = merge(values, _assignment(text))
    return values


def _nested(flags: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in flags.items():
        if key == "dataset":
            values["dataset"] = str(Path(value).resolve())
        elif key == "labeled":
            count = re.fullmatch(r"-?(0|[1-9][0-9]*)", value.strip())  # 002 is the name of a case
            values["labeled"] = int(value) if count else _names(value)
        elif key == "val":
            values["val"] = _names(value)
        elif key == "network":
            values["network"] = {"name": value}
        elif key == "spacing":
            numbers = read_numbers(value, "--spacing", float)
            values.setdefault("plan", {})["spacing_mm"] = numbers * 3 if len(numbers) == 1 else numbers
        elif key == "patch":
            values.setdefault("plan", {})["patch"] = read_numbers(value, "--patch", int)
        else:
            values[key] = value
    return values


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def read_numbers(text: str, flag: str, kind: type[int | float]) -> list[Any]:
    """``X,Y,Z`` as typed; for floats also one number.

    Raises:
        ConfigError: anything else.
    """
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in ((1, 3) if kind is float else (3,)):
        wanted = "one number or X,Y,Z in mm" if kind is float else "three whole numbers X,Y,Z"
        raise ConfigError(f"{flag}: expected {wanted}, got {text!r}")
    return numbers


def _assignment(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set: expected KEY=VALUE such as optim.lr=0.005, got {text!r}")
    try:
        nested: Any = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):  # a date that does not exist is a ValueError
        raise ConfigError(f"--set {key}: cannot read the value {value!r}") from None
    for part in reversed(key.split(".")):
        nested = {part: nested}
    assert isinstance(nested, dict)
    return nested


def _patterns(names: list[str], dataset: Path) -> list[str]:
    """Replace patterns such as ``la_07*`` by the names of the dataset's cases they match."""
    if not isinstance(names, list) or not any(c in str(name) for name in names for c in "*?["):
        return names
    from scarceseg.data.dataset import load_dataset

    cases = [case.name for case in load_dataset(dataset).cases]
    found: list[str] = []
    for name in map(str, names):
        matches = [case for case in cases if fnmatchcase(case, name)] if any(c in name for c in "*?[") else [name]
        if not matches:
            raise ConfigError(
                f"--val: no case matches {name!r}; the dataset has {len(cases)} cases, the first is {cases[0]!r}"
            )
        found += [match for match in matches if match not in found]
    return found
