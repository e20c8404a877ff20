"""Drop a file in the folder and it exists: named parts, found by importing every module of their package once."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from scarceseg.errors import ConfigError, near_matches
from scarceseg.plugins import VARIABLE, load_plugins

T = TypeVar("T")


class Registry(Generic[T]):
    """Names of one kind of part (method, network, foundation model ...).

    Every module of `package` is imported at the first look-up; a module registers what it holds with the decorator
    ``@registry.register("name")``. Packages of others join through the entry-point group of the same name as `package`, plain
    files through the environment variable of `scarceseg.plugins`.

    Args:
        kind: word for messages, such as "method".
        package: dotted name of the folder.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._parts: dict[str, T] = {}
        self._scanned = False

    def register(self, *names: str) -> Callable[[T], T]:
        """Decorator that enters a part under one or more names.

        A part of the same module and name replaces its former self, as when a cell of a notebook is run again.

        Raises:
            ConfigError: a name is taken by another part.
        """

        def enter(part: T) -> T:
            for name in names:
                if name in self._parts and not _same(self._parts[name], part):
                    raise ConfigError(f"{self.kind} {name!r} is registered twice: rename one of the two")
            self._parts |= dict.fromkeys(names, part)
            return part

        return enter

    def _scan(self) -> None:
        if not self._scanned:
            self._scanned = True
            self._import_parts()
        load_plugins()

    def _import_parts(self) -> None:
        folder = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(folder.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        for point in entry_points(group=self.package):
            point.load()

    def names(self) -> list[str]:
        """All known names, sorted."""
        self._scan()
        return sorted(self._parts)

    def get(self, name: str) -> T:
        """The part called `name`.

        Raises:
            ConfigError: unknown name; the message lists near matches.
        """
        self._scan()
        if name not in self._parts:
            raise unknown(self.kind, name, self._parts)
        return self._parts[name]


def _same(old: object, new: object) -> bool:
    """Whether two parts are one, or one and its later definition."""
    if old is new:
        return True
    was, now = ((getattr(part, "__module__", None), getattr(part, "__qualname__", None)) for part in (old, new))
    return was == now and None not in now


def unknown(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for a name that no part has: names close to it, or all of them and how a part of one's own gets known."""
    near = near_matches(name, known)
    own = "" if near.startswith("did you mean") else f"; one of your own: name its file in {VARIABLE}"
    return ConfigError(f"unknown {kind} {name!r}: {near}{own}")
