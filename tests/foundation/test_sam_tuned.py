"""A tuned SAM on mosaics: what trains, what stays, exact frames, and the published numbers."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from scarceseg.errors import ConfigError, DataError
from scarceseg.foundation.base import Strategy, Tuning, freeze
from scarceseg.foundation.lora import lora_weights
from scarceseg.foundation.sam import build_sam, sam_config_from_state
from scarceseg.foundation.sam_tuned import MosaicOptions, TunableSam, TunedSam, turn, turn_back
from scarceseg.functional.losses import cross_entropy, segmentation_loss
from tests.foundation.test_lora import SIDE, tiny_sam

STRATEGIES: list[Strategy] = ["lora", "decoder", "adapter"]
SIZE = (13, 11, 9)
QUIET = MosaicOptions(augment=False, seed=0)


def opened(
    strategy: Strategy = "lora",
    channels: int = 1,
    classes: int = 2,
    size: tuple[int, int, int] = SIZE,
    options: MosaicOptions = QUIET,
) -> TunedSam:
    return TunableSam("tiny", tiny_sam(), options).tunable(channels, classes, Tuning(strategy, 2), size)


def volumes(channels: int = 1, size: tuple[int, int, int] = SIZE, seed: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(seed))


def disturb(model: TunedSam) -> None:
    """As if it had been tuned."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_at_the_start_the_encoder_is_the_frozen_one(strategy: Strategy) -> None:
    canvas = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        expected = tiny_sam().vision_encoder(canvas).last_hidden_state
        torch.testing.assert_close(opened(strategy).encode(canvas), expected, rtol=1e-5, atol=1e-5)


def test_decoder_gives_every_token_of_sam() -> None:
    """Own tokens on the frozen SAM: token 0 is its single mask, the others its multiple masks."""
    sam = tiny_sam()
    model = TunedSam(sam, 3, 4, Tuning("decoder"), SIZE, replace(QUIET, tokens="own")).eval()
    canvas = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        embedding = model.encode(canvas)
        logits, quality = model.decode(embedding)
        one, many = (sam(image_embeddings=embedding, multimask_output=flag) for flag in (False, True))
    expected = torch.cat([one.pred_masks, many.pred_masks], dim=2)[:, 0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quality, torch.cat([one.iou_scores, many.iou_scores], dim=2)[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_what_is_tuned_changes(strategy: Strategy) -> None:
    original = tiny_sam()
    kept = copy.deepcopy(original.state_dict())
    model = TunedSam(freeze(original), 1, 3, Tuning(strategy, 2), SIZE, QUIET).train()  # type: ignore[arg-type]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    before = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    label = torch.randint(3, (2, *SIZE))
    for _ in range(3):
        optimiser.zero_grad()
        segmentation_loss(model(volumes()), label).backward()
        assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)
        optimiser.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed <= trained
    assert any("mask_decoder.mask_tokens" in name for name in changed)
    encoder = {name for name in changed if "vision_encoder" in name}
    assert {name for name in trained if "vision_encoder" in name} == encoder
    assert bool(encoder) == (strategy != "decoder")
    assert all(torch.equal(value, kept[name]) for name, value in original.state_dict().items())


def test_random_fourier_matrix_is_not_trained() -> None:
    frozen = [name for name, p in opened("decoder").named_parameters() if not p.requires_grad]
    assert any("positional_embedding" in name for name in frozen)


def test_loss_on_the_volume_is_the_loss_on_the_mosaic_without_its_empty_cells() -> None:
    model = opened(classes=3).train()
    disturb(model)
    label = torch.randint(3, (2, *SIZE), generator=torch.Generator().manual_seed(2))
    image = volumes()
    logits = model(image)
    canvas = model.stitch.stitch(image).expand(-1, 3, -1, -1)
    on_canvas = model.upsample(model.decode(model.encode(canvas))[0])
    filled = model.stitch.stitch(torch.stack([torch.ones_like(label), label], dim=1).float())
    target = torch.where(filled[:, 0] > 0, filled[:, 1].long(), 255)
    assert (target == 255).any()
    probability = on_canvas.softmax(1)
    inside = target != 255
    by_hand = -probability.permute(0, 2, 3, 1)[inside].gather(1, target[inside][:, None]).log().mean()
    torch.testing.assert_close(cross_entropy(logits, label), by_hand, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        segmentation_loss(logits, label, background=True),
        segmentation_loss(on_canvas, target, background=True),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("layout", ["fitted", "published"])
@pytest.mark.parametrize(("channels", "classes"), [(1, 2), (2, 3), (3, 5), (4, 2)])
def test_any_channels_and_classes(channels: int, classes: int, layout: Any) -> None:
    model = opened("lora", channels, classes, (10, 10, 7), replace(QUIET, layout=layout))
    logits = model(volumes(channels, (10, 10, 7)))
    assert logits.shape == (2, classes, 10, 10, 7)
    logits.square().mean().backward()
    assert all(b.grad is not None and b.grad.any() for _, b in lora_weights(model.sam))


def test_two_channels_are_seen_with_their_mean_and_three_as_they_are() -> None:
    two = volumes(2)
    model = opened("decoder", channels=3).eval()
    expected = model(torch.cat([two, two.mean(1, keepdim=True)], dim=1))
    assert torch.equal(opened("decoder", channels=2).eval()(two), expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_projection_of_many_channels_starts_as_the_mean_and_is_trained(strategy: Strategy) -> None:
    model = opened(strategy, channels=4)
    many = volumes(4)
    expected = opened(strategy, channels=1)(many.mean(1, keepdim=True))
    logits = model(many)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    logits.square().mean().backward()
    assert model.projection is not None
    assert model.projection.weight.grad is not None and model.projection.weight.grad.any()
    assert "channel_projection.weight" in model.tuned_state()


@pytest.mark.parametrize("size", [(13, 11, 9), (31, 7, 5), (9, 17, 61), (64, 64, 3), (5, 5, 1)])
def test_odd_sizes_come_back_in_place(size: tuple[int, int, int]) -> None:
    model = opened(size=size)
    image = volumes(size=size)
    assert model(image).shape == (2, 2, *size)
    # With the logits of the canvas equal to its first channel, the volume itself has to come back.
    assert torch.equal(model.stitch.unstitch(model.stitch.stitch(image)), image)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tuned_state_carries_all_that_was_tuned(strategy: Strategy, channels: int) -> None:
    model = opened(strategy, channels, classes=3).eval()
    untuned = model(volumes(channels))
    disturb(model)
    tuned = model(volumes(channels))
    assert not torch.allclose(untuned, tuned, atol=1e-3)
    other = opened(strategy, channels, classes=3, options=replace(QUIET, seed=77)).eval()
    other.load_tuned_state(model.tuned_state())
    assert torch.equal(other(volumes(channels)), tuned)
    names = set(model.tuned_state())
    encoder = {n for n in names if not n.startswith(("prompt_encoder.", "mask_decoder.", "channel_projection."))}
    prefix = {"lora": "w_", "adapter": "image_encoder.adapters.", "decoder": "nothing"}[strategy]
    assert all(name.startswith(prefix) for name in encoder)


def test_state_of_another_strategy_or_class_count_is_refused() -> None:
    state = opened("lora").tuned_state()
    with pytest.raises(DataError, match="unexpected: w_a_000"):
        opened("decoder").load_tuned_state(state)
    with pytest.raises(DataError, match="missing"):
        opened("lora", classes=3).load_tuned_state(state)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_merged_copy_computes_the_same(strategy: Strategy) -> None:
    model = opened(strategy).eval()
    disturb(model)
    merged = model.merged()
    torch.testing.assert_close(merged(volumes()), model(volumes()), rtol=1e-3, atol=1e-4)
    assert not any(p.requires_grad for p in merged.parameters())
    assert any(p.requires_grad for p in model.parameters())


def test_checkpointing_changes_neither_loss_nor_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = opened(options=replace(QUIET, checkpointing=checkpointing)).train()
        disturb(model)
        model(volumes()).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-5, atol=1e-7)


def test_frozen_encoder_of_the_decoder_strategy_keeps_no_graph() -> None:
    canvas = torch.randn(1, 3, SIDE, SIDE)
    assert not opened("decoder").encode(canvas).requires_grad
    assert opened("lora").encode(canvas).requires_grad


def test_training_mode_does_not_reach_the_encoder() -> None:
    model = opened().train()
    assert model.training and model.sam.mask_decoder.training
    assert not any(m.training for m in model.sam.vision_encoder.modules())
    assert torch.equal(model(volumes()), model.eval()(volumes()))


@pytest.mark.parametrize("number", range(8))
def test_turns_have_inverses_and_differ(number: int) -> None:
    image = torch.arange(2 * 9.0).reshape(2, 1, 3, 3)
    turned = turn(image, [number, 0])
    assert torch.equal(turn_back(turned, [number, 0]), image)
    assert torch.equal(turned[1], image[1])
    assert len({tuple(turn(image[:1], [k]).flatten().tolist()) for k in range(8)}) == 8


def test_augmentation_turns_the_canvas_and_turns_the_masks_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened(options=replace(QUIET, augment=True)).train()
    seen: list[torch.Tensor] = []

    def watch(canvas: torch.Tensor) -> torch.Tensor:
        seen.append(canvas)
        return canvas

    # A network that gives its input back, at a lower resolution as SAM does.
    monkeypatch.setattr(model, "encode", watch)
    monkeypatch.setattr(model, "decode", lambda canvas: (F.avg_pool2d(canvas, 4)[:, :2], None))
    model.seed_augmentation(1)
    turned = [model(volumes()) for _ in range(4)]
    straight = model.eval()(volumes())
    assert any(not torch.equal(canvas, seen[-1]) for canvas in seen[:-1])
    for logits in turned:
        torch.testing.assert_close(logits, straight, rtol=1e-5, atol=1e-5)


def test_augmentation_is_seeded_and_resumes() -> None:
    model = opened(options=replace(QUIET, augment=True)).train()
    assert model.augmentation_state() is None
    model.seed_augmentation(5)
    first = [model._draw_turns(3) for _ in range(2)]
    state = model.augmentation_state()
    assert state is not None
    after = [model._draw_turns(3) for _ in range(3)]
    model.seed_augmentation(5)
    assert [model._draw_turns(3) for _ in range(2)] == first
    other = copy.deepcopy(model)
    other.set_augmentation_state(state)
    assert [other._draw_turns(3) for _ in range(3)] == after
    assert len({tuple(x) for x in after}) > 1


def test_without_an_own_generator_the_global_seed_decides() -> None:
    model = opened(options=replace(QUIET, augment=True)).train()
    drawn = []
    for _ in range(2):
        torch.manual_seed(8)
        drawn.append(model._draw_turns(16))
    assert drawn[0] == drawn[1] != model._draw_turns(16)


def test_new_weights_follow_the_seed() -> None:
    same = [opened().tuned_state() for _ in range(2)]
    other = opened(options=replace(QUIET, seed=1)).tuned_state()
    assert all(torch.equal(value, same[1][name]) for name, value in same[0].items())
    for name in ("w_a_000", "mask_decoder.mask_tokens.weight", "mask_decoder.iou_prediction_head.layers.0.weight"):
        assert not torch.equal(same[0][name], other[name])


def test_it_learns_a_mosaic() -> None:
    model = opened(options=replace(QUIET, augment=False)).train()
    label = torch.zeros(2, *SIZE, dtype=torch.long)
    label[0, 2:9, 3:10] = 1
    label[1, 5:12, 1:8] = 1
    image = volumes() + 2 * label[:, None]
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        loss = segmentation_loss(model(image), label)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0], losses


@pytest.mark.parametrize(("resize", "canvases"), [(False, 10), (True, 1)])
def test_whole_volumes_and_bf16(resize: bool, canvases: int) -> None:
    size = (37, 41, 10)
    model = opened(size=size, options=replace(QUIET, resize=resize, augment=True)).train()
    disturb(model)
    assert model.stitch.canvases == canvases
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(volumes(size=size))
        assert logits.dtype == torch.float32
        segmentation_loss(logits, torch.ones(2, *size, dtype=torch.long)).backward()
    assert all(b.grad is not None and b.grad.any() for _, b in lora_weights(model.sam))
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_bad_input_is_refused() -> None:
    model = opened()
    for image in (volumes(2), volumes(size=(13, 11, 8)), volumes()[0]):
        with pytest.raises(DataError, match=r"opened for \[B, 1, 13, 11, 9\]"):
            model(image)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": 1}, "2 classes"),
        ({"channels": 0}, "1 channel"),
        ({"tuning": Tuning("lora", 0)}, "starts at 1"),
        ({"tuning": Tuning("magic")}, "tuned by lora, decoder, adapter"),  # type: ignore[arg-type]
        ({"options": MosaicOptions(tokens="own")}, "has 4 mask tokens, 2 classes"),
        ({"options": MosaicOptions(layout="published"), "size": (16, 16, 18)}, "leaves 512 of them out"),
        ({"size": (SIDE + 1, 9, 9)}, "do not fit a canvas"),
    ],
)
def test_impossible_requests_are_refused(arguments: dict[str, Any], message: str) -> None:
    given = {"channels": 1, "classes": 2, "tuning": Tuning("lora", 2), "size": SIZE} | arguments
    with pytest.raises(ConfigError, match=message):
        TunedSam(tiny_sam(), **given)


def published(shared: Path, case: str) -> tuple[TunedSam, dict[str, Any], dict[str, torch.Tensor]]:
    """The case's model with its LoRA file loaded, its description and its arrays."""
    folder = shared / "conformance" / "sam2d_lora"
    facts = json.loads((folder / f"{case}.json").read_text(encoding="utf-8"))["config"]
    with np.load(folder / f"{case}.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    state = load_file(folder / f"{case}_base_sam.safetensors")
    sam, report = build_sam(sam_config_from_state(state, facts["decoder_heads"]), state)
    assert report.ok
    size = tuple(arrays["volume"].shape[2:])
    options = replace(QUIET, layout="published", tokens="own")
    model = TunedSam(sam, 1, facts["output_channels"], Tuning("lora", facts["rank"]), size, options).eval()
    return model, facts, arrays


def close(value: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(value, expected, rtol=0, atol=2e-4 * float(expected.std()) + 1e-5)


@pytest.mark.parametrize("case", ["lora_c1", "lora_c3"])
@torch.no_grad()
def test_published_numbers(shared: Path, case: str) -> None:
    model, facts, arrays = published(shared, case)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == facts["trainable_parameters"]
    canvas = model.stitch.stitch(arrays["volume"].expand(-1, 3, -1, -1, -1))
    assert torch.equal(canvas, arrays["stitched"][:, None].expand(-1, 3, -1, -1))
    close(model.encode(canvas), arrays["image_embedding_lora_off"])  # fresh LoRA: B = 0

    file = load_file(shared / "conformance" / "sam2d_lora" / f"{case}_lora_file.safetensors")
    assert model.tuned_state().keys() == file.keys()
    model.load_tuned_state(file)
    assert all(torch.equal(value, file[name]) for name, value in model.tuned_state().items())
    for tuned in (model, model.merged()):
        embedding = tuned.encode(canvas)
        close(embedding, arrays["image_embedding"])
        low_res, quality = tuned.decode(embedding)
        close(low_res, arrays["low_res_logits"])
        close(quality, arrays["iou_predictions"])
        close(tuned.upsample(low_res), arrays["masks"])
        probability = tuned(arrays["volume"]).softmax(1)
        close(probability, arrays["volume_softmax"])
        best_two = probability.topk(2, dim=1).values
        clear = best_two[:, 0] - best_two[:, 1] > 1e-5
        assert clear.float().mean() > 0.99
        assert torch.equal(probability.argmax(1)[clear], arrays["volume_pred"].long()[clear])
