"""The two files a trained network is: ``model.json`` says what it is, ``model.safetensors`` holds its weights.

A MONAI bundle holds the same under names of its own: the entry ``scarceseg`` of ``configs/metadata.json``, and the state
dictionary ``models/model.pt``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_model as load_weights
from safetensors.torch import save_model as save_weights

from scarceseg.config import NetworkConfig
from scarceseg.data.plan import Plan
from scarceseg.errors import ConfigError, RunError
from scarceseg.files import write_atomic, write_text
from scarceseg.networks.base import SegmentationNetwork, build_network
from scarceseg.types import Augment

MODEL_FORMAT = 1
"""Raised when an older program would misread a model."""

BUNDLE_INFO = Path("configs", "metadata.json")
BUNDLE_KEY = "scarceseg"
BUNDLE_WEIGHTS = Path("models", "model.pt")
"""Where a MONAI bundle holds the description, under which key, and the weights."""


class ModelInfo(BaseModel):
    """Content of ``model.json``.

    Attributes:
        format: version of this file.
        network: name and arguments.
        channels, classes: names in order; class 0 is the background.
        plan: how a volume is prepared.
        device: kind of device it was trained on.
        precision: of the forward passes in training; predictions on the same kind of device use it too.
        memory_format: of the weights in training, likewise.
        augment: the orientations in which it was trained.
        training: summary for people; nothing reads it.
    """

    model_config = ConfigDict(extra="ignore")

    format: int = MODEL_FORMAT
    network: NetworkConfig
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    plan: Plan
    device: str = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    memory_format: Literal["contiguous", "channels_last_3d"] = "contiguous"
    augment: Augment = "deform"
    training: dict[str, Any] = {}


def save_model(
    folder: Path,
    network: SegmentationNetwork,
    network_config: NetworkConfig,
    plan: Plan,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write both files, each whole or not at all; the description comes last, so that it never describes nothing.

    Args:
        folder: run folder; made if it is missing.
        network: trained weights.
        network_config: what `network` was built from.
        plan: what it was trained with.
        extra: summary of the training. ``precision`` ("fp32" or "bf16") and ``augment`` in it become hints for predictions.

    Raises:
        RunError: the folder cannot be written.
    """
    summary = dict(extra or {})
    weight = next(network.parameters())
    info = ModelInfo(
        network=network_config,
        channels=plan.channels,
        classes=plan.classes,
        plan=plan,
        device=weight.device.type,
        precision=summary.pop("precision", "fp32"),
        augment=summary.pop("augment", "deform"),
        memory_format="channels_last_3d" if _is_channels_last(network) else "contiguous",
        training=summary,
    )
    write_atomic(folder / "model.safetensors", lambda path: save_weights(network, str(path)))
    write_text(folder / "model.json", info.model_dump_json(indent=1) + "\n")


def load_model(folder: Path) -> tuple[SegmentationNetwork, Plan, ModelInfo]:
    """Read both files.

    Args:
        folder: run folder, or its ``model.json``, or a MONAI bundle that ``scarceseg export`` wrote.

    Returns:
        The network on the CPU in evaluation mode, its plan and the whole description.

    Raises:
        RunError: a file is missing or damaged, was written by a newer version, or the weights do not fit the network.
    """
    folder = folder.parent if folder.name == "model.json" else folder
    load: Callable[[SegmentationNetwork, Path], object]
    if is_bundle(folder):
        described, weights, load = folder / BUNDLE_INFO, folder / BUNDLE_WEIGHTS, _load_state
    else:
        described, weights, load = folder / "model.json", folder / "model.safetensors", load_weights
    info = _read_info(folder, described)
    if not weights.is_file():
        raise RunError(f"{folder} has a {described.name} but no {weights.name}: copy both files of the run")
    try:
        network = build_network(info.network.name, len(info.channels), len(info.classes), info.network.args)
    except ConfigError as error:
        raise RunError(f"{described} names a network that cannot be built here: {error}") from None
    _fill(network, weights, load, f"{info.network.name!r} of {described.name}")
    return network.eval(), info.plan, info


def is_bundle(folder: Path) -> bool:
    """Whether a folder is laid out as a MONAI bundle and not as a run."""
    return (folder / BUNDLE_INFO).is_file() and not (folder / "model.json").is_file()


def _fill(
    network: SegmentationNetwork, weights: Path, load: Callable[[SegmentationNetwork, Path], object], name: str
) -> None:
    try:
        load(network, weights)
    except (SafetensorError, OSError) as error:
        raise RunError(f"cannot read {weights}: {error}; it is damaged or cut short, copy it again") from None
    except RuntimeError as error:
        raise RunError(
            f"the weights in {weights} do not fit the network {name} ({_shorten(str(error))}): "
            "take both files from the same run"
        ) from None


def _load_state(network: SegmentationNetwork, path: Path) -> None:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged bytes torch.load fails in many ways
        raise OSError((str(error) or type(error).__name__).splitlines()[0]) from None
    network.load_state_dict(state)


def _read_info(folder: Path, path: Path) -> ModelInfo:
    if not folder.is_dir():
        raise RunError(f"there is no run folder {folder}: check the path")
    if not path.is_file():
        started = (folder / "config.yaml").exists()
        hint = "its training has not finished, resume it" if started else "give the folder a training wrote"
        raise RunError(f"{folder} holds no model.json: {hint}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if path.name == BUNDLE_INFO.name:
            if BUNDLE_KEY not in values:
                raise RunError(
                    f"{folder} is a MONAI bundle that another program wrote: run it with 'python -m monai.bundle run'"
                )
            values = values[BUNDLE_KEY]
        version = values.get("format", 0)
        if isinstance(version, int) and version > MODEL_FORMAT:
            raise RunError(f"{path} has format {version}, this version reads up to {MODEL_FORMAT}: update scarceseg")
        return ModelInfo.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RunError(f"{path} is not a model description ({where}: {first['msg'].lower()}): copy it again") from None
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(f"cannot read {path}: {str(error).splitlines()[0]}; copy it again") from None


def _is_channels_last(network: torch.nn.Module) -> bool:
    layout = torch.channels_last_3d
    return any(
        p.ndim == 5 and p.is_contiguous(memory_format=layout) and not p.is_contiguous() for p in network.parameters()
    )


def _shorten(text: str, limit: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[:limit]} ..."
