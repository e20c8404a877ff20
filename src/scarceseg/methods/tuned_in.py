"""Taking over the foundation model that another run has tuned, instead of tuning it again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scarceseg.config import Config
from scarceseg.engine.checkpoint import write_atomic
from scarceseg.errors import ConfigError, RunError
from scarceseg.methods.base import METHODS, build_options, parse_method
from scarceseg.methods.fine_tuning import PATCH_ITERATIONS
from scarceseg.methods.models import foundation_models

if TYPE_CHECKING:
    from scarceseg.engine.workspace import Workspace

TUNERS = ("sfr", "sfr+")
SETTINGS = ("strategy", "rank", "view", "axes", "augment", "learn_from")
"""Options the tuned weights depend on, beside those that begin with ``tune_``."""
PLAN = ("dataset", "spacing_mm", "channels", "classes", "normalisation")


def take_tuned(work: Workspace, name: str, other: Path, files: Sequence[str], whole: bool) -> None:
    """Copy the tuned weights of another run into the stage `tune` of this one.

    Args:
        work: this run.
        name: of the term.
        other: run folder whose ``sfr`` or ``sfr+`` was tuned on the same labelled volumes in the same way.
        files: names of the weights.
        whole: the model sees whole volumes, so that the size of the patches and the length of the training do not matter.

    Raises:
        ConfigError: the other run tuned on other volumes (their labels would reach this run), or otherwise.
        RunError: no such run, or it has not tuned a model.
    """
    config = Config.load(other / "config.yaml")
    term = next((term for term in (name, *TUNERS) if term in parse_method(config.method)), None)
    if term is None:
        raise RunError(f"terms.{name}.tuned_in: {other} is a run of {config.method!r}, which tunes no foundation model")
    _same("labelled volumes", name, other, _cases(other, "labelled"), sorted(case.name for case in work.labelled))
    ours, theirs = work.plan.model_dump(mode="json"), _read(other / "plan.json")
    for key in PLAN if whole else (*PLAN, "patch"):
        _same(key, name, other, theirs.get(key), ours.get(key))
    mine, other_settings = tuning_settings(work.config, name, whole), tuning_settings(config, term, whole)
    for key, value in mine.items():
        _same(key, name, other, other_settings.get(key), value)
    if mine["learn_from"] is not None:  # it has seen the guesses for these
        pool = sorted(case.name for case in work.unlabelled)
        _same("unlabelled volumes", name, other, _cases(other, "unlabelled"), pool)
    folder = work.folder(name, "tune")
    for file in files:
        source = other / "stages" / f"{term}-tune" / file
        if not source.exists():
            raise RunError(f"terms.{name}.tuned_in: {source} is missing; finish that run's tuning first")
        if work.fabric.is_global_zero and not (folder / file).exists():
            write_atomic(folder / file, partial(shutil.copyfile, source))
    work.fabric.barrier()


def tuning_settings(config: Config, name: str, whole: bool) -> dict[str, Any]:
    """What the tuned weights of a term depend on, beside the volumes and the plan; seeds are left out."""
    options = build_options(METHODS.get(name), name, config.terms.get(name, {})).model_dump(mode="json")
    found = {key: value for key, value in options.items() if key in SETTINGS or key.startswith("tune_")}
    found["foundation"] = foundation_models(config)[name]
    if not whole:
        found["augment of the patches"] = options["patch_augment"] or config.augment
        if options["tune_iterations"] is None:
            found["tune_iterations"] = min(config.iterations, PATCH_ITERATIONS)
    if (source := options["learn_from"]) is not None:
        found[f"terms.{source}"] = config.terms.get(source, {})
    return found


def _same(what: str, name: str, other: Path, theirs: object, ours: object) -> None:
    if theirs != ours:
        raise ConfigError(
            f"terms.{name}.tuned_in: the model in {other} was tuned with {what} {_short(theirs)}, this run has {_short(ours)}: "
            "take a run that agrees, or leave tuned_in out"
        )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _cases(run: Path, role: str) -> list[str]:
    names = _read(run / "split.json").get(role)
    return sorted(map(str, names)) if isinstance(names, list) else []


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        values = None
    if not isinstance(values, dict):
        raise RunError(f"terms.*.tuned_in: cannot read {path}: expected the folder of a run")
    return values
