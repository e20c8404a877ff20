"""Taking over the foundation model that another run has tuned, instead of tuning it again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scarceseg.config import FREE, Config
from scarceseg.errors import ConfigError, RunError
from scarceseg.files import write_atomic
from scarceseg.methods.base import METHODS, build_options, parse_method
from scarceseg.methods.fine_tuning import PATCH_ITERATIONS, WHOLE_ITERATIONS
from scarceseg.methods.models import foundation_models, with_places

if TYPE_CHECKING:
    from scarceseg.engine.workspace import Workspace
    from scarceseg.foundation.base import Tunable

TUNERS = ("sfr", "sfr+")
SETTINGS = ("strategy", "rank", "view", "axes", "augment", "learn_from")
"""Options the tuned weights depend on, beside those that begin with ``tune_``."""
PLAN = ("dataset", "spacing_mm", "channels", "classes", "normalisation")


def take_tuned(work: Workspace, name: str, other: Path, files: Sequence[str], model: Tunable) -> None:
    """Copy the tuned weights of another run into the stage `tune` of this one.

    Args:
        work: this run.
        name: of the term.
        other: run folder whose ``sfr`` or ``sfr+`` was tuned on the same labelled volumes in the same way.
        files: names of the weights.
        model: that is tuned, as it is by itself.

    Raises:
        ConfigError, RunError: as `check_tuned`, and where a file is missing.
    """
    folder, source = work.folder(name, "tune"), check_tuned(work, name, other, model)
    for file in files:
        if not (source / file).exists():
            raise RunError(f"terms.{name}.tuned_in: {source / file} is missing; finish that run's tuning first")
        if work.fabric.is_global_zero and not (folder / file).exists():
            write_atomic(folder / file, partial(shutil.copyfile, source / file))
    work.fabric.barrier()


def check_tuned(work: Workspace, name: str, other: Path, model: Tunable) -> Path:
    """Where the weights of another run lie, if they may be taken; arguments as of `take_tuned`.

    Raises:
        ConfigError: the other run tuned on other volumes (their labels would reach this run), or otherwise.
        RunError: no such run, or it has not tuned a model.
    """
    config = with_places(Config.load(other / "config.yaml"))
    term = next((term for term in (name, *TUNERS) if term in parse_method(config.method)), None)
    if term is None:
        raise RunError(f"terms.{name}.tuned_in: {other} is a run of {config.method!r}, which tunes no foundation model")
    _same("labelled volumes", name, other, _cases(other, "labelled"), sorted(case.name for case in work.labelled))
    mine, theirs = tuning_settings(work.config, name, model), tuning_settings(config, term, model)
    # The size of patches does not matter to a model that sees whole volumes.
    keys = PLAN if mine["view"] == "volume" else (*PLAN, "patch")
    planned, their_plan = work.plan.model_dump(mode="json"), _read(other / "plan.json")
    for key in keys:
        _same(key, name, other, their_plan.get(key), planned.get(key))
    for key in dict.fromkeys([*mine, *theirs]):
        _same(key, name, other, theirs.get(key), mine.get(key))
    if mine["learn_from"] is not None:  # it has seen the guesses for these
        pool = sorted(case.name for case in work.unlabelled)
        _same("unlabelled volumes", name, other, _cases(other, "unlabelled"), pool)
    return other / "stages" / f"{term}-tune"


def tuning_settings(config: Config, name: str, model: Tunable) -> dict[str, Any]:
    """What the tuned weights of a term depend on, beside the volumes and the plan; seeds are left out.

    Options that are left open have the value that is then taken.
    """
    options = _options(config, name)
    view = model.sees if options["view"] == "auto" else options["view"]
    usual = WHOLE_ITERATIONS if view == "volume" else min(config.iterations, PATCH_ITERATIONS)
    found: dict[str, Any] = {"foundation": list(foundation_models(config)[name])}
    found |= {key: value for key, value in options.items() if key in SETTINGS or key.startswith("tune_")}
    found |= {
        "view": view,
        "rank": options["rank"] or model.usual_rank,
        "tune_lr": options["tune_lr"] or model.usual_lr,
        "tune_iterations": options["tune_iterations"] or usual,
    }
    if view == "patch":
        found["augment of the patches"] = options["patch_augment"] or config.augment
    if (source := options["learn_from"]) is not None:
        guessed = _options(config, source).items()
        found[f"terms.{source}"] = {key: value for key, value in guessed if f"terms.{source}.{key}" not in FREE}
    return found


def _options(config: Config, name: str) -> dict[str, Any]:
    return build_options(METHODS.get(name), name, config.terms.get(name, {})).model_dump(mode="json")


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
