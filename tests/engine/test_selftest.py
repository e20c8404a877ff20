"""The choice of precision and memory format."""

from __future__ import annotations

import pytest
import torch

from scarceseg.engine import selftest
from scarceseg.engine.selftest import choose
from scarceseg.networks import build_network


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
    chosen = choose(network, 1, (32, 32, 16), (16, 16, 16), torch.device("cpu"), "bf16", "contiguous")
    assert chosen == ("bf16", "contiguous", {})
