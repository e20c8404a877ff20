"""`tiny-sam`: files, where its tokens lie in the volume, and tuning on volumes of any size."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import SamModel

from scarceseg.errors import DataError
from scarceseg.foundation.base import Tuning
from scarceseg.foundation.load import load_foundation
from scarceseg.foundation.tiny_sam import (
    GRID,
    KIND,
    TinySam,
    _volume_code,
    read_tiny_sam,
    save_tiny_sam,
    start_tiny_sam,
    tiny_sam_config,
)
from scarceseg.foundation.weights import find
from tests.foundation.small import noise, packaged, small_sam

SIZE = (21, 13, 30)
LARGEST_FILE = 12_000_000


# Files


def test_saved_weights_are_read_in_half_precision(tmp_path: Path) -> None:
    sam = small_sam()
    path = tmp_path / "model.safetensors"
    save_tiny_sam(path, sam, {"iterations": "7"})
    with safe_open(path, "pt") as file:
        about = file.metadata()
    assert about["kind"] == KIND and about["iterations"] == "7"
    assert {value.dtype for value in load_file(path).values()} == {torch.float16}
    again = read_tiny_sam(path)
    assert again.config.vision_config.image_size == 56 and not again.config.vision_config.use_rel_pos
    assert again.state_dict().keys() == sam.state_dict().keys()
    for name, value in sam.state_dict().items():
        assert again.state_dict()[name].dtype == torch.float32
        torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-3, atol=1e-6)
    logits = []
    for model in (TinySam(sam), TinySam.from_file(path)):
        torch.manual_seed(0)
        with torch.no_grad():
            logits.append(model.tunable(1, 3, Tuning("lora"), SIZE).eval()(noise(SIZE)))
    torch.testing.assert_close(logits[1], logits[0], rtol=0.02, atol=0.02 * float(logits[0].std()))


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(DataError, match="there is no file"):
        read_tiny_sam(path)
    state = {name: value.clone() for name, value in small_sam().state_dict().items()}
    config = json.dumps(tiny_sam_config(8, 4, 32, 2).to_dict())
    shorter = {name: value for name, value in state.items() if "mask_tokens" not in name}
    for tensors, about, message in (
        (state, {"kind": "tiny-sam3d"}, "holds tiny-sam3d, expected tiny-sam"),
        (state, None, "holds weights of another model"),
        (state, {"kind": KIND}, "no 'config'"),
        (state, {"kind": KIND, "config": "{"}, "does not fit"),
        (state, {"kind": KIND, "config": '{"vision_config": {"hidden_size": "wide"}}'}, "does not fit"),
        (shorter, {"kind": KIND, "config": config}, "mask_decoder.mask_tokens.weight"),
    ):
        save_file(tensors, path, about)
        with pytest.raises(DataError, match=message) as caught:
            read_tiny_sam(path)
        assert len(str(caught.value).splitlines()) == 1


# The network of the real size


@pytest.fixture(scope="module")
def fresh() -> SamModel:
    return start_tiny_sam(3)


def test_the_file_of_the_real_size_is_small_enough(fresh: SamModel, tmp_path: Path) -> None:
    save_tiny_sam(tmp_path / "model.safetensors", fresh)
    assert (tmp_path / "model.safetensors").stat().st_size <= LARGEST_FILE


def test_the_seed_decides_the_start(fresh: SamModel) -> None:
    again, other = start_tiny_sam(3), start_tiny_sam(4)
    weights = fresh.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())
    assert any(not torch.equal(value, weights[name]) for name, value in other.state_dict().items())
    assert not fresh.shared_image_embedding.positional_embedding.requires_grad
    assert fresh.vision_encoder.pos_embed is not None
    torch.testing.assert_close(fresh.vision_encoder.pos_embed, 0.5 * _volume_code(GRID, 192))


def test_tokens_know_their_place_in_the_volume() -> None:
    tokens, width = 3, 12
    code = _volume_code(tokens, width)[0]
    assert code.shape == (GRID * tokens, GRID * tokens, width)
    waves = np.pi * 2 ** np.linspace(0, 4, width // 6)
    for row, column in product(range(0, GRID * tokens, 4), range(0, GRID * tokens, 5)):
        x, y = column % tokens / tokens, row % tokens / tokens
        z = (row // tokens * GRID + column // tokens) / GRID**2
        expected = np.concatenate([f(waves * place) for place in (x, y, z) for f in (np.sin, np.cos)])
        np.testing.assert_allclose(code[row, column].numpy(), expected, atol=1e-5)


# Tuning


def test_a_tuned_model_sees_volumes_of_any_size_whole() -> None:
    promptable = TinySam(small_sam())
    tuned = promptable.tunable(1, 3, Tuning("decoder"), SIZE).eval()
    for size in (SIZE, (8, 8, 49), (30, 9, 5)):
        with torch.no_grad():
            logits = tuned(noise(size, 2))
        assert logits.shape == (2, 3, *size) and logits.dtype == torch.float32
    for wrong in (noise(SIZE, channels=2), noise(SIZE)[0]):
        with pytest.raises(DataError, match="opened for|takes volumes"):
            tuned(wrong)


@pytest.mark.parametrize("augment", [False, True])
def test_mosaics_are_turned_in_training_only_when_asked(augment: bool) -> None:
    tuned = TinySam(small_sam(), augment=augment).tunable(1, 2, Tuning("decoder"), SIZE).train()
    image = noise(SIZE)
    with torch.no_grad():
        answers = [tuned(image) for _ in range(6)]
    assert all(torch.equal(answers[0], other) for other in answers[1:]) == (not augment)


# The weights in the package


def test_packaged_weights_are_small_and_ours() -> None:
    packaged(KIND)
    path = find(KIND)
    assert path.stat().st_size <= LARGEST_FILE
    with safe_open(path, "pt") as file:
        assert file.metadata()["kind"] == KIND


def test_packaged_weights_can_be_tuned() -> None:
    packaged(KIND)
    model = load_foundation(KIND)
    assert isinstance(model, TinySam) and model.seen == (56, 56, 49)
