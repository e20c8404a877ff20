"""Any segmentation network of MONAI, by its name there."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn

from scarceseg.errors import ConfigError, near_matches
from scarceseg.networks.base import SegmentationNetwork
from scarceseg.types import ImageBatch, Logits

PREFIX = "monai:"
"""Optional in front of a name; needed only where one of our networks has the same name."""

NAMES: tuple[str, ...] = (
    "AttentionUnet",
    "BasicUNet",
    "BasicUNetPlusPlus",
    "DynUNet",
    "FlexibleUNet",
    "HighResNet",
    "MedNeXt",
    "SegResNet",
    "SegResNetDS",
    "SwinUNETR",
    "UNet",
    "UNETR",
    "VNet",
)
"""The usual ones. Other classes of ``monai.networks.nets`` work if they give one logit per class and voxel."""

_UNET_LEVELS: dict[str, Any] = {"channels": (16, 32, 64, 128, 256), "strides": (2, 2, 2, 2)}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "AttentionUnet": _UNET_LEVELS,
    "DynUNet": {"kernel_size": [3] * 5, "strides": [1, 2, 2, 2, 2], "upsample_kernel_size": [2] * 4},
    "FlexibleUNet": {"backbone": "efficientnet-b0"},
    "SegResNetVAE": {"input_image_size": (64, 64, 64)},
    "UNet": _UNET_LEVELS | {"num_res_units": 2},
    "UNETR": {"img_size": (96, 96, 96)},
}
"""For arguments MONAI leaves without a default."""

_FIXED_SIZE = ("img_size", "input_image_size")
_FROM_DATASET = ("in_channels", "out_channels", "num_classes")

_DIVISORS: dict[str, tuple[int, int, int]] = {}
"""Found so far in this process, by name and arguments: a search takes about a second."""


def find(name: str) -> type[nn.Module] | None:
    """The class of that name in ``monai.networks.nets`` if it takes image channels and classes, otherwise None."""
    from monai.networks import nets

    found = getattr(nets, name, None)
    if not (inspect.isclass(found) and issubclass(found, nn.Module)):
        return None
    parameters = inspect.signature(found).parameters
    return found if "in_channels" in parameters and _classes_argument(parameters) is not None else None


class MonaiNetwork(SegmentationNetwork):
    """A network of MONAI behind the interface of this package.

    Channels, classes and the three dimensions are filled in; every other argument is MONAI's own. Where MONAI has no
    default (levels of ``UNet``, kernels of ``DynUNet``, ``img_size`` of ``UNETR``) a usual one is set. Of networks that
    return several tensors the first is used; deep supervision is refused, because only that first one gets a loss.

    The divisor is found by trying sizes on a twin without memory (meta device). ``divisor: 32`` or
    ``divisor: [32, 32, 16]`` among the arguments sets it instead. A network built for one size (``img_size``) takes
    that size only.

    Args:
        name: class name in ``monai.networks.nets``.
        channels: image channels C.
        classes: classes K.
        args: further arguments of that class, and optionally `divisor`.

    Raises:
        ConfigError: unknown class, arguments it refuses, or an output that is not one logit per class and voxel.
    """

    def __init__(self, name: str, channels: int, classes: int, args: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.name = name
        self.channels = channels
        self.classes = classes
        args = dict(args or {})
        divisor = args.pop("divisor", None)
        cls = find(name)
        if cls is None:
            raise ConfigError(f"unknown MONAI network {name!r}: {near_matches(name, NAMES)}")
        self._arguments = _arguments(cls, name, channels, classes, args)
        self.network = self._build(cls)
        self.fixed_size = next((_three(self._arguments[key]) for key in _FIXED_SIZE if key in self._arguments), None)
        if divisor is not None:
            self._divisor = self._given_divisor(divisor)
        elif self.fixed_size is not None:
            self._divisor = self.fixed_size
        else:
            self._divisor = self._find_divisor()

    @property
    def divisor(self) -> tuple[int, int, int]:
        """Given, found by trial, or the fixed size of the network."""
        return self._divisor

    def check_size(self, image: ImageBatch) -> None:
        """As for every network; one of fixed size takes no multiple of it either.

        Raises:
            ConfigError: the size does not fit.
        """
        super().check_size(image)
        if self.fixed_size is not None and tuple(image.shape[2:]) != self.fixed_size:
            raise ConfigError(
                f"{self.name} is built for patches of {list(self.fixed_size)}, got {list(image.shape[2:])}: "
                "take that patch, or set the network's argument img_size"
            )

    def forward(self, image: ImageBatch) -> Logits:
        """Logits ``[B, K, X, Y, Z]``.

        Raises:
            ConfigError: the size does not fit, or MONAI refuses the input.
        """
        self.check_size(image)
        try:
            return _first(self.network(image))
        except ValueError as error:
            raise ConfigError(f"{self.name} refuses an input of {list(image.shape)}: {error}") from error

    def _build(self, cls: type[nn.Module]) -> nn.Module:
        try:
            return cls(**self._arguments)
        except Exception as error:  # whatever MONAI raises here, the cause is an argument
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            cure = "install that package" if "No module named" in text else "correct the arguments"
            raise ConfigError(f"MONAI cannot build {self.name} with {self._arguments}: {text}; {cure}") from error

    def _given_divisor(self, divisor: Any) -> tuple[int, int, int]:
        try:
            sides = _three(divisor)
        except (TypeError, ValueError):
            sides = (0, 0, 0)
        if min(sides) < 1:
            raise ConfigError(f"{self.name}: divisor is one positive whole number or three, got {divisor!r}")
        return sides

    def _find_divisor(self) -> tuple[int, int, int]:
        settings = {key: value for key, value in self._arguments.items() if key not in _FROM_DATASET}
        key = f"{self.name} {sorted(settings.items())}"
        if key not in _DIVISORS:
            _DIVISORS[key] = self._try_sizes()
        return _DIVISORS[key]

    def _try_sizes(self) -> tuple[int, int, int]:
        twin = copy.deepcopy(self.network).to("meta").eval()
        steps = (1, 2, 4, 8, 16, 32, 64)
        everywhere = 0
        problem = ""
        for step in steps:
            problem = self._trial(twin, (3 * step,) * 3) or self._trial(twin, (2 * step, step, step))
            if not problem:
                everywhere = step
                break
        if not everywhere:
            raise ConfigError(f"MONAI's {self.name} does not serve as a segmentation network: {problem}")
        found = []
        for axis in range(3):
            for step in steps:
                short = [3 * everywhere] * 3
                long = list(short)
                short[axis], long[axis] = step, 3 * step
                if not self._trial(twin, short) and not self._trial(twin, long):
                    found.append(step)
                    break
            else:
                found.append(everywhere)
        return (found[0], found[1], found[2])

    def _trial(self, twin: nn.Module, size: tuple[int, ...] | list[int]) -> str:
        """Empty text if an input of this size comes back as logits, otherwise what happened."""
        image = torch.empty(1, self.channels, *size, device="meta")
        expected = (1, self.classes, *size)
        try:
            with torch.no_grad():
                output = _first(twin(image))
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        return "" if shape == expected else f"an input of {list(image.shape)} gives {shape}, expected {expected}"


def _classes_argument(parameters: Any) -> str | None:
    return next((key for key in ("out_channels", "num_classes") if key in parameters), None)


def _arguments(cls: type[nn.Module], name: str, channels: int, classes: int, args: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(cls).parameters
    given: dict[str, Any] = {"in_channels": channels, str(_classes_argument(parameters)): classes}
    if "spatial_dims" in parameters:
        given["spatial_dims"] = 3
    if "pretrained" in parameters:
        given["pretrained"] = False
    for key in args:
        if key in given:
            raise ConfigError(f"{name}: {key!r} is set from the dataset; leave it out of the arguments")
        if key not in parameters and not _takes_any(parameters):
            options = [known for known in parameters if known not in given]
            raise ConfigError(f"{name} takes no argument {key!r}: {near_matches(key, [*options, 'divisor'])}")
    if args.get("deep_supervision"):
        raise ConfigError(
            f"{name}: deep_supervision is not supported, because only the last output gets a loss: leave it off"
        )
    return _DEFAULTS.get(name, {}) | args | given


def _takes_any(parameters: Any) -> bool:
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())


def _three(value: Any) -> tuple[int, int, int]:
    x, y, z = (value, value, value) if isinstance(value, int) else value
    return (int(x), int(y), int(z))


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, list | tuple) else output
