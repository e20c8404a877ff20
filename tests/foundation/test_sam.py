"""SAM 2D: names, sizes and numbers of the published implementation, and files of every kind."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SamModel

from scarceseg.errors import ConfigError, DataError
from scarceseg.foundation.sam import (
    LoadReport,
    build_sam,
    decode,
    image_embedding,
    load_sam,
    normalise_pixels,
    sam_config_from_state,
    upsample_masks,
)
from scarceseg.foundation.sam_config import parts
from scarceseg.foundation.sam_keys import resize_tables, to_hugging_face, to_official

CASES = {"sam2d_a": 2, "sam2d_padwin": 3}  # heads of the decoder, which no tensor shows
PROMPTS = ["none", "points", "box", "mask", "points_box", "points_mask", "box_mask", "all"]


def published(shared: Path, case: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """State, arrays and configuration of a reference case."""
    folder = shared / "conformance" / "sam2d"
    with np.load(folder / f"{case}.npz") as arrays:
        tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    config = json.loads((folder / f"{case}.json").read_text(encoding="utf-8"))["config"]
    return load_file(folder / f"{case}_state.safetensors"), tensors, config


def model(shared: Path, case: str) -> tuple[SamModel, dict[str, torch.Tensor], dict[str, Any]]:
    state, arrays, config = published(shared, case)
    sam, report = build_sam(sam_config_from_state(state, CASES[case]), state)
    assert report == LoadReport()
    return sam, arrays, config


def near(got: torch.Tensor, expected: torch.Tensor) -> None:
    atol = 2e-4 * float(expected.std()) + 1e-5 if expected.numel() > 1 else 1e-5
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def prompt_of(arrays: dict[str, torch.Tensor], kind: str) -> dict[str, Any]:
    kinds = {"points", "box", "mask"} if kind == "all" else set(kind.split("_"))
    prompt: dict[str, Any] = {}
    if "points" in kinds:
        prompt |= {"points": arrays["point_coords"], "labels": arrays["point_labels"]}
    if "box" in kinds:
        prompt["boxes"] = arrays["boxes"]
    if "mask" in kinds:
        prompt["masks"] = arrays["mask_input"]
    return prompt


@pytest.mark.parametrize("case", CASES)
def test_image_embedding_is_the_published_one(shared: Path, case: str) -> None:
    sam, arrays, config = model(shared, case)
    pixels = normalise_pixels(arrays["image"])
    height, width = pixels.shape[1:]
    padded = torch.nn.functional.pad(pixels, (0, config["img_size"] - width, 0, config["img_size"] - height))
    near(padded, arrays["image_preprocessed"])
    near(image_embedding(sam, padded[None]), arrays["image_embedding"])
    near(sam.get_image_wide_positional_embeddings().detach(), arrays["dense_pe"])


@pytest.mark.parametrize("multimask", [False, True], ids=["single", "multi"])
@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("case", CASES)
def test_masks_are_the_published_ones(shared: Path, case: str, kind: str, multimask: bool) -> None:
    sam, arrays, _ = model(shared, case)
    low_res, quality = decode(sam, arrays["image_embedding"], multimask=multimask, **prompt_of(arrays, kind))
    word = "multi" if multimask else "single"
    near(low_res, arrays[f"{kind}_{word}_low_res"])
    near(quality, arrays[f"{kind}_{word}_iou"])


@pytest.mark.parametrize("case", CASES)
def test_masks_of_the_original_size_are_the_published_ones(shared: Path, case: str) -> None:
    _, arrays, config = published(shared, case)
    height, width = arrays["image"].shape[1:]
    masks = upsample_masks(
        arrays["all_multi_low_res"], config["img_size"], (height, width), tuple(config["original_size"])
    )
    near(masks, arrays["all_multi_masks"])


@pytest.mark.parametrize("case", CASES)
def test_sizes_are_read_from_the_tensors(shared: Path, case: str) -> None:
    state, _, config = published(shared, case)
    for names in (state, to_hugging_face(state)):
        vision, prompt, decoder = parts(sam_config_from_state(names, CASES[case]))
        assert (vision.hidden_size, vision.num_hidden_layers) == (config["embed_dim"], config["depth"])
        assert vision.num_attention_heads == config["num_heads"]
        assert vision.window_size == config["window_size"]
        assert vision.global_attn_indexes == config["global_attn_indexes"]
        assert (vision.patch_size, vision.image_size) == (config["patch_size"], config["img_size"])
        assert vision.output_channels == prompt.hidden_size == decoder.hidden_size == config["out_chans"]
        assert vision.mlp_dim == config["mlp_ratio"] * config["embed_dim"]
        assert prompt.mask_input_channels == config["mask_in_chans"]
        assert (decoder.mlp_dim, decoder.num_hidden_layers) == (config["decoder_mlp_dim"], config["decoder_depth"])
        assert decoder.num_multimask_outputs == config["num_multimask_outputs"]
        assert (decoder.iou_head_depth, decoder.iou_head_hidden_dim) == (
            config["iou_head_depth"],
            config["iou_head_hidden_dim"],
        )


def vit_b(shared: Path) -> dict[str, torch.Tensor]:
    layout = json.loads((shared / "conformance" / "sam2d" / "layout_sam_vit_b.json").read_text(encoding="utf-8"))
    return {name: torch.empty(entry["shape"], device="meta") for name, entry in layout["tensors"].items()}


def test_every_tensor_of_vit_b_has_its_place(shared: Path) -> None:
    official = vit_b(shared)
    assert len(official) == 314
    config = sam_config_from_state(official)
    vision = parts(config)[0]
    assert vision.global_attn_indexes == [2, 5, 8, 11]
    assert (vision.num_attention_heads, vision.window_size) == (12, 14)
    with torch.device("meta"):
        wanted = SamModel(config).state_dict()
    renamed = to_hugging_face(official)
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in wanted.items()}
    back = to_official(wanted)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in official.items()}


def test_names_go_both_ways_for_parts_and_strangers() -> None:
    decoder = {f"mask_decoder.iou_prediction_head.layers.{i}.weight": i for i in range(5)}
    assert set(to_hugging_face(decoder)) == {
        "mask_decoder.iou_prediction_head.proj_in.weight",
        *(f"mask_decoder.iou_prediction_head.layers.{i}.weight" for i in range(3)),
        "mask_decoder.iou_prediction_head.proj_out.weight",
    }
    assert to_official(to_hugging_face(decoder)) == decoder
    assert to_hugging_face({"head.weight": 1}) == {"head.weight": 1} == to_official({"head.weight": 1})


def test_positional_tables_at_another_image_size_are_the_published_ones(shared: Path) -> None:
    folder = shared / "conformance" / "sam2d_lora"
    config = json.loads((folder / "resize_256_to_128.json").read_text(encoding="utf-8"))["config"]
    with np.load(folder / "resize_256_to_128.npz") as arrays:
        tables = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    source = to_hugging_face({k.removeprefix("source/"): v for k, v in tables.items() if k.startswith("source/")})
    expected = to_hugging_face({k.removeprefix("loaded/"): v for k, v in tables.items() if k.startswith("loaded/")})
    windowed = {"vision_encoder.layers.0.attn.rel_pos_h": torch.randn(7, 8)}
    resized, names = resize_tables({**source, **windowed}, 128 // 16, config["global_attn_indexes"])
    assert set(to_official(dict.fromkeys(names))) == set(config["tensors_resized"])
    for name, value in expected.items():
        torch.testing.assert_close(resized[name], value, rtol=0, atol=1e-6)
    assert resized["vision_encoder.layers.0.attn.rel_pos_h"] is windowed["vision_encoder.layers.0.attn.rel_pos_h"]


def test_a_model_at_another_size_with_other_masks(shared: Path) -> None:
    state, _, _ = published(shared, "sam2d_a")
    before = {name: value.clone() for name, value in state.items()}
    sam, report = build_sam(sam_config_from_state(state, 2), state, image_size=64, mask_tokens=2)
    assert report.ok
    assert set(report.resized) == {
        "image_encoder.pos_embed",
        "image_encoder.blocks.1.attn.rel_pos_h",
        "image_encoder.blocks.1.attn.rel_pos_w",
    }
    assert set(report.fresh) == {
        "mask_decoder.mask_tokens.weight",
        *(
            f"mask_decoder.{head}.layers.{i}.{kind}"
            for head in ("iou_prediction_head", "output_hypernetworks_mlps.0", "output_hypernetworks_mlps.1")
            for i in range(3)
            for kind in ("weight", "bias")
        ),
    }
    assert "3 tensors resized" in report.text and "19 tensors fresh" in report.text
    assert not any(parameter.is_meta for parameter in sam.parameters())
    assert float(sam.mask_decoder.mask_tokens.weight.detach().std()) > 0
    low_res, quality = decode(sam, image_embedding(sam, torch.randn(1, 3, 64, 64)), multimask=True)
    assert low_res.shape == (1, 1, 16, 16) and quality.shape == (1, 1)
    with torch.no_grad():
        sam.mask_decoder.iou_token.weight.zero_()
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_where_windows_fill_the_grid_the_published_blocks_are_global() -> None:
    sizes = parts(sam_config_from_state(small_state(depth=8, grid=4, lengths=[7] * 8), 2))[0]
    assert sizes.global_attn_indexes == [1, 3, 5, 7] and sizes.window_size == 4


def test_tables_left_at_another_size_are_resized_like_the_official_code() -> None:
    state = small_state(depth=2, grid=4, lengths=[5, 15])
    config = sam_config_from_state(state, 2)
    assert parts(config)[0].global_attn_indexes == [1] and parts(config)[0].window_size == 3
    _, report = build_sam(config, state)
    assert len(report.resized) == 2


def small_state(depth: int = 2, grid: int = 4, lengths: list[int] | None = None) -> dict[str, torch.Tensor]:
    """Official state dict of a SAM of width 16 (2 heads), patches of 8, with relative tables of these lengths."""
    from tests.foundation.test_lora import tiny_sam

    state = to_official(tiny_sam().state_dict())
    block = {k.removeprefix("image_encoder.blocks.0."): v for k, v in state.items() if "encoder.blocks.0." in k}
    state = {name: value for name, value in state.items() if ".blocks." not in name}
    for i, length in enumerate(lengths or [2 * grid - 1] * depth):
        own = {k: torch.randn(length, v.shape[1]) if "rel_pos" in k else v for k, v in block.items()}
        state |= {f"image_encoder.blocks.{i}.{key}": value for key, value in own.items()}
    state["image_encoder.pos_embed"] = torch.randn(1, grid, grid, 24)
    return {name: value.clone() for name, value in state.items()}


def save(path: Path, state: dict[str, torch.Tensor]) -> Path:
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path, metadata={"decoder_heads": "2"})
    else:
        torch.save(state, path)
    return path


def test_all_kinds_of_files_give_the_same_model(shared: Path, tmp_path: Path) -> None:
    state, arrays, config = published(shared, "sam2d_a")
    reference, _, _ = model(shared, "sam2d_a")
    pixels = arrays["image_preprocessed"][None]
    folder = tmp_path / "folder"
    reference.save_pretrained(folder)
    hugging_face = {k: v for k, v in to_hugging_face(state).items() if "shared_embedding" not in k}
    paths = [
        folder,
        save(tmp_path / "a.safetensors", state),
        save(tmp_path / "b.safetensors", hugging_face),
    ]
    assert config["decoder_heads"] == 2
    for path in paths:
        sam, report = load_sam(path)
        assert report.ok and report.text == "every tensor fits"
        near(image_embedding(sam, pixels), arrays["image_embedding"])
        low_res, _ = decode(sam, arrays["image_embedding"], **prompt_of(arrays, "all"))
        near(low_res, arrays["all_single_low_res"])
        assert not sam.training and not any(parameter.requires_grad for parameter in sam.parameters())


def test_an_official_file_and_half_precision(shared: Path, tmp_path: Path) -> None:
    state, _, _ = published(shared, "sam2d_a")
    sam, report = load_sam(save(tmp_path / "sam.pth", {k: v.half() for k, v in state.items()}), image_size=64)
    assert report.ok and len(report.resized) == 3
    assert all(parameter.dtype == torch.float32 for parameter in sam.parameters())
    with pytest.raises(ConfigError, match="multiples of 16, got 100: take 96"):
        load_sam(tmp_path / "sam.pth", image_size=100)


class Mischief:
    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return (open, ("/dev/null",))


def test_a_file_with_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sam.pth"
    torch.save({"image_encoder.pos_embed": Mischief()}, path)
    with pytest.raises(DataError, match="code in a file is never run"):
        load_sam(path)
    path.write_bytes(pickle.dumps(Mischief()))
    with pytest.raises(DataError):
        load_sam(path)


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_file_cut_short_is_refused(tmp_path: Path, ending: str) -> None:
    path = save(tmp_path / f"sam{ending}", small_state())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match="damaged"):
        load_sam(path)


def test_another_model_and_an_incomplete_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file or folder"):
        load_sam(tmp_path / "nothing.pth")
    other = save(tmp_path / "other.pth", {"block_one.conv.0.weight": torch.zeros(2, 2)})
    with pytest.raises(DataError, match="holds another model"):
        load_sam(other)
    state = small_state()
    del state["mask_decoder.transformer.layers.1.norm2.bias"]
    lacking = save(tmp_path / "lacking.safetensors", state)
    with pytest.raises(DataError, match=r"1 are missing, such as mask_decoder.transformer.layers.1.norm2.bias"):
        load_sam(lacking)
    folder = tmp_path / "sam2"
    folder.mkdir()
    save(folder / "model.safetensors", small_state())
    with pytest.raises(DataError, match="config.json"):
        load_sam(folder)
    for content, message in (('{"model_type": "sam2"}', "'sam2'"), ("{", "damaged"), ("[]", "'list'")):
        (folder / "config.json").write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            load_sam(folder)
    (folder / "config.json").write_text('{"model_type": "sam"}', encoding="utf-8")
    with pytest.raises(DataError, match="another shape"):
        load_sam(folder)


def test_a_stranger_among_the_tensors_is_a_warning(tmp_path: Path) -> None:
    path = save(tmp_path / "more.safetensors", {**small_state(), "mask_decoder.hf_token.weight": torch.zeros(1, 16)})
    with pytest.warns(UserWarning, match="1 tensors unexpected, not used: mask_decoder.hf_token.weight"):
        _, report = load_sam(path)
    assert not report.ok


def test_tables_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(DataError, match="one length"):
        sam_config_from_state(small_state(lengths=[5, 9, 7]), 2)
    with pytest.raises(ConfigError, match="heads do not divide"):
        sam_config_from_state(small_state(), 3)
