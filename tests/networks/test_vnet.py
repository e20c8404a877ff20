"""V-Net against the published implementation's numbers and its promises."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from scarceseg.errors import ConfigError
from scarceseg.networks.base import build_network
from scarceseg.networks.selftest import to_memory_format
from scarceseg.networks.vnet import VNet

CASES = ["vnet_f4_a", "vnet_f2_multiclass"]


def published(shared: Path, case: str) -> tuple[VNet, dict[str, np.ndarray]]:
    folder = shared / "conformance" / "vnet"
    description = json.loads((folder / f"{case}.json").read_text())
    config = description.get("config", description)
    network = VNet(config["n_channels"], config["n_classes"], n_filters=config["n_filters"])
    network.load_state_dict(load_file(folder / f"{case}_state.safetensors"), strict=True)
    with np.load(folder / f"{case}.npz") as arrays:
        return network, dict(arrays)


def tolerance(expected: np.ndarray) -> float:
    return 2e-4 * float(expected.std()) + 1e-5


@pytest.mark.parametrize("case", CASES)
def test_eval_logits_are_the_published_ones(shared: Path, case: str) -> None:
    network, arrays = published(shared, case)
    with torch.no_grad():
        logits = network.eval()(torch.from_numpy(arrays["x"])).numpy()
    expected = arrays["logits_eval"]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance(expected))


@pytest.mark.parametrize("case", CASES)
def test_training_logits_and_running_statistics_are_the_published_ones(shared: Path, case: str) -> None:
    network, arrays = published(shared, case)
    network.train()
    network.dropout.eval()
    with torch.no_grad():
        logits = network(torch.from_numpy(arrays["x"])).numpy()
    expected = arrays["logits_train_nodrop"]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance(expected))
    buffers = dict(network.named_buffers())
    after = load_file(shared / "conformance" / "vnet" / f"{case}_bn_after.safetensors")
    assert buffers.keys() == after.keys()
    for key, value in after.items():
        torch.testing.assert_close(buffers[key], value, rtol=1e-4, atol=1e-5)


def test_layout_is_the_published_one(shared: Path) -> None:
    layout = json.loads((shared / "conformance" / "vnet" / "layout_vnet_f16.json").read_text())
    with torch.device("meta"):
        network = build_network("vnet", 1, 2)
    state = network.state_dict()
    assert {k: list(v.shape) for k, v in state.items()} == {k: t["shape"] for k, t in layout["tensors"].items()}
    assert all(str(v.dtype) == f"torch.{layout['tensors'][k]['dtype']}" for k, v in state.items())
    assert len(state) == 205


def test_number_of_parameters() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in build_network("vnet", 1, 2).parameters()) == 9_448_866


def test_dropout_drops_whole_channels_at_its_two_places() -> None:
    network = VNet(1, 2, n_filters=4).train()
    dropped: list[torch.Tensor] = []
    network.dropout.register_forward_hook(lambda _module, _inputs, output: dropped.append(output))
    network(torch.randn(2, 1, 32, 32, 32))
    assert [tuple(x.shape[1:]) for x in dropped] == [(64, 2, 2, 2), (4, 32, 32, 32)]
    silent = (dropped[0].flatten(2) == 0).all(2).float().mean()
    assert 0.3 < silent < 0.75  # p = 0.5, and a few channels that ReLU silences
    dropped.clear()
    network.eval()
    x = torch.randn(1, 1, 16, 16, 16)
    assert torch.equal(network(x), network(x))


def test_no_dropout_when_switched_off() -> None:
    network = VNet(1, 2, n_filters=2, dropout=False).train()
    x = torch.randn(2, 1, 16, 16, 16)
    assert torch.equal(network(x), network(x))


@pytest.mark.parametrize(
    ("classes", "dropout", "p"), [(2, "auto", 0.5), (3, "auto", 0.0), (5, True, 0.5), (2, False, 0.0)]
)
def test_several_classes_are_learnt_without_dropout_unless_asked_for(
    classes: int, dropout: bool | str, p: float
) -> None:
    network = VNet(1, classes, n_filters=2, dropout=dropout)  # type: ignore[arg-type]
    assert network.dropout.p == p


def test_unknown_dropout_is_refused() -> None:
    with pytest.raises(ConfigError, match="dropout is true, false or auto, got 0.3"):
        build_network("vnet", 1, 2, {"dropout": 0.3})


@pytest.mark.parametrize(
    ("normalization", "layer"),
    [("batchnorm", nn.BatchNorm3d), ("instancenorm", nn.InstanceNorm3d), ("groupnorm", nn.GroupNorm)],
)
def test_normalization_is_the_one_asked_for(normalization: str, layer: type[nn.Module]) -> None:
    network = build_network("vnet", 1, 2, {"n_filters": 2, "normalization": normalization})
    assert sum(isinstance(m, layer) for m in network.modules()) == 29
    assert network(torch.randn(1, 1, 32, 16, 16)).shape == (1, 2, 32, 16, 16)


def test_none_has_no_normalization() -> None:
    network = build_network("vnet", 1, 2, {"n_filters": 2, "normalization": "none"})
    assert not any(isinstance(m, nn.BatchNorm3d | nn.InstanceNorm3d | nn.GroupNorm) for m in network.modules())
    assert network(torch.randn(1, 1, 16, 16, 16)).shape == (1, 2, 16, 16, 16)


@pytest.mark.parametrize("args", [{"normalization": "batch"}, {"n_filters": 0}, {"n_filters": 1.5}])
def test_bad_arguments_are_refused(args: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(args))):
        build_network("vnet", 1, 2, args)


def test_a_single_voxel_without_statistics_is_refused() -> None:
    image = torch.zeros(1, 1, 16, 16, 16)
    with pytest.raises(ConfigError, match="single voxel"):
        VNet(1, 2, n_filters=2).train()(image)
    with pytest.raises(ConfigError, match="single voxel"):
        VNet(1, 2, n_filters=2, normalization="instancenorm").eval()(image)
    VNet(1, 2, n_filters=2).eval()(image)


def test_channels_last_stays_channels_last() -> None:
    """A contiguous tensor in between would put normalisation and ReLU on their slow path."""
    layout = torch.channels_last_3d
    network = VNet(1, 2, n_filters=4).train()
    to_memory_format(network, "channels_last_3d")
    seen: dict[str, bool] = {}

    def watch(name: str) -> None:
        def forward(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
            seen[f"{name} forward"] = output.is_contiguous(memory_format=layout)
            output.register_hook(lambda g: seen.update({f"{name} backward": g.is_contiguous(memory_format=layout)}))

        network.get_submodule(name).register_forward_hook(forward)

    # On one thread PyTorch's own 1x1x1 convolution gives block_nine a contiguous gradient; at no measurable cost.
    encoder_and_decoder = [n for n, m in network.named_modules() if isinstance(m, nn.BatchNorm3d | nn.ReLU)]
    watched = [name for name in encoder_and_decoder if not name.startswith("block_nine")]
    for name in watched:
        watch(name)
    x = torch.randn(2, 1, 32, 32, 16).contiguous(memory_format=layout)
    network(x).softmax(1)[:, 1].square().mean().backward()
    assert len(seen) == 2 * len(watched)
    assert [name for name, kept in seen.items() if not kept] == []
