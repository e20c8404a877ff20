"""Parts of one's own in a plain file: `VARIABLE` names Python files or modules, which are imported beside the package's parts."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path

from scarceseg.errors import ConfigError

VARIABLE = "SCARCESEG_PLUGINS"
"""Environment variable: paths of Python files or names of modules, with `os.pathsep` between them."""

_loaded: set[str] = set()


def load_plugins() -> None:
    """Import what the variable names, each once in a process.

    Raises:
        ConfigError: one of them cannot be imported; it is tried again at the next call.
    """
    for entry in map(str.strip, os.environ.get(VARIABLE, "").split(os.pathsep)):
        if not entry or entry in _loaded:
            continue
        _loaded.add(entry)  # before the import, which may look for parts itself
        try:
            _load(entry)
        except BaseException:
            _loaded.discard(entry)
            raise


def _load(entry: str) -> None:
    is_file = entry.endswith(".py") or Path(entry).name != entry
    if is_file and not Path(entry).is_file():
        raise ConfigError(
            f"{VARIABLE}: there is no Python file {entry}: correct the path, or remove it from the variable"
        )
    try:
        if is_file:
            _load_file(Path(entry).resolve())
        else:
            importlib.import_module(entry)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{VARIABLE}: cannot import {entry} ({_reason(error)}): correct it, or remove it from the variable"
        ) from None


def _load_file(path: Path) -> None:
    # In the modules' own dictionaries, as asking a lazy module for an attribute may import it.
    files = [getattr(module, "__dict__", {}).get("__file__") for module in list(sys.modules.values())]
    if any(isinstance(file, str) and Path(file).name == path.name and Path(file).resolve() == path for file in files):
        return  # the script that runs, or imported by it
    name = f"scarceseg_plugin_{len(_loaded)}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("expected a file that ends in .py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _reason(error: BaseException) -> str:
    """Kind of an error, its message, and the line of the plugin it comes from."""
    passed = {__file__, importlib.__file__}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename not in passed]
    lines = [f"{Path(frame.filename).name}, line {frame.lineno}" for frame in frames if frame.filename[0] != "<"]
    words = [type(error).__name__, *str(error).strip().splitlines()[:1], *lines[:1]]
    return ": ".join(words[:2]) + (f" ({words[2]})" if len(words) > 2 else "")
