"""`tiny-sam`: files, the way of prompts onto its canvas and back, and tuning volumes of any size."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import SamModel

from scarceseg.data.phantoms import PhantomConfig, make_phantom
from scarceseg.errors import DataError
from scarceseg.foundation import sam_ask
from scarceseg.foundation.base import Masks, Tuning
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
from scarceseg.pretrain.volumes import UNSEEN, draw_target, make_volume
from scarceseg.types import Prompt
from tests.foundation.small import click, dice_after, noise, packaged, same, small_sam

SIZE = (21, 13, 30)
ISO = (1.0, 1.0, 1.0)
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
    image = noise(SIZE)
    one, other = TinySam(sam), TinySam.from_file(path)
    masks = [m.segment(m.embed(image, ISO), [click((9.0, 8.0, 7.0))]) for m in (one, other)]
    same(*masks, rtol=0.02, atol=0.02)


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


# Prompts


def painter(asked: list[dict[str, Any]], radius: float = 1.2) -> Any:
    """A decoder that draws discs at the clicks and remembers what it was asked."""

    def decode(sam: SamModel, embedding: torch.Tensor, **prompt: Any) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(prompt)
        side, pixels = 4 * embedding.shape[-1], 56
        at = (torch.arange(side) + 0.5) * pixels / side - 0.5
        found = torch.zeros(len(embedding), side, side, dtype=torch.bool)
        for row, points in enumerate(prompt["points"]):
            for x, y in points:
                found[row] |= (at - x).square()[None] + (at - y).square()[:, None] <= radius**2
        return torch.where(found, 10.0, -10.0)[:, None], torch.full((len(embedding), 1), 0.9)

    return decode


@pytest.mark.parametrize("size", [SIZE, (8, 8, 49), (64, 50, 5), (7, 9, 120)])
def test_a_click_lands_on_its_pixel_and_its_mask_comes_back(
    size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(sam_ask, "decode", painter(asked))
    promptable = TinySam(small_sam())
    assert promptable.seen == (8, 8, 49)
    embedding = promptable.embed(noise(size), (1.0, 0.5, 3.0))
    place = tuple(round(0.6 * (n - 1)) for n in size)
    drawn = promptable.segment(embedding, [click(place)]).logits[0] + 10
    x, y, z = ((p + 0.5) * seen / n - 0.5 for p, n, seen in zip(place, size, promptable.seen, strict=True))
    z = min(max(round(z), 0), 48)
    expected = torch.tensor([z % 7 * 8 + max(x, 0.0), z // 7 * 8 + max(y, 0.0)])
    torch.testing.assert_close(asked[0]["points"][0, 0], expected, rtol=1e-4, atol=1e-4)
    assert drawn.shape == size
    # What was drawn is where the click is, and not in another slice or corner.
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in size), indexing="ij")
    centre = torch.stack([(drawn * a).sum() / drawn.sum() for a in axes])
    reach = torch.tensor([max(1.0, 0.8 * n / seen) for n, seen in zip(size, promptable.seen, strict=True)])
    assert ((centre - torch.tensor(place)).abs() <= reach).all()


def test_masks_and_boxes_lie_on_the_canvas_like_the_volume(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(sam_ask, "decode", painter(asked))
    promptable = TinySam(small_sam())
    embedding = promptable.embed(noise((16, 16, 49)), ISO)
    mask = torch.zeros(16, 16, 49)
    mask[4:12, 2:8, 9:12] = 1
    promptable.segment(embedding, [Prompt(mask=mask)])
    drawn = asked[0]["masks"][0, 0] > 0
    side = drawn.shape[0]
    rows, columns = drawn.nonzero().T.div(side / 56, rounding_mode="floor").long()
    slices = (rows // 8) * 7 + columns // 8
    assert set(slices.tolist()) == {9, 10, 11}
    assert set((columns % 8).tolist()) == {2, 3, 4, 5} and set((rows % 8).tolist()) == {1, 2, 3}
    # Only mask 0 was pre-trained: the others are never asked.
    promptable.segment(embedding, [click((8.0, 8.0, 20.0))])
    assert not asked[-1]["multimask"]


def test_rounds_go_on_from_the_answer_before() -> None:
    promptable = TinySam(small_sam())
    embedding = promptable.embed(noise(SIZE), ISO)
    first = promptable.segment(embedding, [click((9.0, 8.0, 7.0))])
    both = [click((9.0, 8.0, 7.0), (3.0, 3.0, 20.0), labels=[1, 0])]
    refined, forgotten = promptable.segment(embedding, both, first), promptable.segment(embedding, both)
    assert not torch.allclose(refined.logits, forgotten.logits, atol=1e-4)
    with pytest.raises(DataError, match="previous answer"):
        promptable.segment(embedding, both, Masks(first.logits, first.quality))


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


def test_packaged_weights_follow_clicks_on_what_they_have_never_seen() -> None:
    packaged(KIND)
    promptable = load_foundation(KIND)
    assert isinstance(promptable, TinySam) and promptable.seen == (56, 56, 49)
    image, label, _ = make_phantom(3, PhantomConfig(shape=(40, 40, 32), classes=2))
    targets = [torch.from_numpy(label == value) for value in (1, 2)]
    found = dice_after(promptable, torch.from_numpy(image)[None], targets, 5, (2.0, 2.0, 2.0))
    volume = make_volume(np.random.default_rng(11), (48, 48, 40), UNSEEN)
    mask = draw_target(np.random.default_rng(0), volume)
    assert mask is not None
    targets.append(torch.from_numpy(mask))
    found += dice_after(promptable, torch.from_numpy(volume.image)[None, None], targets[2:], 5, ISO)
    # Painting everything gives 2 s / (1 + s) for a target that fills a share s of the volume.
    chance = [2 * float(t.float().mean()) / (1 + float(t.float().mean())) for t in targets]
    assert sum(found) / len(found) > sum(chance) / len(chance) + 0.1, (found, chance)
