"""Makes options.md from the options' own docstrings and defaults: ``python docs/reference/make.py``."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scarceseg.methods import METHODS
from scarceseg.methods.base import TermOptions
from scarceseg.networks import NETWORKS

PAGE = Path(__file__).with_name("options.md")
HEAD = """# Options of terms and networks

Made from the docstrings by `python docs/reference/make.py`. An option of a term is set as `--set terms.NAME.OPTION=VALUE`, or
below `terms` in a recipe; a network's as `--set network.args.OPTION=VALUE`. `null` (None) leaves the choice to the term. "(ours)"
marks what no paper has.

Every term has `weight`, `ramp` (`constant`, `laine`, `laine-down`, `semisam` or `semisam-down`) and `ramp_epochs` (the equal
parts a run is cut into for the quantised ramps of published scripts). Their defaults differ:
"""


def page() -> str:
    """The whole text."""
    terms = {name: METHODS.get(name).Options for name in METHODS.names()}
    weights = [f"| `{name}` | {_values(kind, ('weight', 'ramp', 'ramp_epochs'))} |" for name, kind in terms.items()]
    parts = [HEAD, "| term | weight | ramp | ramp_epochs |\n|---|---|---|---|\n" + "\n".join(weights)]
    for name, kind in terms.items():
        rows = _term_rows(kind)
        parts.append(f"## {name}\n\n" + (_table(rows) if rows else "Only those that every term has."))
    for name in NETWORKS.names():
        parts.append(f"## Network {name}\n\n" + _table(_network_rows(NETWORKS.get(name))))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _values(kind: type[TermOptions], names: tuple[str, ...]) -> str:
    return " | ".join(f"`{_plain(kind.model_fields[name].get_default())}`" for name in names)


def _term_rows(kind: type[TermOptions]) -> list[tuple[list[str], list[Any], str]]:
    """Names, defaults and meaning of each entry; those of `TermOptions` only where the term has more to say of them."""
    rows, told = [], set()
    for owner in (cls for cls in kind.__mro__ if cls is not TermOptions and issubclass(cls, TermOptions)):
        for names, words in entries(inspect.cleandoc(owner.__dict__.get("__doc__") or ""), "Attributes").items():
            new = [name for name in names if name not in told]
            told.update(new)
            if new:
                rows.append((new, [kind.model_fields[name].get_default() for name in new], words))
    silent = set(kind.model_fields) - told - set(TermOptions.model_fields)
    if silent:
        raise ValueError(f"{kind.__name__}: no words on {sorted(silent)}")
    return rows


def _network_rows(kind: Any) -> list[tuple[list[str], list[Any], str]]:
    defaults = {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}
    told = entries(inspect.cleandoc(kind.__doc__ or ""), "Args")
    return [
        (list(names), [defaults[name] for name in names], words)
        for names, words in told.items()
        if not {"channels", "classes"} & set(names)
    ]


def entries(doc: str, section: str) -> Mapping[tuple[str, ...], str]:
    """Entries ``name, name: words`` of a section of a docstring."""
    found = re.search(rf"^{section}:\n(.*?)(?=^\S|\Z)", doc, flags=re.MULTILINE | re.DOTALL)
    texts = re.findall(r"^    (\S.*(?:\n {5,}\S.*)*)", found.group(1), flags=re.MULTILINE) if found else []
    pairs = (" ".join(text.split()).split(": ", 1) for text in texts)
    return {tuple(names.split(", ")): words for names, words in pairs}


def _table(rows: list[tuple[list[str], list[Any], str]]) -> str:
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for names, defaults, words in rows:
        shown = ", ".join(f"`{_plain(value)}`" for value in defaults)
        meaning = words.replace("``", "`").replace("|", "\\|")
        lines.append(f"| {', '.join(f'`{name}`' for name in names)} | {shown} | {meaning} |")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    """A default as it is typed in YAML."""
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
