"""Models by name: one file a family, with the builder that turns weights into a `Promptable` or `Tunable`.

Drop a file here and its names exist. Libraries that take seconds to import are imported inside the builders.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from scarceseg.errors import ConfigError


def check_options(name: str, options: Mapping[str, Any], taker: Callable[..., Any]) -> None:
    """Refuse options that the taker does not have by name; one with ``**options`` checks them itself.

    Raises:
        ConfigError: listing the options there are.
    """
    parameters = inspect.signature(taker).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = {parameter.name for parameter in parameters if parameter.default is not parameter.empty}
    for option in options.keys() - known:
        offered = ", ".join(sorted(known - {"path", "name"})) or "none"
        raise ConfigError(f"foundation model {name!r} has no option {option!r}: its options are {offered}")
