"""The errors a user can cause. Each message says what was expected, what came, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ScarceSegError(Exception):
    """Base of every error that is the input's or the call's fault; the command line prints it and exits with 2.

    Attributes:
        told: another process of the same run says it already.
    """

    told: bool = False


class DataError(ScarceSegError):
    """A file or a dataset is not what it should be."""


class ConfigError(ScarceSegError):
    """A setting, a name or a combination of settings is not possible."""


class RunError(ScarceSegError):
    """A run folder is missing, taken, incomplete or belongs to another configuration."""


class Interrupted(Exception):
    """The user stopped the run (Ctrl-C or SIGTERM); everything up to the last finished step is saved."""


def near_matches(name: str, known: Iterable[str]) -> str:
    """Text that lists the names closest to `name`, or all of them when none is close.

    Returns:
        A clause such as ``did you mean 'ua-mt'? Known: mean-teacher, supervised, ua-mt``.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    listing = f"known: {', '.join(names) if names else 'none'}"
    if not close:
        return listing
    return f"did you mean {' or '.join(repr(c) for c in close)}? ({listing})"
