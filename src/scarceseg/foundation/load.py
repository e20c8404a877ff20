"""A name, a file or a folder -> a foundation model, ready behind its interface.

Each model has a file in ``models`` with its builder. A builder may take ``path`` (another file of its kind) and options of its
own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scarceseg.errors import ConfigError, near_matches
from scarceseg.foundation import FOUNDATIONS, FoundationModel
from scarceseg.foundation.base import Promptable
from scarceseg.foundation.catalogue import CATALOGUE
from scarceseg.foundation.identify import WORDS, identify
from scarceseg.foundation.models import check_options
from scarceseg.foundation.models.sam import build_sam
from scarceseg.foundation.models.sam_med3d import build_sam_med3d
from scarceseg.foundation.weights import find


def load_foundation(name_or_file: str | Path, device: str | torch.device = "cpu", **options: Any) -> FoundationModel:
    """Build a foundation model, frozen; nothing is downloaded.

    Args:
        name_or_file: a registered name (``scarceseg foundations list``), or a file or folder of weights, which is told by the
            names of its tensors: official or Hugging Face SAM, SAM-Med3D, or one of our own.
        device: where it is put.
        options: of the model, such as ``view="mosaic"`` for a SAM.

    Raises:
        ConfigError: neither a name nor a file, a file that is no foundation model, or an option the model does not have.
        DataError: weights that are not on this machine, damaged, or do not fit.
    """
    if _is_name(name_or_file):
        text = str(name_or_file)
        model = _build(text, FOUNDATIONS.get(text), options)
    else:
        model = _from_file(Path(name_or_file), options)
    if isinstance(model, Promptable):
        model.to(torch.device(device))
    return model


def check_foundation(name_or_file: str | Path) -> None:
    """Refuse a model that is not there, without reading its weights: a long run had better know before its first stage.

    Args:
        name_or_file: see `load_foundation`.

    Raises:
        ConfigError: neither a name nor a file or folder.
        DataError: a name whose weights are not on this machine, or cut short.
    """
    if _is_name(name_or_file) and str(name_or_file) in CATALOGUE:
        find(str(name_or_file))


def _is_name(name_or_file: str | Path) -> bool:
    if isinstance(name_or_file, str) and name_or_file in FOUNDATIONS.names():
        return True
    if Path(name_or_file).exists():
        return False
    known = near_matches(str(name_or_file), FOUNDATIONS.names())
    raise ConfigError(f"{str(name_or_file)!r} is neither a foundation model nor a file or folder: {known}")


def _from_file(path: Path, options: dict[str, Any]) -> FoundationModel:
    kind = identify(path)
    if kind in {"tiny-sam", "tiny-sam3d"}:
        return _build(kind, FOUNDATIONS.get(kind), {"path": path, **options})
    builders: dict[str, Callable[..., FoundationModel]] = {
        "sam-official": build_sam,
        "sam-hf": build_sam,
        "sam-med3d": build_sam_med3d,
    }
    if kind not in builders:
        hint = "run 'scarceseg foundations check' on it" if kind == "unknown" else "give the whole model"
        raise ConfigError(f"{path} is no foundation model but {WORDS[kind]}: {hint}")
    return builders[kind](path.resolve().name, path=path, **options)


def _build(name: str, builder: Callable[..., FoundationModel], options: dict[str, Any]) -> FoundationModel:
    check_options(name, options, builder)
    return builder(**options)
