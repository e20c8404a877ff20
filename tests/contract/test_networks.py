"""What every network promises. A new file in the networks folder is picked up by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_model, save_model

from scarceseg.errors import ConfigError
from scarceseg.networks import NETWORKS, EncoderDecoder, SegmentationNetwork, build_network, divisor_of
from scarceseg.networks.selftest import to_memory_format

# Arguments that keep a network small here. A network without an entry is tested as it comes.
SMALL: dict[str, dict[str, Any]] = {"vnet": {"n_filters": 2}, "unet3d": {"feature_scale": 32}}
MONAI: dict[str, dict[str, Any]] = {
    "AttentionUnet": {"channels": [4, 8, 8], "strides": [2, 2]},
    "BasicUNet": {"features": [4, 4, 8, 8, 8, 4]},
    "DynUNet": {"filters": [4, 8, 8, 8, 8]},
    "SegResNet": {"init_filters": 8, "blocks_down": [1, 1, 1], "blocks_up": [1, 1]},
    "UNet": {"channels": [4, 8, 8], "strides": [2, 2]},
}
ALL = [*NETWORKS.names(), *MONAI]


def build(name: str, channels: int = 1, classes: int = 2) -> SegmentationNetwork:
    torch.manual_seed(0)
    return build_network(name, channels, classes, {**SMALL, **MONAI}.get(name))


def patch_of(network: SegmentationNetwork) -> tuple[int, int, int]:
    x, y, z = network.divisor
    return 2 * x, y, z


@pytest.mark.parametrize("name", ALL)
def test_one_logit_per_class_and_voxel_for_any_channels_and_classes(name: str) -> None:
    for channels, classes, batch in ((1, 2, 2), (3, 5, 1)):
        network = build(name, channels, classes).eval()
        size = patch_of(network)
        with torch.no_grad():
            logits = network(torch.randn(batch, channels, *size))
        assert logits.shape == (batch, classes, *size)
        assert logits.dtype == torch.float32
        assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", ALL)
def test_divisor_is_known_without_building(name: str) -> None:
    assert divisor_of(name, {**SMALL, **MONAI}.get(name)) == build(name).divisor


@pytest.mark.parametrize("name", ALL)
def test_an_odd_size_is_refused_with_the_size_to_pad_to(name: str) -> None:
    network = build(name)
    fitting = patch_of(network)
    if max(network.divisor) == 1:
        pytest.skip("takes every size")
    odd = tuple(side - 1 for side in fitting)
    with pytest.raises(ConfigError) as caught:
        network(torch.zeros(1, 1, *odd))
    assert f"pad the patch to {'x'.join(map(str, fitting))}" in str(caught.value)


@pytest.mark.parametrize("name", ALL)
def test_gradient_reaches_every_parameter(name: str) -> None:
    network = build(name, classes=3).train()
    logits = network(torch.randn(2, 1, *patch_of(network)))
    (logits * torch.randn_like(logits)).sum().backward()
    missing = [key for key, p in network.named_parameters() if p.grad is None]
    assert missing == []
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ALL)
def test_a_saved_network_is_the_same_after_loading(name: str, tmp_path: Path) -> None:
    network = build(name).train()
    x = torch.randn(2, 1, *patch_of(network))
    with torch.no_grad():
        network(x)  # moves running statistics, where there are any
    save_model(network, str(tmp_path / "model.safetensors"))
    torch.manual_seed(1)
    other = build_network(name, 1, 2, {**SMALL, **MONAI}.get(name))
    load_model(other, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(network.eval()(x), other.eval()(x))


@pytest.mark.parametrize("name", ALL)
def test_memory_format_does_not_change_the_result(name: str) -> None:
    network = build(name).eval()
    x = torch.randn(2, 1, *patch_of(network))
    with torch.no_grad():
        expected = network(x)
        changed = to_memory_format(network, "channels_last_3d")(x.contiguous(memory_format=torch.channels_last_3d))
    torch.testing.assert_close(changed, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_rows_of_a_batch_do_not_influence_each_other_in_evaluation(name: str) -> None:
    network = build(name).eval()
    x = torch.randn(2, 1, *patch_of(network))
    with torch.no_grad():
        together, alone = network(x), torch.cat([network(x[:1]), network(x[1:])])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_seed_decides_the_weights(name: str) -> None:
    one, same = build(name), build(name)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))


@pytest.mark.parametrize("name", ALL)
def test_halves_of_an_encoder_decoder_make_the_whole(name: str) -> None:
    network = build(name).eval()
    if not isinstance(network, EncoderDecoder):
        pytest.skip("has no features to show")
    x = torch.randn(1, 1, *patch_of(network))
    with torch.no_grad():
        features = network.encode(x)
        assert torch.equal(network.decode(features), network(x))
    sizes = [feature.shape[2:].numel() for feature in features]
    assert features[0].shape[2:] == x.shape[2:]
    assert sizes == sorted(sizes, reverse=True)
