"""3D U-Net against the published implementation's numbers and its promises."""

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
from scarceseg.networks.unet3d import UNet3D


def test_eval_logits_are_the_published_ones(shared: Path) -> None:
    folder = shared / "conformance" / "unet3d"
    network = UNet3D(1, 2, feature_scale=32)
    network.load_state_dict(load_file(folder / "unet3d_fs32_state.safetensors"), strict=True)
    with np.load(folder / "unet3d_fs32.npz") as arrays, torch.no_grad():
        logits = network.eval()(torch.from_numpy(arrays["x"])).numpy()
        expected = arrays["logits_eval"]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-4 * float(expected.std()) + 1e-5)


def test_layout_is_the_published_one(shared: Path) -> None:
    layout = json.loads((shared / "conformance" / "unet3d" / "layout_unet3d_fs4.json").read_text())
    with torch.device("meta"):
        state = build_network("unet3d", 1, 2).state_dict()
    assert {k: list(v.shape) for k, v in state.items()} == {k: t["shape"] for k, t in layout["tensors"].items()}
    assert sum(v.numel() for v in state.values()) == 5_884_050


def test_default_is_instance_norm_and_batch_norm_means_batch_norm() -> None:
    default = build_network("unet3d", 1, 2, {"feature_scale": 32})
    batch = build_network("unet3d", 1, 2, {"feature_scale": 32, "normalization": "batchnorm"})
    assert sum(isinstance(m, nn.InstanceNorm3d) for m in default.modules()) == 18
    assert sum(isinstance(m, nn.BatchNorm3d) for m in batch.modules()) == 18
    x = torch.randn(2, 1, 32, 16, 16)
    exact = (
        default.double().eval()
    )  # two voxels at the bottleneck: instance norm magnifies the rounding of single precision
    alone = torch.cat([exact(x[:1].double()), exact(x[1:].double())])
    torch.testing.assert_close(exact(x.double()), alone)  # no cross-talk between the rows of a batch
    batch(x)
    assert batch.get_buffer("conv1.conv1.1.running_mean").abs().sum() > 0


def test_dropout_is_element_wise_at_its_two_places() -> None:
    network = UNet3D(1, 2, feature_scale=16).train()
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []

    def keep(_module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        inputs.append(args[0])
        outputs.append(output)

    network.dropout.register_forward_hook(keep)
    network(torch.randn(1, 1, 32, 32, 32))
    assert [tuple(x.shape[1:]) for x in outputs] == [(64, 2, 2, 2), (4, 32, 32, 32)]
    alive = inputs[1] != 0
    share = (outputs[1][alive] == 0).float().mean()
    assert 0.28 < share < 0.32
    assert not (outputs[1] == 0).flatten(2).all(2).any()


@pytest.mark.parametrize("args", [{"feature_scale": 0}, {"feature_scale": 65}, {"normalization": "group"}])
def test_bad_arguments_are_refused(args: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(args))):
        build_network("unet3d", 1, 2, args)


def test_a_single_voxel_without_statistics_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one side of 32"):
        UNet3D(1, 2, feature_scale=32)(torch.zeros(1, 1, 16, 16, 16))
