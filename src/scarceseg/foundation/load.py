"""A name, a file or a folder -> a foundation model, ready behind its interface.

The big published models are registered here; each of our own registers itself. A builder may take ``path`` (another file of
its kind) and options of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from scarceseg.errors import ConfigError, near_matches
from scarceseg.foundation import FOUNDATIONS, FoundationModel
from scarceseg.foundation.base import Promptable
from scarceseg.foundation.identify import WORDS, identify
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
    text = str(name_or_file)
    if isinstance(name_or_file, str) and name_or_file in FOUNDATIONS.names():
        model = _build(text, FOUNDATIONS.get(text), options)
    elif Path(name_or_file).exists():
        model = _from_file(Path(name_or_file), options)
    else:
        raise ConfigError(
            f"{text!r} is neither a foundation model nor a file or folder: {near_matches(text, FOUNDATIONS.names())}"
        )
    if isinstance(model, Promptable):
        model.to(torch.device(device))
    return model


def _from_file(path: Path, options: dict[str, Any]) -> FoundationModel:
    kind = identify(path)
    if kind in {"tiny-sam", "tiny-sam3d"}:
        return _build(kind, FOUNDATIONS.get(kind), {"path": path, **options})
    builders: dict[str, Callable[..., FoundationModel]] = {
        "sam-official": _sam,
        "sam-hf": _sam,
        "sam-med3d": _sam_med3d,
    }
    if kind not in builders:
        hint = "run 'scarceseg foundations check' on it" if kind == "unknown" else "give the whole model"
        raise ConfigError(f"{path} is no foundation model but {WORDS[kind]}: {hint}")
    return builders[kind](path.resolve().name, path=path, **options)


def _build(name: str, builder: Callable[..., FoundationModel], options: dict[str, Any]) -> FoundationModel:
    _check_options(name, options, builder)
    return builder(**options)


def _check_options(name: str, options: Mapping[str, Any], taker: Callable[..., Any]) -> None:
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


def _sam(name: str, /, *, path: Path | None = None, **options: Any) -> FoundationModel:
    """A SAM or MedSAM on volumes, slice by slice or as one mosaic."""
    from scarceseg.foundation.sam_volume import SamPromptable

    return SamPromptable.from_file(path or find(name), name=name, **options)


def _sam_med3d(name: str, /, *, path: Path | None = None, **options: Any) -> FoundationModel:
    """SAM-Med3D on volumes."""
    from scarceseg.foundation.sam_med3d import SamMed3D

    _check_options(name, options, SamMed3D)
    return SamMed3D.from_file(path or find(name), name=name, **options)


for _name in ("sam-vit-b", "sam-vit-l", "sam-vit-h", "medsam"):
    FOUNDATIONS.register(_name)(partial(_sam, _name))
for _name in ("sam-med3d", "sam-med3d-turbo"):
    FOUNDATIONS.register(_name)(partial(_sam_med3d, _name))
