"""`tiny-sam3d` opened for classes: what it starts from, against oracles, and volumes of any kind."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scarceseg.errors import ConfigError, DataError
from scarceseg.foundation.base import Strategy, Tuning
from scarceseg.foundation.load import load_foundation
from scarceseg.foundation.tiny_sam3d import read_tiny_sam3d, save_tiny_sam3d
from scarceseg.foundation.tiny_sam3d_net import Convolution, EncodedPrompt, PromptHead
from scarceseg.foundation.tiny_sam3d_tuned import OCTAVES, ClassHead, TinySam3DModel, TunedTinySam3D, place_code
from scarceseg.foundation.volume_tuning import LowRank, add_lora
from scarceseg.functional.losses import segmentation_loss
from tests.foundation.small import noise, packaged, small_net

STRATEGIES: list[Strategy] = ["lora", "decoder", "adapter"]
SIZE = (19, 17, 14)


def opened(strategy: Strategy = "lora", channels: int = 1, classes: int = 2, **options: Any) -> TunedTinySam3D:
    torch.manual_seed(4)
    model = TinySam3DModel(small_net(), **{"tuned_longest": 32, "placed": True, **options})
    return model.tunable(channels, classes, Tuning(strategy, 2), SIZE)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def answer(tuned: TunedTinySam3D, image: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = tuned.eval()(image)
    return logits


# Where it starts


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_at_the_start_the_encoder_is_the_frozen_one(strategy: Strategy) -> None:
    image = noise((16, 32, 16), 2)
    with torch.no_grad():
        expected, maps = small_net().encoder(image), opened(strategy).network.encoder(image)
    for name, value in expected.items():
        torch.testing.assert_close(maps[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("placed", [True, False])
def test_tokens_that_equal_clicked_features_answer_like_clicks(monkeypatch: pytest.MonkeyPatch, placed: bool) -> None:
    """Class 1 then is the pre-trained mask without its maps of distances, which tokens do not have; the background is 0."""
    network = small_net()
    config, maps = network.config, network.encoder(noise((16, 32, 16)))
    click, away = (3, 9, 5), (6, 2, 1)  # at half resolution
    prompt = EncodedPrompt(
        2 * torch.tensor([[click, away]]).float() + 0.5,
        torch.tensor([[1, 0]]),
        torch.full((1, 2, 3), float("nan")),
        None,
        torch.zeros(1),
    )
    plain = PromptHead._prompt_maps

    def without_distances(self: PromptHead, similar: torch.Tensor, encoded: EncodedPrompt) -> torch.Tensor:
        found = plain(self, similar, encoded)
        found[:, 2 * config.similarities :] = 0
        return found

    head = ClassHead(network.head, 2, generator(), placed)
    features = maps["similar"].reshape(config.similarities, config.similarity_width, *maps["similar"].shape[2:])
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(PromptHead, "_prompt_maps", without_distances)
        expected, _ = network.head(maps, prompt)
        head.tokens[1], head.tokens[0] = features[:, :, 3, 9, 5], 2.5 * features[:, :, 6, 2, 1]
        logits = head.answer(maps)
    assert logits.shape == (1, 2, 16, 32, 16)
    assert not logits[:, 0].any()
    torch.testing.assert_close(logits[:, 1], expected, rtol=1e-3, atol=1e-3)
    assert float(expected.std()) > 0.1


def test_all_classes_start_alike_but_for_their_tokens() -> None:
    network = small_net()
    maps = network.encoder(noise((16, 16, 16)))
    head = ClassHead(network.head, 4, generator())
    with torch.no_grad():
        logits = head.answer(maps)
        one = logits[:, 1]
        torch.testing.assert_close(logits[:, 2:], one[:, None].expand(-1, 2, -1, -1, -1))
        # Three equal tokens say what one says alone.
        head.tokens[2:] = head.tokens[1]
        alone = ClassHead(network.head, 2, generator())
        alone.tokens.copy_(head.tokens[:2])
        torch.testing.assert_close(head.answer(maps)[:, :2], alone.answer(maps), rtol=1e-4, atol=1e-4)


def test_place_code_is_that_of_voxel_centres() -> None:
    size = (4, 3, 5)
    code = place_code(torch.Size(size), torch.zeros(1))[0].numpy()
    assert code.shape == (6 * OCTAVES, *size)
    for at in product(*(range(n) for n in size)):
        places = [(i + 0.5) / n for i, n in zip(at, size, strict=True)]
        waves = [np.pi * 2**octave for octave in range(OCTAVES)]
        expected = [f(w * place) for w in waves for f in (np.sin, np.cos) for place in places]
        np.testing.assert_allclose(code[(slice(None), *at)], expected, atol=1e-5)


def test_the_place_has_no_influence_at_first_and_can_be_learnt() -> None:
    image = noise((16, 16, 16))
    torch.testing.assert_close(answer(opened(placed=True), image), answer(opened(placed=False), image))
    label = torch.zeros(1, 16, 16, 16, dtype=torch.long)
    label[:, 8:] = 1  # which has nothing to do with the intensities
    tuned = opened("decoder").train()
    optimiser = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    for seed in range(40):
        optimiser.zero_grad()
        segmentation_loss(tuned(noise((16, 16, 16), seed=seed)), label).backward()
        optimiser.step()
    right = (answer(tuned, noise((16, 16, 16), seed=99)).argmax(1) == label).float().mean()
    assert right > 0.9


# What is tuned


@pytest.mark.parametrize("groups", [1, 2])
def test_a_low_rank_weight_is_a_convolution_to_few_maps_and_one_back(groups: int) -> None:
    layer = nn.Conv3d(4, 6, 3, padding=1, groups=groups)
    plain = copy.deepcopy(layer)
    low_rank = LowRank(layer.weight, 2, generator())
    add_lora(layer, low_rank)
    image = noise((5, 6, 7), 2, 4)
    torch.testing.assert_close(layer(image), plain(image))
    with torch.no_grad():
        low_rank.b.normal_(generator=generator(1))
    if groups > 1:  # the same A for each group of channels
        few = [F.conv3d(part, low_rank.a.view(2, 2, 3, 3, 3), padding=1) for part in image.chunk(2, 1)]
        back = [F.conv3d(f, b[:, :, None, None, None]) for f, b in zip(few, low_rank.b.chunk(2), strict=True)]
        addition = torch.cat(back, 1)
    else:
        few_maps = F.conv3d(image, low_rank.a.view(2, 4, 3, 3, 3), padding=1)
        addition = F.conv3d(few_maps, low_rank.b[:, :, None, None, None])
    torch.testing.assert_close(layer(image), plain(image) + addition, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_state_holds_the_head_and_what_was_added_to_the_encoder(strategy: Strategy) -> None:
    tuned = opened(strategy, channels=2, classes=3)
    state = tuned.tuned_state()
    encoder = {name for name in state if name.startswith("encoder.")}
    wanted = {"lora": (".lora.a", ".lora.b"), "adapter": (".adapter.",), "decoder": ("none",)}[strategy]
    assert bool(encoder) == (strategy != "decoder")
    assert all(any(part in name for part in wanted) for name in encoder)
    assert {name for name in state if not name.startswith(("encoder.", "head."))} == {"channel_mix.weight"}
    assert state["head.tokens"].shape == (3, 2, 3)
    layers = [m for m in tuned.network.encoder.modules() if isinstance(m, Convolution | nn.Linear)]
    if strategy == "lora":
        assert len(encoder) == 2 * len(layers)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_reach_everything_that_is_tuned(strategy: Strategy) -> None:
    tuned = opened(strategy, channels=2, classes=3).train()
    with torch.no_grad():  # away from the zeros that additions start with
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator()))
    label = torch.randint(3, (1, *SIZE), generator=generator())
    segmentation_loss(tuned(noise(SIZE, 1, 2)), label).backward()
    for name, parameter in tuned.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached == parameter.requires_grad, name


def test_a_frozen_encoder_keeps_nothing_for_gradients() -> None:
    tuned = opened("decoder").train()
    kept = []
    tuned.network.encoder.register_forward_hook(lambda _, __, maps: kept.append(maps["half"].requires_grad))
    tuned(noise(SIZE))
    assert kept == [False]


# Volumes


@pytest.mark.parametrize("size", [(19, 17, 14), (1, 5, 3), (70, 9, 33), (32, 32, 16)])
def test_volumes_of_any_size_come_out_as_they_went_in(size: tuple[int, int, int]) -> None:
    tuned = opened(classes=3)
    seen: list[Any] = []
    tuned.network.encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[2:]))
    logits = answer(tuned, noise(size, 2))
    assert logits.shape == (2, 3, *size)
    assert max(seen[0]) <= 32 and all(side % 16 == 0 for side in seen[0])


def test_what_is_at_a_place_comes_out_at_that_place() -> None:
    """A wrong axis or shift between the volume and the grid would spoil the overlap; the place is left out for that."""
    tuned = opened("decoder", placed=False)
    label = torch.zeros(1, 21, 34, 15, dtype=torch.long)
    label[:, 3:9, 20:30, 4:11] = 1
    image = label[:, None] + 0.05 * noise((21, 34, 15))
    optimiser = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(30):
        optimiser.zero_grad()
        segmentation_loss(tuned.train()(image), label).backward()
        optimiser.step()
    found = answer(tuned, image).argmax(1) == 1
    overlap = 2 * int((found & (label == 1)).sum()) / int(found.sum() + (label == 1).sum())
    assert overlap > 0.85


def test_the_scale_of_the_intensities_does_not_matter() -> None:
    tuned = opened(channels=2)
    image = noise(SIZE, 1, 2)
    torch.testing.assert_close(answer(tuned, 30 * image - 7), answer(tuned, image), rtol=1e-3, atol=1e-3)


def test_channels_start_as_their_mean_or_as_the_one_that_was_chosen() -> None:
    image = noise(SIZE, 1, 2)
    z_scored = (image - image.mean((2, 3, 4), keepdim=True)) / image.std((2, 3, 4), keepdim=True)
    one = opened(channels=1, tuned_longest=16)
    mean = answer(opened(channels=2, tuned_longest=16), image)
    assert not torch.allclose(mean, answer(one, image[:, :1]), atol=1e-2)
    second = opened(channels=2, channel=1, tuned_longest=16)
    torch.testing.assert_close(answer(second, image), answer(one, image[:, 1:]), rtol=1e-3, atol=1e-3)
    both = torch.cat([z_scored[:, :1], z_scored[:, :1]], 1)
    torch.testing.assert_close(
        answer(opened(channels=2, tuned_longest=16), both), answer(one, both[:, :1]), rtol=1e-3, atol=1e-3
    )
    second(image).square().mean().backward()
    assert second.channel_mix is not None and second.channel_mix.weight.grad is not None
    assert second.channel_mix.weight.grad.any()


def test_wrong_input_is_refused_in_one_line() -> None:
    tuned = opened(channels=2)
    for image in (noise(SIZE), noise(SIZE, 1, 3), noise(SIZE, 1, 2)[0]):
        with pytest.raises(DataError, match="opened for .B, 2, X, Y, Z") as caught:
            tuned(image)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ConfigError, match="no channel 2"):
        opened(channels=2, channel=2)
    with pytest.raises(ConfigError, match="tuned_longest >= 16"):
        opened(tuned_longest=15)


# The model


def test_it_takes_patches_or_whole_volumes_with_their_places() -> None:
    model = TinySam3DModel(small_net())
    whole = model.shown("volume")
    assert (model.sees, model.placed) == ("patch", False) and (whole.sees, whole.placed) == ("volume", True)
    assert whole.shown("volume") is whole and whole.shown("patch").sees == "patch"
    assert TinySam3DModel(small_net(), placed=True).sees == "volume"
    heads = [view.tunable(1, 2, Tuning(), SIZE).network.head for view in (model, whole)]
    assert [head.placed for head in heads if isinstance(head, ClassHead)] == [False, True]


def test_a_file_is_read_with_all_options(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_tiny_sam3d(path, small_net())
    model = load_foundation(path, tuned_longest=48, placed=True, longest=32)
    assert isinstance(model, TinySam3DModel)
    assert (model.tuned_longest, model.placed, model.longest) == (48, True, 32)
    torch.manual_seed(0)
    tuned = model.tunable(1, 2, Tuning("decoder"), SIZE)
    kept = read_tiny_sam3d(path).state_dict()
    encoder = {name: value for name, value in tuned.network.state_dict().items() if name.startswith("encoder.")}
    assert encoder and all(torch.equal(value, kept[name]) for name, value in encoder.items())


def test_packaged_weights_learn_a_volume_in_a_few_steps() -> None:
    packaged("tiny-sam3d")
    model = load_foundation("tiny-sam3d")
    assert isinstance(model, TinySam3DModel)
    torch.manual_seed(0)
    tuned = model.tunable(1, 3, Tuning("decoder"), (32, 32, 16)).train()
    axes = torch.meshgrid(*(torch.arange(n) for n in (32, 32, 16)), indexing="ij")
    ball = sum((axis - centre) ** 2 for axis, centre in zip(axes, (12, 18, 8), strict=True))
    label = torch.zeros(1, 32, 32, 16, dtype=torch.long)
    label[0, ball < 60], label[0, ball < 14] = 1, 2
    image = 0.8 * label[:, None] + 0.2 * noise((32, 32, 16))
    optimiser = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(30):
        optimiser.zero_grad()
        segmentation_loss(tuned(image), label).backward()
        optimiser.step()
    found = answer(tuned, image).argmax(1)
    for value in (1, 2):
        hit, here = found == value, label == value
        assert 2 * int((hit & here).sum()) / int(hit.sum() + here.sum()) > 0.7
