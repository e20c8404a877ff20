"""Which foundation models a run works with."""

from __future__ import annotations

from scarceseg.config import Config
from scarceseg.errors import ConfigError
from scarceseg.methods.base import METHODS, parse_method


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
            found[name] = tuple(own) if own else (config.foundation or default,)
    return found


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
