"""Arrays kept on disk under the hash of what made them: memory-mapped, safe between processes, made again when damaged.

An entry is a ``.npy`` file and a ``.json`` file with its notes. Both are written aside and moved into place.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scarceseg.data.formats import detached
from scarceseg.errors import DataError, RunError


def cache_folder() -> Path:
    """Where prepared volumes are kept: ``$SCARCESEG_CACHE``, else the user's cache folder of the platform."""
    if chosen := os.environ.get("SCARCESEG_CACHE"):
        return Path(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", str(Path.home() / "AppData" / "Local"))) / "scarceseg" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "scarceseg"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scarceseg"


def entry_path(folder: Path, name: str, sources: Sequence[Path], how: Mapping[str, Any]) -> Path:
    """Where the array made from `sources` (known by path, size and time of change) in the way `how` is kept.

    A header whose voxels lie in files of their own (``.mhd``, ``.nhdr``) is known by these too.

    Raises:
        DataError: a source is missing.
    """
    stats = []
    for path in [one for source in sources for one in (source, *detached(source))]:
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        stats.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    made_by = json.dumps([name, stats, how], sort_keys=True)
    return folder / f"{name}-{hashlib.sha256(made_by.encode()).hexdigest()[:32]}.npy"


def load(entry: Path) -> tuple[NDArray[Any], dict[str, Any]] | None:
    """The entry, or None when it is absent, cut short or otherwise not what was written.

    Every array that is in use keeps a file open.

    Raises:
        RunError: no more files can be opened.
    """
    try:
        notes = json.loads(entry.with_suffix(".json").read_text(encoding="utf-8"))
        array = np.load(entry, mmap_mode="r", allow_pickle=False)
        whole = list(array.shape) == notes["shape"] and array.dtype.str == notes["dtype"]
        return (array, notes) if whole and entry.stat().st_size == notes["bytes"] else None
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        if isinstance(error, OSError) and error.errno in {errno.EMFILE, errno.ENFILE}:
            raise RunError(
                f"cannot open {entry}: every prepared volume in use keeps a file open, and this system allows no more; raise "
                "the limit, as in 'ulimit -n 8192', and start again"
            ) from None
        return None


def allow_many_files() -> None:
    """Ask the system for as many open files as it gives a process; what cannot be had is left as it is."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = (1 << 16) if hard == resource.RLIM_INFINITY else hard
    for wanted in (most, 10240):  # macOS has a limit of its own below the one it tells
        if soft == resource.RLIM_INFINITY or soft >= wanted:
            return
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return


def store(entry: Path, array: NDArray[Any], notes: dict[str, Any]) -> tuple[NDArray[Any], dict[str, Any]]:
    """Keep an array with its notes, and return it memory-mapped.

    Raises:
        RunError: the folder cannot be written or is full.
    """
    scratch = entry.with_suffix(f".{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as file:  # not through a map, where a full disk would be a crash
            np.save(file, np.ascontiguousarray(array), allow_pickle=False)
        notes = notes | {"shape": list(array.shape), "dtype": array.dtype.str, "bytes": scratch.stat().st_size}
        _replace(scratch, entry)
        scratch.write_text(json.dumps(notes))
        _replace(scratch, entry.with_suffix(".json"))
    except OSError as error:
        raise RunError(
            f"cannot keep prepared volumes in {entry.parent} ({error.strerror or error}); make room, or set "
            "SCARCESEG_CACHE to a folder on a larger disk"
        ) from None
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
    found = load(entry)
    if found is None:
        raise RunError(f"the prepared volume {entry} is not what was written a moment ago; check the disk")
    return found


def _replace(scratch: Path, target: Path) -> None:
    try:
        os.replace(scratch, target)
    except PermissionError:
        # Windows does not replace a file that another process has mapped; that file is the same entry.
        if not target.exists():
            raise
