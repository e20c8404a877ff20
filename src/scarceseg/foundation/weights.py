"""Weights on disk: found in the package or the cache, fetched when the user asks for it, read without running anything.

In: a name of the catalogue, or a file. Out: a path, or tensors. Nothing here downloads on its own: a run that lacks its
weights says which command gets them.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from safetensors import SafetensorError, safe_open

from scarceseg.data.cache import cache_folder
from scarceseg.data.download import Progress, download
from scarceseg.errors import DataError, RunError
from scarceseg.foundation.catalogue import CATALOGUE, HubFiles, Weights, weights_called

__all__ = ["Tensors", "cache_folder", "find", "get", "list_weights", "print_weights", "read_tensors", "weights_folder"]

PACKAGED = Path(__file__).parent / "weights_data"
"""Folder of the weights that come with the package."""

_WRAPPERS = ("model_state_dict", "state_dict", "model")
"""Keys under which training scripts put the weights beside their optimiser and counters."""


class Tensors(NamedTuple):
    """What a file of weights holds: tensors by name, and the text a safetensors file carries about itself."""

    state: dict[str, torch.Tensor]
    metadata: dict[str, str]


def weights_folder() -> Path:
    """Where fetched weights are kept: ``weights`` in the cache folder (``$SCARCESEG_CACHE``, or the platform's)."""
    return cache_folder() / "weights"


def find(name: str) -> Path:
    """The file or folder of known weights, without any download.

    Args:
        name: of the catalogue.

    Returns:
        The packaged file, else what lies in `weights_folder`.

    Raises:
        ConfigError: unknown name; near matches are listed.
        DataError: the weights are not on this machine, or the file was cut short.
    """
    entry = weights_called(name)
    path = _place(entry)
    if not _is_whole(entry, path):
        raise DataError(f"the weights of {name!r} are not on this machine: {_advice(entry, path)}")
    if entry.exact and path.is_file() and path.stat().st_size != entry.size_bytes:
        raise DataError(
            f"{path}: expected {entry.size_bytes} bytes, got {path.stat().st_size}; remove it and run "
            f"'scarceseg foundations get {name}'"
        )
    return path


def get(name: str, folder: Path | None = None, progress: Progress | None = None) -> Path:
    """Fetch known weights; what is there already and has the right hash is not fetched again.

    An interrupted download is kept as ``FILE.part`` and gone on with by the next call. A file from the Hub is checked
    against the catalogue's hash, or the one the Hub states for it.

    Args:
        name: of the catalogue.
        folder: where the file (or the folder, for weights of several files) goes; None is `weights_folder`.
        progress: called with the bytes that are there and that there will be; None shows a bar in a terminal.

    Returns:
        The file, or the folder.

    Raises:
        ConfigError: unknown name.
        DataError: it cannot be had by a program, cannot be reached, or is another file than expected.
        RunError: the folder cannot be written.
    """
    entry = weights_called(name)
    if entry.packaged:
        return _copy_packaged(find(name), folder)
    target = (folder or weights_folder()) / entry.filename
    if entry.origin == "by hand":
        if folder is None and target.exists():
            return target
        raise DataError(f"{name} cannot be fetched by a program: {_advice(entry, _place(entry))}")
    if progress is not None:
        return _fetch(entry, target, progress)
    with Bar(
        *Bar.get_default_columns()[:2],
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task(name, total=None)
        return _fetch(entry, target, lambda done, total: bar.update(task, completed=done, total=total))


def _fetch(entry: Weights, target: Path, progress: Progress) -> Path:
    size = entry.size_bytes if entry.exact else None
    if entry.hub is None:
        return download(entry.urls, target, sha256=entry.sha256, md5=entry.md5, size=size, on_progress=progress)
    for name in entry.hub.files:
        path = target / name if entry.is_folder else target
        if path.exists() and (entry.is_folder or entry.sha256 is None):
            continue  # files appear under their name only when they are whole and checked
        if path.exists():
            download((), path, sha256=entry.sha256)
            continue
        url, sha256, length = _hub_facts(entry.hub, name)
        wanted = sha256 if entry.is_folder else entry.sha256 or sha256
        download([url], path, sha256=wanted, size=length, on_progress=progress)
    return target


def _hub_facts(hub: HubFiles, name: str) -> tuple[str, str | None, int | None]:
    """Address, SHA-256 and length of a file as the Hub states them; ``HF_ENDPOINT`` names a mirror.

    The library's own download starts over after an interruption, so only its knowledge of the Hub is used.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    endpoint = os.environ.get("HF_ENDPOINT")
    url = hf_hub_url(hub.repo, name, revision=hub.revision, endpoint=endpoint)
    try:
        facts = get_hf_file_metadata(url, token=False)  # everything in the catalogue is public
    except Exception as error:  # its HTTP library, and so its errors, differ between versions
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(
            f"cannot ask the Hugging Face Hub for {url}: {line}; check the connection, set HF_ENDPOINT to a mirror, "
            f"or get the file by hand from https://huggingface.co/{hub.repo}"
        ) from None
    sha256 = facts.etag if facts.etag and re.fullmatch(r"[0-9a-f]{64}", facts.etag) else None
    return url, sha256, facts.size


def _place(entry: Weights) -> Path:
    return (PACKAGED if entry.packaged else weights_folder()) / entry.filename


def _is_whole(entry: Weights, path: Path) -> bool:
    if entry.hub is not None and entry.is_folder:
        return all((path / name).is_file() for name in entry.hub.files)
    return path.is_file()


def _advice(entry: Weights, path: Path) -> str:
    if entry.packaged:
        return f"{path} belongs to the package and is missing; install scarceseg again"
    if entry.origin == "by hand":
        return f"get {entry.filename} by hand from {entry.source} and put it at {path}, or give the file instead of the name"
    return f"run 'scarceseg foundations get {entry.name}', or give a file of your own instead of the name"


def _copy_packaged(path: Path, folder: Path | None) -> Path:
    if folder is None:
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copyfile(path, folder / path.name))
    except OSError as error:
        raise RunError(f"cannot write into {folder} ({error.strerror or error}): choose another folder") from None


def list_weights() -> list[dict[str, Any]]:
    """One row a set of weights: name, description, kind, licence, size, source, how it is had, and where it lies."""
    rows = []
    for entry in CATALOGUE.values():
        path = _place(entry)
        present = _is_whole(entry, path)
        size = path.stat().st_size if present and path.is_file() else entry.size_bytes
        rows.append(
            {
                "name": entry.name,
                "description": entry.description,
                "kind": entry.kind,
                "licence": entry.licence,
                "size_bytes": size,
                "size_exact": entry.exact or (present and path.is_file()),
                "source": entry.source,
                "origin": entry.origin,
                "citation": entry.citation,
                "sha256": entry.sha256,
                "present": present,
                "path": str(path) if present else None,
            }
        )
    return rows


def print_weights(as_json: bool = False, console: Console | None = None) -> None:
    """Show the known weights, as a table or as JSON."""
    console = console or Console()
    if as_json:
        console.print(json.dumps(list_weights(), indent=1), soft_wrap=True, highlight=False, markup=False)
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("name", "here", "licence", "size", "source"):
        table.add_column(heading, overflow="fold", no_wrap=heading != "source")
    for row in list_weights():
        ways = {"package": "no", "by hand": "by hand"}
        here = "yes" if row["present"] else ways.get(row["origin"], "get")
        source = row["source"].removeprefix("https://")
        table.add_row(row["name"], here, row["licence"], _size_text(row), source)
    console.print(table)


def _size_text(row: Mapping[str, Any]) -> str:
    if row["size_bytes"] is None:
        return "unknown"
    return f"{'' if row['size_exact'] else 'about '}{row['size_bytes'] / 1e6:,.0f} MB"


def read_tensors(path: Path, device: str = "cpu") -> Tensors:
    """Read a file of weights; no code in it is ever run.

    Safetensors hold no code. Pickled files (``.pth``, ``.pt``, ``.bin``) are read by PyTorch's restricted reader, which
    builds tensors, numbers, text and containers and refuses everything else. A state dict that a training script put
    under ``model_state_dict`` (SAM-Med3D), ``state_dict`` or ``model`` is taken out; entries that are no tensors are left.

    Args:
        path: the file.
        device: ``meta`` reads names and shapes alone, which is fast for files of any size.

    Returns:
        Tensors by name, and the metadata of a safetensors file (empty otherwise).

    Raises:
        DataError: no such file, damaged, code in it, or no tensors.
    """
    if not path.is_file():
        raise DataError(f"there is no file of weights {path}: check the path")
    tensors = _read_safetensors(path, device) if path.suffix == ".safetensors" else _read_pickled(path, device)
    if not tensors.state:
        raise DataError(f"{path}: expected tensors by name, found none; give a file of weights")
    return tensors


def _read_safetensors(path: Path, device: str) -> Tensors:
    try:
        with safe_open(path, "pt", device="cpu" if device == "meta" else device) as file:
            metadata = dict(file.metadata() or {})
            if device == "meta":
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
                return Tensors({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, metadata)
            return Tensors({name: file.get_tensor(name) for name in file.keys()}, metadata)  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(f"cannot read {path}: it is damaged or no safetensors file ({error}); get it again") from None


def _read_pickled(path: Path, device: str) -> Tensors:
    try:
        # A namespace is the options record some training scripts save beside the weights; it holds data and runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # doubts about the pickle protocol of a file that is refused anyway
            content = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        what = re.search(r"GLOBAL\s+([\w.]+)", str(error))
        named = f" ({what[1]})" if what else ""
        raise DataError(
            f"{path} holds more than tensors{named} or is no file of weights: code in a file is never run; "
            "save the state dict alone, best as .safetensors"
        ) from None
    except Exception as error:  # on bytes that are no pickle the unpickler raises whatever it stumbles over
        line = next(iter(str(error).strip().splitlines()), "")
        why = f" ({line})" if len(line) > 10 else ""
        raise DataError(f"cannot read {path}: it is damaged or no file of weights{why}; get it again") from None
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise DataError(f"{path}: expected tensors by name, got {type(content).__name__}; give a file of weights")
    return Tensors({str(k): v for k, v in content.items() if isinstance(v, torch.Tensor)}, {})
