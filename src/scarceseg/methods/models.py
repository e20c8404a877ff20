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
