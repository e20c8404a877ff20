"""MONAI's networks by name: arguments, divisors, outputs."""

from __future__ import annotations

import pytest
import torch

from scarceseg.errors import ConfigError
from scarceseg.networks.base import build_network, divisor_of
from scarceseg.networks.monai_net import MonaiNetwork

SMALL_UNET = {"channels": [4, 8, 8], "strides": [2, 2], "num_res_units": 0}


@pytest.mark.parametrize("name", ["UNet", "monai:UNet"])
def test_a_name_works_with_and_without_prefix(name: str) -> None:
    network = build_network(name, 2, 3, SMALL_UNET)
    assert network(torch.randn(1, 2, 16, 12, 8)).shape == (1, 3, 16, 12, 8)


def test_the_prefix_tells_two_networks_of_one_name_apart() -> None:
    assert isinstance(build_network("monai:VNet", 1, 2), MonaiNetwork)
    assert not isinstance(build_network("vnet", 1, 2, {"n_filters": 1}), MonaiNetwork)


def test_the_divisor_follows_the_arguments_axis_by_axis() -> None:
    flat = {
        "kernel_size": [3, 3, 3],
        "strides": [1, [2, 2, 1], 2],
        "upsample_kernel_size": [[2, 2, 1], 2],
        "filters": [4, 8, 8],
    }
    network = build_network("DynUNet", 1, 2, flat)
    assert network.divisor == (4, 4, 2)
    assert network.eval()(torch.randn(1, 1, 12, 8, 6)).shape == (1, 2, 12, 8, 6)
    with pytest.raises(ConfigError, match="pad the patch to 12x8x8"):
        network(torch.randn(1, 1, 11, 8, 7))


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("SegResNet", {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]}, (2, 2, 2)),
        ("BasicUNet", {"features": [4, 4, 4, 4, 4, 4]}, (16, 16, 16)),
        ("HighResNet", {}, (1, 1, 1)),
    ],
)
def test_divisor_is_found_by_trial(name: str, args: dict[str, object], expected: tuple[int, int, int]) -> None:
    assert divisor_of(name, args) == expected


def test_a_given_divisor_is_taken() -> None:
    assert divisor_of("UNet", SMALL_UNET | {"divisor": 8}) == (8, 8, 8)
    assert divisor_of("UNet", SMALL_UNET | {"divisor": [8, 8, 4]}) == (8, 8, 4)
    for bad in (0, [4, 4], "four"):
        with pytest.raises(ConfigError, match="divisor"):
            build_network("UNet", 1, 2, SMALL_UNET | {"divisor": bad})


def test_a_network_of_fixed_size_takes_no_other() -> None:
    args = {"input_image_size": [16, 16, 8], "init_filters": 8, "blocks_down": [1, 1, 1], "blocks_up": [1, 1]}
    network = build_network("SegResNetVAE", 1, 2, args)
    assert network.divisor == (16, 16, 8)
    assert network(torch.randn(1, 1, 16, 16, 8)).shape == (1, 2, 16, 16, 8)  # the first of two outputs
    with pytest.raises(ConfigError, match="built for patches of"):
        network(torch.randn(1, 1, 32, 16, 8))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"chanels": [4, 8]}, "did you mean 'channels'"),
        ({"in_channels": 2}, "set from the dataset"),
        ({"channels": [4], "strides": []}, "cannot build UNet"),
    ],
)
def test_bad_arguments_are_told(args: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_network("UNet", 1, 2, args)


def test_deep_supervision_is_refused() -> None:
    with pytest.raises(ConfigError, match="deep_supervision"):
        build_network("DynUNet", 1, 2, {"deep_supervision": True})


def test_a_classifier_is_refused_when_it_is_built() -> None:
    with pytest.raises(ConfigError, match="does not serve as a segmentation network"):
        build_network("DenseNet121", 1, 2, {"init_features": 4, "growth_rate": 2, "block_config": [1, 1]})
