"""Names, arguments and sizes: what a user can get wrong is told in one message."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scarceseg.engine.run import train
from scarceseg.errors import ConfigError
from scarceseg.networks import NETWORKS, SegmentationNetwork, build_network, divisor_of
from scarceseg.networks.base import EncoderDecoder, channels_of, sides_of
from scarceseg.show import plan_dataset
from tests.tiny import tiny_config, tiny_dataset


def test_known_names() -> None:
    assert {"vnet", "unet3d"} <= set(NETWORKS.names())


@pytest.mark.parametrize(
    ("name", "near"), [("v-net", "'vnet'"), ("SegResnet", "'SegResNet'"), ("monai:Unet3", "'UNet'")]
)
def test_an_unknown_name_lists_near_ones(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match="unknown") as caught:
        build_network(name, 1, 2)
    assert near in str(caught.value)


def test_an_unknown_argument_lists_near_ones() -> None:
    with pytest.raises(ConfigError, match="did you mean 'n_filters'"):
        build_network("vnet", 1, 2, {"n_filter": 8})


@pytest.mark.parametrize("key", ["channels", "classes"])
def test_arguments_that_come_from_the_dataset_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        build_network("vnet", 1, 2, {key: 3})


@pytest.mark.parametrize(("channels", "classes"), [(0, 2), (1, 1)])
def test_too_few_channels_or_classes(channels: int, classes: int) -> None:
    with pytest.raises(ConfigError, match="2 classes"):
        build_network("vnet", channels, classes)


def test_a_shape_without_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match="5 axes"):
        build_network("vnet", 1, 2, {"n_filters": 1})(torch.zeros(1, 16, 16, 16))


def test_divisor_of_builds_nothing_and_leaves_the_random_state() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert divisor_of("vnet", {"n_filters": 16}) == (16, 16, 16)
    assert divisor_of("monai:UNet", {"channels": [4, 8, 8], "strides": [2, 2]}) == (4, 4, 4)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("name", "args"), [("vnet", {"n_filters": 2}), ("unet3d", {"feature_scale": 32})])
@pytest.mark.parametrize("channels", [1, 3])
def test_channels_of_both_halves_are_found_without_a_trace(name: str, args: dict[str, int], channels: int) -> None:
    network = build_network(name, channels, 2, args)
    assert isinstance(network, EncoderDecoder)
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    random = torch.get_rng_state()
    assert channels_of(network) == ([2, 4, 8, 16, 32], [2, 4, 8, 16])
    assert all(torch.equal(weights[key], value) for key, value in network.state_dict().items())
    assert torch.equal(random, torch.get_rng_state()) and all(part.training for part in network.modules())


def test_own_networks_may_read_values_and_need_the_channels_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(channels: int, classes: int) -> SegmentationNetwork:
        assert (channels, classes) == (2, 3)
        rates = [rate.item() for rate in torch.linspace(0, 0.1, 3)]  # what the meta device cannot do
        return build_network("vnet", channels, classes, {"n_filters": len(rates)})

    monkeypatch.setitem(NETWORKS._parts, "own", build)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert sides_of("own", None, 2, 3).divisor == (16, 16, 16)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_asks_a_network_with_its_own_channels_and_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()

    def build(channels: int, classes: int) -> SegmentationNetwork:
        seen.add((channels, classes))
        return build_network("vnet", channels, classes, {"n_filters": 1})

    monkeypatch.setitem(NETWORKS._parts, "own", build)
    data = tiny_dataset(tmp_path / "data", classes=3, channels=2)
    config = tiny_config(data, method="supervised", iterations=1, network={"name": "own"})
    plan_dataset(config)
    train(config, tmp_path / "run")
    assert seen == {(2, 3)}
