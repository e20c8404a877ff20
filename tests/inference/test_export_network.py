"""TorchScript and ONNX: what is read back from the file gives the logits of the network it was made from."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scarceseg.config import NetworkConfig
from scarceseg.errors import ConfigError, RunError
from scarceseg.inference import export_network
from scarceseg.inference.export_model import export_model
from scarceseg.inference.export_network import Exported, to_onnx, to_torchscript
from scarceseg.inference.model import ModelInfo, save_model
from scarceseg.networks import SegmentationNetwork, build_network
from tests.inference.scans import plan

NETWORKS: dict[str, dict[str, Any]] = {
    "vnet": {"n_filters": 1},
    "unet3d": {"feature_scale": 32},
    "SegResNet": {"init_filters": 8, "blocks_down": (1, 1), "blocks_up": (1,)},
}
PATCH = (32, 32, 16)
SIZES = [(3, 16, 32, 48), (1, 48, 16, 32)]
"""Batch and sides; neither is what the exporter tries."""

Forward = Callable[[torch.Tensor], torch.Tensor]


def network_and_info(name: str, channels: int = 2) -> tuple[SegmentationNetwork, ModelInfo]:
    torch.manual_seed(1)
    network = build_network(name, channels, 3, NETWORKS[name]).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm3d):  # as after some training
            module.running_mean = torch.randn(module.num_features) / 10
            module.running_var = torch.rand(module.num_features) + 0.5
    return network, describe(name, channels)


def describe(name: str, channels: int = 2) -> ModelInfo:
    made = plan(channels, 3, spacing=1.5).model_copy(update={"patch": PATCH})
    config = NetworkConfig(name=name, args=NETWORKS.get(name, {}))
    return ModelInfo(network=config, channels=made.channels, classes=made.classes, plan=made)


def run_script(content: bytes) -> tuple[Forward, dict[str, Any]]:
    extra = {"scarceseg.json": ""}
    return torch.jit.load(io.BytesIO(content), _extra_files=extra), json.loads(extra["scarceseg.json"])


def run_graph(content: bytes) -> tuple[Forward, dict[str, Any]]:
    runtime = pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    facts = json.loads(session.get_modelmeta().custom_metadata_map["scarceseg"])
    return lambda image: torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0]), facts


def onnx_here() -> None:
    pytest.importorskip("onnxscript", reason="the extra 'export' is not installed")


def same_logits(network: SegmentationNetwork, forward: Forward, tolerance: float) -> None:
    for batch, *sides in SIZES:
        image = torch.randn(batch, 2, *sides)
        with torch.no_grad():
            expected = network(image)
            found = forward(image)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))
        assert float(expected.std()) > 100 * tolerance * float(expected.abs().max())  # else everything would pass


@pytest.mark.parametrize("name", NETWORKS)
def test_torchscript_gives_the_same_logits_at_any_size(name: str) -> None:
    network, info = network_and_info(name)
    network.train()  # the file has to be in evaluation mode all the same
    exported = to_torchscript(network, info)
    assert network.training
    forward, facts = run_script(exported.content)
    same_logits(network.eval(), forward, 1e-6)
    assert (facts["any_size"], facts["divisor"]) == (True, list(network.divisor))
    assert (facts["channels"], facts["classes"]) == (list(info.channels), list(info.classes))
    assert facts["patch"] == list(PATCH) and facts["plan"]["spacing_mm"] == [1.5, 1.5, 1.5]


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_gives_the_same_logits_at_any_size(name: str) -> None:
    onnx_here()
    network, info = network_and_info(name)
    forward, facts = run_graph(to_onnx(network, info).content)
    same_logits(network, forward, 1e-4)
    assert facts["any_size"] and facts["divisor"] == list(network.divisor) and facts["difference"] < 1e-4


class Positional(SegmentationNetwork):
    """Has the size of its input built in: it adds a number that depends on the voxel's place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv3d(2, 3, 1)

    @property
    def divisor(self) -> tuple[int, int, int]:
        return (16, 16, 16)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        places = torch.arange(int(image[0, 0].numel()), dtype=image.dtype).reshape([int(n) for n in image.shape[2:]])
        return self.layer(image) + places / places.numel()


@pytest.mark.parametrize(("make", "run"), [(to_torchscript, run_script), (to_onnx, run_graph)])
def test_a_network_with_a_size_of_its_own_is_exported_for_the_patch_alone(
    make: Callable[..., Exported], run: Callable[[bytes], tuple[Forward, dict[str, Any]]]
) -> None:
    if make is to_onnx:
        onnx_here()
    network = Positional().eval()
    forward, facts = run(make(network, describe("positional")).content)
    assert (facts["any_size"], facts["patch"]) == (False, list(PATCH))
    image = torch.randn(5, 2, *PATCH)
    with torch.no_grad():
        torch.testing.assert_close(forward(image), network(image), rtol=0, atol=1e-5)


def test_a_file_that_gives_other_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network, info = network_and_info("vnet")
    other = build_network("vnet", 2, 3, NETWORKS["vnet"]).eval()
    trace = torch.jit.trace
    monkeypatch.setattr(export_network.torch.jit, "trace", lambda _net, example, **_: trace(other, example))
    with pytest.raises(RunError, match=r"cannot be exported to TorchScript: its logits differ"):
        to_torchscript(network, info)


def test_a_network_no_exporter_takes_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such operator\nand a long stack")

    monkeypatch.setattr(export_network.torch.jit, "trace", fail)
    with pytest.raises(RunError) as caught:
        to_torchscript(*network_and_info("vnet"))
    assert "no such operator" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_names_the_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"{package}.*\.\[export\]"):
        to_onnx(*network_and_info("vnet"))


@pytest.mark.parametrize(
    ("out", "to", "words"),
    [
        ("x.onnx", "onx", "did you mean 'onnx'"),
        ("x.pb", "torchscript", r"ends in \.ts or \.pt"),
        ("x.ts", "bundle", "--to torchscript"),
        ("taken", "bundle", "exists already"),
        ("taken/inside.ts", "torchscript", "exists already"),
    ],
)
def test_what_cannot_be_written_is_told_before_the_work(tmp_path: Path, out: str, to: str, words: str) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "inside.ts").write_text("mine")
    network, info = network_and_info("vnet")
    save_model(tmp_path / "run", network, info.network, info.plan)
    with pytest.raises((RunError, ConfigError), match=words):
        export_model(tmp_path / "run", tmp_path / out, to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "taken"]
    assert (tmp_path / "taken" / "inside.ts").read_text() == "mine"


def test_a_failed_bundle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, info = network_and_info("vnet")
    save_model(tmp_path / "run", network, info.network, info.plan)
    monkeypatch.setattr(export_network, "TOLERANCE", -1.0)
    with pytest.raises(RunError, match="its logits differ"):
        export_model(tmp_path / "run", tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
