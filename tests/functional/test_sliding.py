"""Sliding windows: the published numbers, exact steps, and what holds for any network."""

from __future__ import annotations

import json
import math
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from scarceseg.errors import ConfigError
from scarceseg.functional.sliding import count_windows, sliding_window
from scarceseg.networks.vnet import VNet


class Recorder:
    """A network whose input voxels hold their own index, so that every window tells where it starts."""

    def __init__(self, size: tuple[int, int, int]) -> None:
        self.size = size
        self.volume = torch.arange(math.prod(size), dtype=torch.float32).reshape(1, *size)
        self.starts: list[tuple[int, int, int]] = []

    def __call__(self, windows: torch.Tensor) -> torch.Tensor:
        for window in windows:
            x, y, z = np.unravel_index(int(window[0, 0, 0, 0]), self.size)
            self.starts.append((int(x), int(y), int(z)))
        return torch.cat([torch.zeros_like(windows), torch.ones_like(windows)], dim=1)


def expected_starts(side: int, patch: int, stride: int) -> list[int]:
    return [min(i * stride, side - patch) for i in range(math.ceil((side - patch) / stride) + 1)]


@pytest.mark.parametrize("case", ["sw_a", "sw_pad"])
def test_legacy_is_the_published_average(shared: Path, case: str) -> None:
    folder = shared / "conformance"
    description = json.loads((folder / "sliding_window" / f"{case}.json").read_text())
    config = description.get("config", description)
    network = VNet(1, config["num_classes"], n_filters=4)
    network.load_state_dict(load_file(folder / config["network"]))
    with np.load(folder / "sliding_window" / f"{case}.npz") as file:
        arrays = dict(file)
    stride = (config["stride_xy"], config["stride_xy"], config["stride_z"])
    score = sliding_window(
        arrays["image"][None], network, config["patch"], mode="legacy", stride_legacy=stride, batch=3
    ).numpy()
    np.testing.assert_allclose(score, arrays["score"], rtol=0, atol=2e-4 * float(arrays["score"].std()) + 1e-5)
    different = score.argmax(0) != arrays["label"]
    margin = np.abs(arrays["score"][0] - arrays["score"][1])
    assert not (different & (margin >= 1e-5)).any()
    assert config["min_margin"] < 1e-5 or not different.any()


@pytest.mark.parametrize(
    ("size", "patch", "stride"),
    [
        ((40, 33, 20), (16, 16, 16), (7, 5, 4)),
        ((37, 50, 13), (10, 11, 13), (3, 3, 4)),
        ((112, 16, 16), (112, 16, 16), (18, 18, 4)),
        ((30, 30, 30), (12, 12, 12), (18, 18, 4)),  # a step larger than the patch would leave holes
        ((31, 29, 23), (7, 9, 23), (1, 2, 4)),
    ],
)
def test_legacy_steps_exactly_as_told(
    size: tuple[int, int, int], patch: tuple[int, int, int], stride: tuple[int, int, int]
) -> None:
    recorder = Recorder(size)
    sliding_window(recorder.volume, recorder, patch, mode="legacy", stride_legacy=stride)
    axes = [expected_starts(s, p, min(t, p)) for s, p, t in zip(size, patch, stride, strict=True)]
    every = [(x, y, z) for x in dict.fromkeys(axes[0]) for y in dict.fromkeys(axes[1]) for z in dict.fromkeys(axes[2])]
    assert sorted(recorder.starts) == sorted(every)


@pytest.mark.parametrize(("overlap", "step"), [(0.5, 5), (0.9, 1), (0.7, 3), (0.6, 4), (0.0, 10)])
def test_overlap_is_not_cut_down_by_rounding(overlap: float, step: int) -> None:
    recorder = Recorder((30, 10, 10))
    sliding_window(recorder.volume, recorder, (10, 10, 10), overlap=overlap)
    assert sorted(start[0] for start in recorder.starts) == expected_starts(30, 10, step)


@pytest.mark.parametrize("mode", ["gaussian", "legacy"])
@pytest.mark.parametrize("size", [(16, 16, 16), (5, 40, 17), (33, 16, 9)])
def test_any_size_gives_probabilities_of_that_size(mode: str, size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    volume = torch.randn(2, *size)

    def network(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x.sum(1, keepdim=True)], dim=1)

    probability = sliding_window(volume, network, (16, 16, 16), mode=mode)  # type: ignore[arg-type]
    # This network looks at single voxels only, so windows and their weights must not matter.
    expected = torch.softmax(network(volume[None]), 1)[0]
    assert probability.dtype == torch.float32
    torch.testing.assert_close(probability, expected, rtol=1e-5, atol=1e-6)


def test_padding_is_zeros_half_before() -> None:
    seen: list[torch.Tensor] = []

    def network(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return torch.cat([x, -x], dim=1)

    sliding_window(torch.ones(1, 5, 8, 6), network, (8, 8, 8))
    expected = torch.zeros(1, 1, 8, 8, 8)
    expected[:, :, 1:6, :, 1:7] = 1
    assert torch.equal(seen[0], expected)


def test_gaussian_weights_trust_the_centre_of_a_window() -> None:
    def network(x: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(x), 2, *x.shape[2:])
        logits[:, 1, 0] = logits[:, 1, -1] = 20.0  # wrong at its border
        return logits

    volume = torch.zeros(1, 24, 16, 16)
    gaussian = sliding_window(volume, network, (16, 16, 16))[1, 8, 8, 8]
    uniform = sliding_window(volume, network, (16, 16, 16), mode="legacy", stride_legacy=(8, 8, 8))[1, 8, 8, 8]
    assert gaussian < 0.52 < uniform


def test_a_network_is_evaluated_and_left_as_it_was() -> None:
    network = VNet(1, 2, n_filters=1).train()
    network.block_one.eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    volume = torch.randn(1, 20, 16, 16)
    first, second = (sliding_window(volume, network, (16, 16, 16)) for _ in range(2))
    assert torch.equal(first, second)  # no dropout
    assert [m.training for m in (network, network.block_one, network.block_two)] == [True, False, True]
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_the_batch_does_not_change_the_result() -> None:
    torch.manual_seed(0)
    network, volume = VNet(1, 3, n_filters=1), torch.randn(1, 30, 20, 17)
    one, five = (sliding_window(volume, network, (16, 16, 16), batch=batch) for batch in (1, 5))
    torch.testing.assert_close(one, five, rtol=1e-5, atol=1e-6)


def test_progress_counts_every_window_and_autocast_is_entered_for_each_batch() -> None:
    said: list[tuple[int, int]] = []
    entered: list[int] = []

    def context() -> nullcontext[None]:
        entered.append(1)
        return nullcontext()

    recorder = Recorder((30, 16, 16))
    sliding_window(
        recorder.volume, recorder, (16, 16, 16), batch=2, autocast=context, progress=lambda d, t: said.append((d, t))
    )
    assert said == [(2, 3), (3, 3)]
    assert len(entered) == 2
    assert count_windows((30, 16, 16), (16, 16, 16), (8, 8, 8)) == 3


def test_a_read_only_array_is_taken_without_a_warning() -> None:
    volume = np.zeros((1, 16, 16, 16), dtype=np.float32)
    volume.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sliding_window(volume, lambda x: torch.cat([x, x], 1), (16, 16, 16))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((16, 16, 16), {}),
        ((1, 8, 8, 8), {"overlap": 1.0}),
        ((1, 8, 8, 8), {"batch": 0}),
        ((1, 8, 8, 8), {"overlap": -0.1}),
    ],
)
def test_impossible_requests_are_refused(shape: tuple[int, ...], options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        sliding_window(torch.zeros(shape), lambda x: x, (8, 8, 8), **options)  # type: ignore[arg-type]
