"""A trained network as TorchScript or ONNX, each checked against the network it was made from before it is handed out."""

from __future__ import annotations

import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from scarceseg import __version__
from scarceseg.errors import ConfigError, RunError
from scarceseg.inference.model import ModelInfo
from scarceseg.networks.base import SegmentationNetwork

Size = tuple[int, int, int]
Forward = Callable[[torch.Tensor], torch.Tensor]
Made = TypeVar("Made")

TOLERANCE = 1e-3
"""Largest difference of logits from the original's, as a share of the largest logit; float32 gives 1e-7 to 1e-5."""

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_SMALLEST = 16
_MOST = 4096


@dataclass(frozen=True)
class Facts:
    """What an exported network takes and gives; it stands in the file as JSON under the name ``scarceseg``.

    Attributes:
        channels, classes: names in order; class 0 is the background.
        input: ``image``, float32 ``[B, C, X, Y, Z]``, prepared as `plan` says.
        output: ``logits``, float32 ``[B, K, X, Y, Z]``; their softmax over K are the class probabilities.
        patch: voxels a side of the windows it was trained on.
        any_size: whether other sizes are taken; if not, the size has to be `patch`. The batch is free in either case.
        divisor: each side has to be a multiple of these, where `any_size`.
        spacing_mm: of prepared volumes.
        difference: largest difference of logits from the original's in the check.
        plan: how a volume is prepared, as in ``model.json``.
        scarceseg, torch: versions.
    """

    channels: tuple[str, ...]
    classes: tuple[str, ...]
    input: str
    output: str
    patch: Size
    any_size: bool
    divisor: Size
    spacing_mm: tuple[float, float, float]
    difference: float
    plan: dict[str, Any]
    scarceseg: str
    torch: str

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self))


class Exported(NamedTuple):
    """A network in another format.

    Attributes:
        content: of the file.
        facts: what the file says about itself.
    """

    content: bytes
    facts: Facts


def to_torchscript(network: SegmentationNetwork, info: ModelInfo) -> Exported:
    """The network in evaluation mode, traced, in float32.

    It is traced at a small size and run at others. A network that has built the size in (some transformers have) is
    traced again at the patch and says so in its facts.

    Args:
        network: what `load_model` gave.
        info: its description.

    Returns:
        A file that ``torch.jit.load`` reads; the facts are its extra file ``scarceseg.json``.

    Raises:
        RunError: the network cannot be traced, or what was traced gives other logits.
    """

    def trace(plain: nn.Module, example: torch.Tensor, _any_size: bool) -> tuple[torch.jit.ScriptModule, Forward]:
        traced = torch.jit.trace(plain, example, check_trace=False)
        return traced, traced

    traced, facts = _export(network, info, "TorchScript", trace)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer, _extra_files={"scarceseg.json": facts.to_json()})
    return Exported(buffer.getvalue(), facts)


def to_onnx(network: SegmentationNetwork, info: ModelInfo) -> Exported:
    """The network in evaluation mode as an ONNX graph from ``image`` to ``logits``, in float32.

    Batch and sides are free; where the exporter or the check does not bear that out, the size is fixed to the patch and
    only the batch is free. The graph is checked by ``onnx.checker`` and run with ONNX Runtime.

    Args:
        network: what `load_model` gave.
        info: its description.

    Returns:
        A file in one piece; the facts are its metadata entry ``scarceseg``.

    Raises:
        ConfigError: the packages for ONNX are missing.
        RunError: the network cannot be exported, or the graph gives other logits.
    """
    require_onnx()
    import onnx

    def build(plain: nn.Module, example: torch.Tensor, any_size: bool) -> tuple[bytes, Forward]:
        program = torch.onnx.export(
            plain,
            (example,),
            dynamo=True,
            dynamic_shapes=(_free_axes(network.divisor, any_size),),
            input_names=["image"],
            output_names=["logits"],
            verbose=False,
        )
        assert program is not None
        content = program.model_proto.SerializeToString()
        onnx.checker.check_model(content, full_check=True)
        return content, _runtime(content)

    content, facts = _export(network, info, "ONNX", build)
    graph = onnx.load_from_string(content)
    onnx.helper.set_model_props(graph, {"scarceseg": facts.to_json()})
    return Exported(graph.SerializeToString(), facts)


def require_onnx() -> None:
    """Tell which packages for ONNX are missing.

    Raises:
        ConfigError: any is.
    """
    if missing := [name for name in ONNX_PACKAGES if find_spec(name) is None]:
        raise ConfigError(
            f"export to ONNX needs the package{'s' if len(missing) > 1 else ''} {', '.join(missing)}, not installed "
            "here: install the extra 'export', as in pip install -e '.[export]' in the clone"
        )


def _export(
    network: SegmentationNetwork,
    info: ModelInfo,
    kind: str,
    make: Callable[[nn.Module, torch.Tensor, bool], tuple[Made, Forward]],
) -> tuple[Made, Facts]:
    """Make the file for any size, or else for the patch alone; the first that gives the original's logits is taken."""
    plain = _plain(network)
    patch = info.plan.patch
    step = network.divisor
    # Two or more steps a side, so that instance normalisation has more than one voxel at the bottleneck.
    base = _size([max(2, -(-_SMALLEST // side)) * side for side in step])
    other = (base[0], base[1] + step[1], base[2] + 2 * step[2])
    problem = ""
    for any_size in (True, False) if getattr(network, "fixed_size", None) is None else (False,):
        sizes = (base, other, patch) if any_size else (patch,) * 3
        try:
            with _quiet(), torch.no_grad():
                made, forward = make(plain, _noise(2, info, sizes[0]), any_size)
                found = [
                    _difference(plain, forward, _noise(n, info, size))
                    for n, size in zip((3, 1), sizes[1:], strict=True)
                ]
        except Exception as error:  # exporters and their runtimes fail in ways of their own
            problem = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            continue
        if all(difference <= TOLERANCE for difference in found):  # which a NaN is not
            return made, _facts(network, info, any_size, max(found))
        problem = f"its logits differ by {' and '.join(f'{difference:.2g}' for difference in found)} of their range"
    raise RunError(
        f"the network {info.network.name!r} cannot be exported to {kind}: {problem}; 'scarceseg predict' works without it"
    )


def _plain(network: SegmentationNetwork) -> nn.Module:
    """A copy without what stops an exporter: mode, gradients and the check of the size, which looks at numbers."""
    plain = copy.deepcopy(network).cpu().float().eval().requires_grad_(False)
    plain.__dict__["check_size"] = _accept
    return plain


def _accept(_image: torch.Tensor) -> None:
    """Any size: whoever runs the file has to pad."""


def _free_axes(divisor: Size, any_size: bool) -> dict[int, Any]:
    """Which axes of ``[B, C, X, Y, Z]`` may vary, and that sides are multiples of the divisor."""
    free: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=_MOST)}
    if any_size:
        for axis, (name, step) in enumerate(zip("xyz", divisor, strict=True), start=2):
            count = torch.export.Dim(name, min=1, max=_MOST)
            free[axis] = step * count if step > 1 else count
    return free


def _runtime(content: bytes) -> Forward:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # a graph that does not run is told by its exception
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


def _difference(plain: nn.Module, forward: Forward, image: torch.Tensor) -> float:
    """Largest difference of logits, as a share of the largest logit."""
    expected, found = plain(image), forward(image)
    if found.shape != expected.shape:
        raise RunError(f"logits have the shape {list(found.shape)}, expected {list(expected.shape)}")
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


def _noise(batch: int, info: ModelInfo, size: Size) -> torch.Tensor:
    return torch.randn(batch, len(info.channels), *size, generator=torch.Generator().manual_seed(0))


def _facts(network: SegmentationNetwork, info: ModelInfo, any_size: bool, difference: float) -> Facts:
    return Facts(
        channels=info.channels,
        classes=info.classes,
        input="image: float32 [batch, channel, x, y, z]",
        output="logits: float32 [batch, class, x, y, z]",
        patch=info.plan.patch,
        any_size=any_size,
        divisor=_size(network.divisor),
        spacing_mm=info.plan.spacing_mm,
        difference=difference,
        plan=info.plan.model_dump(mode="json"),
        scarceseg=__version__,
        torch=torch.__version__,
    )


def _size(sides: Any) -> Size:
    x, y, z = sides
    return int(x), int(y), int(z)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' remarks on sizes, deprecations and packages nobody needs here from the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
