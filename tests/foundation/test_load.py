"""Files are told by their tensors, checked against whole layouts, and become models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SamConfig, SamModel

from scarceseg.errors import ConfigError, DataError
from scarceseg.foundation import FOUNDATIONS
from scarceseg.foundation.base import Promptable
from scarceseg.foundation.catalogue import CATALOGUE
from scarceseg.foundation.identify import check, identify, kind_of
from scarceseg.foundation.layouts import layout
from scarceseg.foundation.load import load_foundation
from scarceseg.foundation.sam_keys import to_official
from scarceseg.foundation.sam_med3d_net import SamMed3DConfig, SamMed3DNet
from scarceseg.foundation.tiny_sam3d_net import TinySam3DConfig, TinySam3DNet
from tests.inference.scans import save_threshold

State = dict[str, torch.Tensor]
VISION = {
    "hidden_size": 16, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64,
    "patch_size": 16, "window_size": 3, "global_attn_indexes": [1], "num_pos_feats": 8, "mlp_dim": 32,
}  # fmt: skip
PROMPT = {"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 8}
DECODER = {"hidden_size": 16, "mlp_dim": 32, "iou_head_hidden_dim": 16}
MED3D = SamMed3DConfig(
    img_size=32, embed_dim=24, depth=2, num_heads=2, mlp_dim=48, window_size=1, global_attn_indexes=(0,),
    prompt_embed_dim=48, iou_hidden_dim=16, decoder_mlp_dim=32,
)  # fmt: skip
TINY3D = TinySam3DConfig(full=2, widths=(4, 4, 4, 4), head=(4, 4, 4), similarities=1, similarity_width=2, norm=2)


def sam_state() -> State:
    config = SamConfig(vision_config=VISION, prompt_encoder_config=PROMPT, mask_decoder_config=DECODER)
    torch.manual_seed(0)
    return {name: tensor.clone().contiguous() for name, tensor in SamModel(config).state_dict().items()}


def lora_state() -> State:
    decoder = {k: v for k, v in to_official(sam_state()).items() if k.startswith(("prompt_encoder.", "mask_decoder."))}
    for index in range(4):
        decoder |= {f"w_a_{index:03d}": torch.zeros(3, 16), f"w_b_{index:03d}": torch.zeros(16, 3)}
    return decoder


def write_folder(folder: Path, model_type: str = "sam") -> Path:
    folder.mkdir()
    config = {"model_type": model_type, "vision_config": VISION, "prompt_encoder_config": PROMPT}
    (folder / "config.json").write_text(json.dumps(config | {"mask_decoder_config": DECODER}))
    save_file(sam_state(), folder / "model.safetensors")
    return folder


def write(path: Path, state: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    if path.suffix == ".safetensors":
        save_file(dict(state), path, metadata)
    else:
        torch.save({"model_state_dict": dict(state), "epoch": 1}, path)
    return path


def made(folder: Path, kind: str) -> Path:
    """A complete small file or folder of each kind."""
    if kind == "sam-official":
        return write(folder / "sam.pth", to_official(sam_state()))
    if kind == "sam-hf":
        return write_folder(folder / "hf")
    if kind == "sam-med3d":
        return write(folder / "med3d.pth", SamMed3DNet(MED3D).state_dict())
    if kind == "sam-lora":
        return write(folder / "lora.pth", lora_state())
    if kind == "sam-tuned":
        decoder = {name: tensor for name, tensor in lora_state().items() if not name.startswith("w_")}
        return write(folder / "decoder.safetensors", decoder)
    if kind == "tiny-sam":
        return write(folder / "tiny.safetensors", sam_state(), {"kind": "tiny-sam"})
    if kind == "tiny-sam3d":
        facts = {"kind": "tiny-sam3d", "config": json.dumps(TINY3D.to_dict())}
        return write(folder / "tiny3d.safetensors", TinySam3DNet(TINY3D).state_dict(), facts)
    return write(folder / "other.pth", {"features.0.weight": torch.zeros(3, 3)})


KINDS = ["sam-official", "sam-hf", "sam-med3d", "sam-lora", "sam-tuned", "tiny-sam", "tiny-sam3d"]


@pytest.mark.parametrize("kind", KINDS)
def test_complete_files_are_told_and_fit(kind: str, tmp_path: Path) -> None:
    path = made(tmp_path, kind)
    assert identify(path) == kind
    report = check(path)
    assert report.ok and report.kind == kind and "all names and shapes fit" in report.text, report.text
    assert report.sizes["tensors"] > 10


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_that_does_not_fit_is_named(kind: str, tmp_path: Path) -> None:
    path = made(tmp_path, kind)
    file = path / "model.safetensors" if path.is_dir() else path
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        state = load_file(file)
    else:
        metadata, state = None, torch.load(file, weights_only=True)["model_state_dict"]
    # One of the names that tell no size; 1D ones are as good as any.
    gone = sorted(name for name in state if "norm" in name or name.endswith("bias"))[-1]
    bent = sorted(name for name in state if name.endswith("bias") and name != gone)[0]
    state = {name: tensor for name, tensor in state.items() if name != gone}
    state |= {"head.extra.weight": torch.zeros(2), bent: torch.zeros(7, 5)}
    write(file, state, metadata)
    report = check(path)
    assert not report.ok and report.kind == kind and report.problem is None
    assert report.missing == (gone,) and report.unexpected == ("head.extra.weight",)
    assert len(report.reshaped) == 1 and report.reshaped[0].startswith(f"{bent}: expected [")
    for part in (f"1 missing:\n    {gone}", "1 unexpected:\n    head.extra.weight", f"1 other shape:\n    {bent}"):
        assert part in report.text


def test_unknown_and_broken_files(tmp_path: Path) -> None:
    report = check(made(tmp_path, "unknown"))
    assert identify(report.path) == "unknown" and not report.ok and "features.0.weight" in report.text
    for path, problem in ((tmp_path / "none.pth", "there is no file or folder"), (tmp_path, "expected a folder with")):
        for call in (identify, check):
            with pytest.raises(DataError, match=problem):
                call(path)
    other = write_folder(tmp_path / "other", "clip")
    assert "expected model_type 'sam', got 'clip'" in check(other).text and not check(other).ok
    (other / "config.json").unlink()
    assert "config.json is missing or damaged" in check(other).text
    lost = {name: tensor for name, tensor in to_official(sam_state()).items() if "pos_embed" not in name}
    report = check(write(tmp_path / "lost.pth", lost))
    assert not report.ok and report.problem and "pos_embed is missing" in report.text


@pytest.mark.parametrize("content", [b"Repository not found", b".", b"\x80", b"K", b"X\xff", b"J\x01", b""])
def test_a_page_in_place_of_weights_is_one_message(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "weights.pth").write_bytes(content)
    for call in (identify, check, load_foundation):
        with pytest.raises(DataError, match=r"weights\.pth"):
            call(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("tiny-sam", "{oops"),
        ("tiny-sam", '{"vision_config": {"hidden_size": "x"}}'),
        ("tiny-sam3d", '{"widths": [1, 2]}'),
        ("tiny-sam3d", '{"norm": 0}'),
    ],
)
def test_our_own_file_with_a_damaged_description_is_told(tmp_path: Path, kind: str, config: str) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "own.safetensors", metadata={"kind": kind, "config": config})
    report = check(tmp_path / "own.safetensors")
    assert report.kind == kind and not report.ok and report.problem
    with pytest.raises(DataError):
        load_foundation(tmp_path / "own.safetensors")


def test_what_tuning_a_volumetric_model_leaves_is_no_sam() -> None:
    encoder = {
        "image_encoder.blocks.0.attn.qkv.lora.q.a": torch.zeros(4, 8),
        "mask_decoder.iou_token.weight": torch.zeros(1, 8),
    }
    assert kind_of(encoder, {}) == "unknown"
    assert kind_of({"mask_decoder.output_upscaling.0.weight": torch.zeros(8, 2, 2, 2, 2)}, {}) == "unknown"


def test_pickled_hugging_face_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert identify(folder) == "sam-hf" and check(folder).ok
    # The Fourier matrix stands twice in the model; a file may hold it once.
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    del state["prompt_encoder.shared_embedding.positional_embedding"]
    torch.save(state, folder / "pytorch_model.bin")
    assert check(folder).ok
    del state["shared_image_embedding.positional_embedding"]
    torch.save(state, folder / "pytorch_model.bin")
    assert not check(folder).ok


def test_student_of_a_run(tmp_path: Path) -> None:
    from scarceseg.config import NetworkConfig
    from scarceseg.inference.model import save_model
    from scarceseg.networks import build_network
    from tests.inference.scans import plan

    args = {"n_filters": 1}
    network = build_network("vnet", 1, 2, args)
    save_model(tmp_path / "run", network, NetworkConfig(name="vnet", args=args), plan())
    for path in (tmp_path / "run", tmp_path / "run" / "model.safetensors"):
        report = check(path)
        assert identify(path) == report.kind == "student" and report.ok, report.text
        assert report.sizes["network"] == "vnet"
    state = load_file(tmp_path / "run" / "model.safetensors")
    del state["out_conv.bias"]
    save_file(state, tmp_path / "run" / "model.safetensors")
    assert check(tmp_path / "run").missing == ("out_conv.bias",)
    with pytest.raises(
        ConfigError, match="no foundation model but network trained by a run; use it with 'scarceseg predict'"
    ):
        load_foundation(tmp_path / "run")


def test_run_whose_network_cannot_be_built(tmp_path: Path) -> None:
    report = check(save_threshold(tmp_path / "run"))
    assert report.kind == "student" and not report.ok and "'threshold'" in report.text


PUBLISHED = {
    "sam2d/layout_sam_vit_b": "sam-official",
    "sam2d_lora/layout_lora_file_vit_b_c1": "sam-lora",
    "sam2d_lora/layout_lora_file_vit_b_c3": "sam-lora",
    "sammed3d/layout_sammed3d_vit_b_ori": "sam-med3d",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layouts(shared: Path, name: str) -> None:
    facts = json.loads((shared / "conformance" / f"{name}.json").read_text(encoding="utf-8"))
    published = {key: tuple(value["shape"]) for key, value in facts["tensors"].items()}
    state = {key: torch.empty(shape, device="meta") for key, shape in published.items()}
    kind = kind_of(state, {})
    assert kind == PUBLISHED[name]
    expected, _ = layout(kind, state, {})
    assert {key: tuple(tensor.shape) for key, tensor in expected.items()} == published
    # A file cut down to its encoder's first block is still compared with the whole published model.
    if kind != "sam-lora":
        cut = {key: tensor for key, tensor in state.items() if key.startswith("image_encoder.blocks.0.")}
        fallback, _ = layout(kind, cut, {})
        assert {key: tuple(tensor.shape) for key, tensor in fallback.items()} == published


def test_every_name_of_the_catalogue_that_is_downloaded_is_registered() -> None:
    names = FOUNDATIONS.names()
    assert {name for name, entry in CATALOGUE.items() if not entry.packaged} <= set(names)
    for name, entry in CATALOGUE.items():
        if not entry.packaged:
            with pytest.raises(DataError, match="not on this machine"):
                load_foundation(name)


@pytest.mark.parametrize("kind", ["sam-official", "sam-hf", "sam-med3d"])
def test_files_become_models(kind: str, tmp_path: Path) -> None:
    path = made(tmp_path, kind)
    model = load_foundation(path)
    assert isinstance(model, Promptable) and model.name == path.name
    with pytest.raises(ConfigError, match=r"has no option 'colour': its options are .*"):
        load_foundation(path, colour="red")


def test_names_find_the_cache_and_take_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCARCESEG_CACHE", str(tmp_path))
    (tmp_path / "weights").mkdir()
    made(tmp_path, "sam-med3d").rename(tmp_path / "weights" / "sam_med3d.pth")
    model: Any = load_foundation("sam-med3d", fit="crop")
    assert model.name == "sam-med3d" and model.fit == "crop"
    assert not any(parameter.requires_grad for parameter in model.network.parameters())


def test_our_own_files_go_to_their_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FOUNDATIONS.names()
    seen: list[dict[str, Any]] = []

    def builder(path: Path | None = None, width: int = 1) -> Any:
        seen.append({"path": path, "width": width})
        return object()

    monkeypatch.setattr(FOUNDATIONS, "_parts", {**FOUNDATIONS._parts, "tiny-sam3d": builder})
    path = made(tmp_path, "tiny-sam3d")
    load_foundation(path, width=2)
    load_foundation("tiny-sam3d")
    assert seen == [{"path": path, "width": 2}, {"path": None, "width": 1}]
    with pytest.raises(ConfigError, match="'tiny-sam3d' has no option 'depth': its options are width"):
        load_foundation("tiny-sam3d", depth=2)


@pytest.mark.parametrize("kind", ["sam-lora", "sam-tuned", "unknown"])
def test_what_is_no_whole_model_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no foundation model but"):
        load_foundation(made(tmp_path, kind))


def test_neither_name_nor_file() -> None:
    with pytest.raises(
        ConfigError, match=r"'sam-vit-c' is neither a foundation model nor a file .*: did you mean .*'sam-vit-b'"
    ):
        load_foundation("sam-vit-c")
