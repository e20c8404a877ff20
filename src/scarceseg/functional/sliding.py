"""Patch-wise prediction of a whole volume: overlapping windows whose probabilities are averaged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import numpy as np
import torch
from monai.data.utils import dense_patch_slices
from monai.inferers import sliding_window_inference
from torch import nn

from scarceseg.errors import ConfigError
from scarceseg.types import Volume

Mode = Literal["gaussian", "legacy"]


def sliding_window(
    volume: Volume | torch.Tensor,
    network: Callable[[torch.Tensor], torch.Tensor],
    patch: Sequence[int],
    *,
    mode: Mode = "gaussian",
    overlap: float = 0.5,
    stride_legacy: Sequence[int] = (18, 18, 4),
    batch: int = 4,
    device: torch.device | str = "cpu",
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Class probabilities of every voxel of a volume.

    Windows start at ``min(i * stride, side - patch)`` on every axis. The softmax of each window is averaged:

    - ``gaussian``: weighted by a Gaussian around the window's centre (sigma 1/8 of its side), so that voxels near a
      window's border, where the network sees little, count little;
    - ``legacy``: all alike, in steps of `stride_legacy`, as in the evaluation of UA-MT and what followed it.

    A side shorter than the patch is padded with zeros, half before (rounded down) and the rest after, as the training
    patches are; the result has the size of `volume`. A module is put into evaluation mode and afterwards back into the
    mode it was in.

    Args:
        volume: ``[C, X, Y, Z]`` normalised intensities.
        network: ``[B, C, *patch]`` to logits ``[B, K, *patch]``.
        patch: window size in voxels.
        mode: see above.
        overlap: share of the patch that neighbouring windows have in common, in [0, 1); for ``gaussian`` only.
        stride_legacy: step in voxels along X, Y, Z; never larger than the patch. For ``legacy`` only.
        batch: windows in one forward pass.
        device: where the network is.
        autocast: makes the context of a forward pass, such as ``lambda: torch.autocast("cuda", torch.bfloat16)``.
        progress: called with the windows done and their number.

    Returns:
        ``[K, X, Y, Z]`` float32 in [0, 1], sum 1 over K, on `device` (in main memory if it would not fit there).

    Raises:
        ConfigError: a volume without four axes, `overlap` outside [0, 1), or sizes below one.
    """
    if isinstance(volume, np.ndarray):
        # A memory map opened for reading would make PyTorch warn that it could be written through the tensor.
        volume = torch.from_numpy(np.ascontiguousarray(volume) if volume.flags.writeable else volume.copy())
    image = volume.float()
    if image.ndim != 4:
        raise ConfigError(f"expected a volume [C, X, Y, Z] (4 axes), got the shape {list(image.shape)}")
    if not 0 <= overlap < 1:
        raise ConfigError(f"overlap is a share from 0 to below 1, got {overlap}")
    if min(*patch, *stride_legacy, batch) < 1:
        raise ConfigError(f"patch, stride and batch start at 1, got {list(patch)}, {list(stride_legacy)} and {batch}")
    wanted = stride_legacy if mode == "legacy" else steps(patch, overlap)
    stride = [min(step, side) for step, side in zip(wanted, patch, strict=True)]
    total = count_windows(image.shape[1:], patch, stride)
    device = torch.device(device)
    done = 0

    def predict(windows: torch.Tensor) -> torch.Tensor:
        nonlocal done
        with autocast():
            logits = network(windows)
        done += len(windows)
        if progress is not None:
            progress(done, total)
        return torch.softmax(logits.float(), dim=1)

    with torch.inference_mode(), _evaluating(network):
        probability = sliding_window_inference(
            image[None],
            tuple(patch),
            sw_batch_size=batch,
            predictor=predict,
            overlap=overlaps(patch, stride),
            mode="constant" if mode == "legacy" else "gaussian",
            padding_mode="constant",
            sw_device=device,
            device=_home(image, device),
        )
    assert isinstance(probability, torch.Tensor)
    return probability[0]


def count_windows(size: Sequence[int], patch: Sequence[int], stride: Sequence[int]) -> int:
    """Number of windows over a volume of `size` voxels, which is first padded to `patch`."""
    padded = [max(side, window) for side, window in zip(size, patch, strict=True)]
    return len(dense_patch_slices(padded, tuple(patch), tuple(stride)))


def steps(patch: Sequence[int], overlap: float = 0.5) -> list[int]:
    """Voxels from one window to the next."""
    return [max(round(side * (1 - overlap)), 1) for side in patch]


def overlaps(patch: Sequence[int], stride: Sequence[int]) -> list[float]:
    """The shares that make MONAI step exactly by `stride`: it takes the whole part of ``patch * (1 - overlap)``."""
    return [max(1 - (step + 0.5) / side, 0.0) for side, step in zip(patch, stride, strict=True)]


@contextmanager
def _evaluating(network: object) -> Iterator[None]:
    if not isinstance(network, nn.Module):
        yield
        return
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _home(image: torch.Tensor, device: torch.device, classes: int = 16) -> torch.device:
    """Where windows are summed: on the device, unless two results of `classes` classes fill half its free memory."""
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    needed = 2 * 4 * classes * math.prod(image.shape[1:])
    return device if needed < free / 2 else torch.device("cpu")
