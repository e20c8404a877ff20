"""Which foundation models a run works with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from scarceseg.config import Config
from scarceseg.errors import ConfigError
from scarceseg.foundation import FOUNDATIONS
from scarceseg.methods.base import METHODS, parse_method

PLACES = ("foundation", "tuned_in")
"""Options of terms that may name a file or folder."""


def foundation_models(config: Config) -> dict[str, tuple[str, ...]]:
    """Foundation models by the terms that use them: the term's own choice, else the run's, else the term's default.

    Raises:
        ConfigError: an unknown method.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name in parse_method(config.method):
        default = METHODS.get(name).foundation
        if default is not None:
            own = config.terms.get(name, {}).get("foundation")
            own = (own,) if isinstance(own, str) else own
            found[name] = tuple(own) if own else (config.foundation or default,)
    return found


def settle_foundations(config: Config, labelled: int) -> Config:
    """The config with the models written out that its terms take because none is named.

    Args:
        config: of a known method.
        labelled: number of labelled volumes, see `Term.usual_foundation`.
    """
    kinds = {name: METHODS.get(name) for name in parse_method(config.method)}
    usual = {
        name: model
        for name, kind in kinds.items()
        if (model := kind.usual_foundation(config.terms.get(name, {}), labelled)) is not None
    }
    if config.foundation is not None or not usual:
        return config
    if len(set(usual.values())) == 1:
        return config.model_copy(update={"foundation": next(iter(usual.values()))})
    terms = dict(config.terms)
    for name, model in usual.items():
        if model != kinds[name].foundation:
            terms[name] = {"foundation": model} | terms.get(name, {})
    return config.model_copy(update={"terms": terms})


def with_places(config: Config) -> Config:
    """The config with its dataset, files and folders named from the root, so that it means the same anywhere.

    Names of foundation models, and files that are not there, stay as they are.
    """

    def place(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [place(one) for one in value]
        is_path = isinstance(value, str) and value not in FOUNDATIONS.names() and Path(value).exists()
        return os.path.abspath(value) if is_path else value  # links stay: what they point at may be called otherwise

    terms = {
        name: {key: place(value) if key in PLACES else value for key, value in options.items()}
        for name, options in config.terms.items()
    }
    dataset = str(Path(config.dataset).resolve())
    return config.model_copy(update={"dataset": dataset, "foundation": place(config.foundation), "terms": terms})


def foundation_words(config: Config) -> str:
    """The same for people: ``"tiny-sam (sfr), tiny-sam3d (semisam)"``, one name where all terms share it, "" without any.

    A method this version does not know gives the model the run itself names.
    """
    try:
        models = foundation_models(config)
    except ConfigError:
        return config.foundation or ""
    if len(set(models.values())) == 1:
        return " and ".join(next(iter(models.values())))
    return ", ".join(f"{' and '.join(names)} ({term})" for term, names in models.items())
