"""A trained network for use elsewhere: MONAI bundle, ONNX or TorchScript."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from scarceseg.errors import ConfigError, RunError, near_matches
from scarceseg.files import write_atomic
from scarceseg.inference.export_bundle import write_bundle, write_bytes
from scarceseg.inference.export_network import Exported, Facts, require_onnx, to_onnx, to_torchscript
from scarceseg.inference.model import ModelInfo, load_model
from scarceseg.networks.base import SegmentationNetwork

Format = Literal["bundle", "onnx", "torchscript"]

_ENDINGS: dict[str, tuple[str, ...]] = {"onnx": (".onnx",), "torchscript": (".ts", ".pt")}


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        path: file or folder.
        facts: what the network in it takes and gives.
    """

    path: Path
    facts: Facts

    def __str__(self) -> str:
        """One line: where, which sizes, and how near the original."""
        by = "x".join(str(side) for side in (self.facts.divisor if self.facts.any_size else self.facts.patch))
        sizes = f"sides in multiples of {by}" if self.facts.any_size else f"patches of {by} only"
        difference = self.facts.difference
        near = f"to {difference:.0e} of their range" if difference else "bit for bit"
        return f"{self.path}  (any batch, {sizes}; its logits are the original's {near})"


def export_model(run: Path | str, out: Path | str, to: str = "bundle") -> Export:
    """Write a trained network in a format other programs read, after checking it against the original.

    Args:
        run: run folder, folder with ``model.json`` and ``model.safetensors``, or a bundle that was written here.
        out: what to make: a folder for ``bundle``, a file ``.onnx`` or ``.ts`` for the others.
        to: ``bundle`` (MONAI), ``onnx`` or ``torchscript``.

    Returns:
        Path and facts.

    Raises:
        RunError: the run cannot be used, `out` is there already or cannot be written, or the network of the run cannot
            be expressed in that format.
        ConfigError: an unknown format, an ending that does not suit it, or packages it needs are missing.
    """
    run, out = Path(run), Path(out)
    _check(out, to)
    network, _, info = load_model(run)
    if to == "bundle":
        return Export(out, _write_folder(out, network, info))
    make: Callable[[SegmentationNetwork, ModelInfo], Exported] = to_onnx if to == "onnx" else to_torchscript
    content, facts = make(network, info)
    write_atomic(out, lambda path: write_bytes(path, content))
    return Export(out, facts)


def _check(out: Path, to: str) -> None:
    """Find out before the work, not after it, what stands in its way."""
    known = get_args(Format)
    if to not in known:
        raise ConfigError(f"unknown format {to!r}: {near_matches(to, known)}")
    if to == "onnx":
        require_onnx()
    endings = _ENDINGS.get(to, ())
    if endings and out.suffix not in endings:
        raise ConfigError(f"--out {out}: a file of the format {to} ends in {' or '.join(endings)}")
    if not endings and out.suffix in {ending for group in _ENDINGS.values() for ending in group}:
        raise ConfigError(f"--out {out}: a bundle is a folder; leave the ending out, or choose --to {_format_of(out)}")
    if out.exists() and not (to == "bundle" and out.is_dir() and not any(out.iterdir())):
        raise RunError(f"{out} exists already: choose another --out, or remove it")


def _format_of(out: Path) -> str:
    return next(name for name, endings in _ENDINGS.items() if out.suffix in endings)


def _write_folder(out: Path, network: SegmentationNetwork, info: ModelInfo) -> Facts:
    """The whole bundle or none: it is written beside its place and then moved there.

    Raises:
        RunError: the folder cannot be written.
    """
    aside: Path | None = None
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
        inner = aside / out.absolute().name
        facts = write_bundle(inner, network, info)
        if out.is_dir():
            out.rmdir()
        os.replace(inner, out)
        return facts
    except OSError as error:
        raise RunError(f"cannot write {out} ({error.strerror or error}): choose another --out") from None
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
