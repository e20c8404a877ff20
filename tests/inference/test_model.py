"""The two files of a trained network: a round trip, and what is said when they are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scarceseg.config import NetworkConfig
from scarceseg.errors import RunError
from scarceseg.inference.model import load_model, save_model
from scarceseg.networks import build_network
from scarceseg.networks.selftest import to_memory_format
from tests.inference.scans import plan


def saved(folder: Path, name: str = "vnet", args: dict[str, Any] | None = None, **extra: Any) -> torch.nn.Module:
    config = NetworkConfig(name=name, args={"n_filters": 1} if args is None else args)
    network = build_network(config.name, 1, 2, config.args)
    save_model(folder, network, config, plan(), extra)
    return network


@pytest.mark.parametrize(
    ("name", "args"),
    [("vnet", {"n_filters": 1}), ("DynUNet", {"filters": [4, 4, 4, 4, 4]})],  # DynUNet holds the same layers twice
)
def test_what_is_saved_is_loaded(tmp_path: Path, name: str, args: dict[str, Any]) -> None:
    network = saved(tmp_path, name, args, iterations=7).eval()
    loaded, its_plan, info = load_model(tmp_path)
    x = torch.randn(1, 1, 32, 16, 16)
    with torch.no_grad():
        assert torch.equal(network(x), loaded(x))
    assert its_plan == plan()
    assert not loaded.training
    assert (info.channels, info.classes, info.training) == (("MR",), ("background", "ball"), {"iterations": 7})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


def test_the_description_itself_may_be_named(tmp_path: Path) -> None:
    saved(tmp_path)
    assert load_model(tmp_path / "model.json")[1] == plan()


def test_hints_of_the_training_are_kept(tmp_path: Path) -> None:
    network = build_network("vnet", 1, 2, {"n_filters": 2})
    to_memory_format(network, "channels_last_3d")
    save_model(tmp_path, network, NetworkConfig(args={"n_filters": 2}), plan(), {"precision": "bf16"})
    _, _, info = load_model(tmp_path)
    assert (info.memory_format, info.precision, info.device) == ("channels_last_3d", "bf16", "cpu")


def test_a_run_without_model_says_why(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no run folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"holds no model\.json"):
        load_model(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(RunError, match="resume it"):
        load_model(tmp_path)


def test_missing_and_damaged_weights(tmp_path: Path) -> None:
    saved(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(RunError, match="damaged or cut short"):
        load_model(tmp_path)
    weights.unlink()
    with pytest.raises(RunError, match=r"no model\.safetensors"):
        load_model(tmp_path)


@pytest.mark.parametrize("args", [{"n_filters": 2}, {"n_filters": 1, "normalization": "none"}])
def test_weights_of_another_network_do_not_fit(tmp_path: Path, args: dict[str, Any]) -> None:
    saved(tmp_path)
    description = json.loads((tmp_path / "model.json").read_text())
    description["network"]["args"] = args
    (tmp_path / "model.json").write_text(json.dumps(description))
    with pytest.raises(RunError, match="do not fit the network 'vnet'") as caught:
        load_model(tmp_path)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot read"),
        ("[]", "cannot read"),
        ('{"format": 99}', "update scarceseg"),
        ('{"format": 1}', "not a model description"),
    ],
)
def test_a_wrong_description(tmp_path: Path, content: str, words: str) -> None:
    saved(tmp_path)
    (tmp_path / "model.json").write_text(content)
    with pytest.raises(RunError, match=words):
        load_model(tmp_path)


def test_an_unknown_network_is_told(tmp_path: Path) -> None:
    saved(tmp_path)
    text = (tmp_path / "model.json").read_text().replace('"vnet"', '"v-net"')
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(RunError, match=r"cannot be built here.*did you mean 'vnet'"):
        load_model(tmp_path)
