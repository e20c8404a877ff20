"""The choice of precision and memory format."""

from __future__ import annotations

import pytest
import torch

from scarceseg.errors import ConfigError
from scarceseg.foundation.volume_tuning import LowRank, add_lora
from scarceseg.networks import build_network, selftest
from scarceseg.networks.selftest import choose


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({("fp32", "contiguous"): 1.0, ("fp32", "channels_last_3d"): 0.7}, ("fp32", "channels_last_3d")),
        ({("fp32", "contiguous"): 0.6, ("fp32", "channels_last_3d"): 0.7}, ("fp32", "contiguous")),
        # bf16 has to be clearly faster, not just faster.
        ({("fp32", "contiguous"): 1.0, ("bf16", "contiguous"): 0.95}, ("fp32", "contiguous")),
        ({("fp32", "contiguous"): 1.0, ("bf16", "contiguous"): 0.3}, ("bf16", "contiguous")),
    ],
)
def test_takes_the_fastest(
    monkeypatch: pytest.MonkeyPatch, times: dict[tuple[str, str], float], expected: tuple[str, str]
) -> None:
    monkeypatch.setattr(selftest, "_candidates", lambda device: sorted({p for p, _ in times}))
    monkeypatch.setattr(selftest, "seconds_per_step", lambda *a, **k: times)
    network = build_network("vnet", 1, 2, {"n_filters": 1})
    chosen = choose(network, 1, (32, 32, 16), (16, 16, 16), torch.device("cpu"))
    assert chosen[:2] == expected


def test_measures_without_touching_network_or_random_numbers() -> None:
    network = build_network("vnet", 1, 2, {"n_filters": 1})
    before = {key: value.clone() for key, value in network.state_dict().items()}
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    precision, memory_format, measured = choose(network, 1, (32, 32, 16), (16, 16, 16), torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert f"{precision}/{memory_format}" in measured
    assert all(seconds > 0 for seconds in measured.values())


def test_settings_that_are_given_are_taken_without_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "seconds_per_step", lambda *a, **k: pytest.fail("nothing was open"))
    network = build_network("vnet", 1, 2, {"n_filters": 1})
    chosen = choose(network, 1, (64, 64, 48), (16, 16, 16), torch.device("cpu"), "bf16", "contiguous")
    assert chosen == ("bf16", "contiguous", {})


def test_bf16_is_not_taken_where_it_computes_wrong_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build_network("vnet", 1, 2, {"n_filters": 2})
    cpu = torch.device("cpu")
    asked = []

    def error(layer: torch.nn.Conv3d, size: torch.Size, device: torch.device) -> float:
        asked.append(tuple(size[2:]))
        return float("inf") if size[2] == 2 else 0.004

    monkeypatch.setattr(selftest, "_gradient_error", error)
    monkeypatch.setattr(selftest, "_candidates", lambda device: ["fp32", "bf16"])
    times = {("fp32", "contiguous"): 1.0, ("bf16", "contiguous"): 0.3}
    monkeypatch.setattr(selftest, "seconds_per_step", lambda n, s, d, options: {o: times[o] for o in options})
    assert choose(network, 1, (32, 32, 16), (16, 16, 16), cpu, "auto", "contiguous")[0] == "fp32"
    assert (2, 2, 1) in asked
    assert choose(network, 1, (48, 32, 16), (16, 16, 16), cpu, "auto", "contiguous")[0] == "bf16"
    with pytest.raises(ConfigError, match="bf16 computes wrong gradients on this processor, for convolutions on 2x2x1"):
        choose(network, 1, (32, 32, 16), (16, 16, 16), cpu, "bf16", "contiguous")


def test_a_right_gradient_passes_and_a_wrong_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, size, cpu = torch.nn.Conv3d(8, 8, 3, padding=1), torch.Size((1, 8, 6, 6, 6)), torch.device("cpu")
    assert selftest._gradient_error(layer, size, cpu) < 0.02
    forward = torch.nn.Conv3d.forward

    def broken(self: torch.nn.Conv3d, x: torch.Tensor) -> torch.Tensor:
        out = forward(self, x)
        return out * float("nan") if torch.is_autocast_enabled("cpu") else out

    monkeypatch.setattr(torch.nn.Conv3d, "forward", broken)
    assert selftest._gradient_error(layer, size, cpu) == float("inf")


def test_a_layer_with_lora_is_judged_by_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, size, cpu = torch.nn.Conv3d(8, 8, 3, padding=1), torch.Size((1, 8, 6, 6, 6)), torch.device("cpu")
    low_rank = LowRank(layer.weight, 2, torch.Generator().manual_seed(0))
    add_lora(layer, low_rank)
    assert selftest._gradient_error(layer, size, cpu) < 0.02
    forward = LowRank.forward

    def broken(self: LowRank, weight: torch.Tensor) -> torch.Tensor:
        found = forward(self, weight)
        return found + weight if torch.is_autocast_enabled("cpu") else found  # the gradient doubles

    monkeypatch.setattr(LowRank, "forward", broken)
    assert selftest._gradient_error(layer, size, cpu) > 0.5


def test_a_network_without_volumes_is_not_even_asked() -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("asked")

    network = torch.nn.Conv2d(1, 2, 3)
    network.register_forward_pre_hook(refuse)
    assert selftest.broken_in_bf16(network, 1, (8, 8, 8), torch.device("cpu")) is None


def test_this_machine_s_own_kernels_are_right_in_the_chosen_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast bf16 is: where the gradients of the deepest layer are not those of float32, it is not chosen."""
    monkeypatch.setattr(selftest, "_candidates", lambda device: ["fp32", "bf16"])
    times = {("fp32", "contiguous"): 1.0, ("bf16", "contiguous"): 0.3}
    monkeypatch.setattr(selftest, "seconds_per_step", lambda n, s, d, options: {o: times[o] for o in options})
    cpu = torch.device("cpu")
    for side in (32, 48):
        network = build_network("vnet", 1, 2, {"n_filters": 2})
        precision = choose(network, 1, (side, side, 16), (16, 16, 16), cpu, "auto", "contiguous")[0]
        size = torch.Size((1, 32, side // 16, side // 16, 1))
        error = selftest._gradient_error(torch.nn.Conv3d(32, 32, 3, padding=1), size, cpu)
        assert (precision == "bf16") == (error < 0.1)
