"""LoRA on a SAM encoder: identity at the start, published files, the published numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SamConfig, SamModel

from scarceseg.errors import ConfigError, DataError
from scarceseg.foundation.adapters import open_with_adapters
from scarceseg.foundation.lora import (
    SplitQKV,
    load_lora_state,
    lora_state,
    lora_weights,
    merge_lora,
    open_with_lora,
)

SIDE = 64


def tiny_sam(seed: int = 0, tokens: int = 4) -> SamModel:
    """A SAM of two blocks, windowed and global, on images of 64x64; tables that start at zero are filled."""
    config = SamConfig(
        vision_config={
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": 8,
            "window_size": 3,
            "global_attn_indexes": [1],
            "mlp_dim": 48,
            "output_channels": 16,
            "num_pos_feats": 8,
        },
        prompt_encoder_config={
            "hidden_size": 16,
            "image_size": SIDE,
            "patch_size": 8,
            "image_embedding_size": SIDE // 8,
            "mask_input_channels": 8,
        },
        mask_decoder_config={
            "hidden_size": 16,
            "num_attention_heads": 2,
            "mlp_dim": 32,
            "iou_head_hidden_dim": 16,
            "num_multimask_outputs": tokens - 1,
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sam = SamModel(config).eval()
        with torch.no_grad():
            for parameter in sam.vision_encoder.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return sam


def randomise(sam: SamModel) -> None:
    """LoRA that does something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for a, b in lora_weights(sam):
            a.normal_(generator=generator)
            b.normal_(std=0.3, generator=generator)


def embedding(sam: SamModel, image: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        features: torch.Tensor = sam.vision_encoder(image).last_hidden_state
    return features


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("bias", [True, False])
def test_split_projection_is_the_fused_one(bias: bool) -> None:
    fused = torch.nn.Linear(6, 18, bias=bias)
    split = SplitQKV(fused)
    x = torch.randn(2, 3, 3, 6)
    torch.testing.assert_close(split(x), fused(x), rtol=1e-6, atol=1e-6)
    back = split.fused()
    assert torch.equal(back.weight, fused.weight)
    assert (back.bias is None) == (not bias)
    assert not bias or torch.equal(back.bias, fused.bias)


@pytest.mark.parametrize("opened", [open_with_lora, open_with_adapters])
def test_nothing_changes_at_the_start(opened: type, image: torch.Tensor) -> None:
    sam = tiny_sam()
    before = embedding(sam, image)
    opened(sam, 3)
    torch.testing.assert_close(embedding(sam, image), before, rtol=1e-5, atol=1e-5)


def test_lora_adds_b_a_x_to_q_and_v_alone() -> None:
    fused = tiny_sam().vision_encoder.layers[0].attn.qkv
    sam = open_with_lora(tiny_sam(), 3)
    randomise(sam)
    (a_q, b_q), (a_v, b_v) = list(lora_weights(sam))[:2]
    x = torch.randn(5, 24)
    q, k, v = fused(x).chunk(3, dim=-1)
    expected = torch.cat([q + x @ a_q.T @ b_q.T, k, v + x @ a_v.T @ b_v.T], dim=-1)
    torch.testing.assert_close(sam.vision_encoder.layers[0].attn.qkv(x), expected, rtol=1e-5, atol=1e-5)


def test_merged_lora_computes_the_same_and_is_a_plain_sam(image: torch.Tensor) -> None:
    sam = open_with_lora(tiny_sam(), 3)
    randomise(sam)
    with_lora = embedding(sam, image)
    assert (with_lora - embedding(tiny_sam(), image)).abs().max() > 0.1
    merged = merge_lora(sam)
    torch.testing.assert_close(embedding(merged, image), with_lora, rtol=1e-4, atol=1e-4)
    assert merged.state_dict().keys() == tiny_sam().state_dict().keys()
    assert not any(p.requires_grad for p in merged.parameters())
    with pytest.raises(ConfigError, match="carries no LoRA"):
        lora_state(merged)
    torch.testing.assert_close(embedding(sam, image), with_lora, rtol=0, atol=0)


def test_a_seed_gives_the_same_lora_and_leaves_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    first, second = (open_with_lora(tiny_sam(), 3, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    for (a, b), (c, _) in zip(lora_weights(first), lora_weights(second), strict=True):
        assert torch.equal(a, c)
        assert not b.any()
        assert 0 < a.std() < 24**-0.5


def test_file_goes_through_safetensors(tmp_path: Path, image: torch.Tensor) -> None:
    sam = open_with_lora(tiny_sam(), 3)
    randomise(sam)
    save_file(lora_state(sam), tmp_path / "lora.safetensors")
    other = open_with_lora(tiny_sam(), 3)
    load_lora_state(other, load_file(tmp_path / "lora.safetensors"))
    assert torch.equal(embedding(other, image), embedding(sam, image))
    assert len(lora_state(sam)) == 2 * 4 + 17 + sum(1 for _ in sam.mask_decoder.parameters())


def test_a_file_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    sam = open_with_lora(tiny_sam(), 3)
    before = lora_state(sam)
    good = {key: value + 1 for key, value in before.items()}
    missing = {key: value for key, value in good.items() if key != "w_a_001"}
    with pytest.raises(DataError, match="1 missing: w_a_001"):
        load_lora_state(sam, missing)
    with pytest.raises(DataError, match="1 unexpected: w_a_999"):
        load_lora_state(sam, {**good, "w_a_999": torch.zeros(1)})
    with pytest.raises(DataError, match=r"w_a_000: expected \[3, 24\], got \[4, 24\]"):
        load_lora_state(sam, {**good, "w_a_000": torch.zeros(4, 24)})
    assert all(torch.equal(value, before[key]) for key, value in lora_state(sam).items())


@pytest.mark.parametrize("opened", [open_with_lora, open_with_adapters])
def test_impossible_requests_are_refused(opened: type) -> None:
    with pytest.raises(ConfigError, match="starts at 1"):
        opened(tiny_sam(), 0)
    sam = opened(tiny_sam(), 2)
    with pytest.raises(ConfigError, match="already"):
        opened(sam, 2)


@pytest.mark.parametrize("classes", [1, 3])
def test_layout_of_vit_b_is_the_published_one(shared: Path, classes: int) -> None:
    file = shared / "conformance" / "sam2d_lora" / f"layout_lora_file_vit_b_c{classes}.json"
    layout = json.loads(file.read_text(encoding="utf-8"))
    with torch.device("meta"):
        sam = open_with_lora(SamModel(SamConfig(mask_decoder_config={"num_multimask_outputs": classes})), 4)
    state = lora_state(sam)
    assert {key: list(value.shape) for key, value in state.items()} == {
        key: entry["shape"] for key, entry in layout["tensors"].items()
    }
    assert all(str(state[key].dtype) == f"torch.{entry['dtype']}" for key, entry in layout["tensors"].items())
    assert sum(p.numel() for p in sam.parameters() if p.requires_grad) == layout["trainable_parameters"]
