"""What every foundation model promises. A registered one is picked up here by itself when its weights are in the package.

Those whose weights the user must supply take part as small versions with random weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal, get_args

import pytest
import torch
from torch import nn

from scarceseg.errors import ConfigError, DataError
from scarceseg.foundation import (
    FOUNDATIONS,
    FoundationModel,
    HeadTunable,
    Masks,
    Promptable,
    Tunable,
    TunedModel,
    Tuning,
)
from scarceseg.foundation.base import Embedding, PromptKind, Spacing, Strategy, check_prompts, freeze
from scarceseg.foundation.catalogue import CATALOGUE
from scarceseg.foundation.dialogue import Asking
from scarceseg.foundation.load import load_foundation
from scarceseg.foundation.redrawing import Redrawing
from scarceseg.foundation.sam_med3d_tuned import SamMed3DModel
from scarceseg.foundation.sam_volume import SamOptions, SamPromptable
from scarceseg.foundation.tiny_sam import TinySam
from scarceseg.foundation.tiny_sam3d_tuned import TinySam3DModel
from scarceseg.foundation.weights import find
from scarceseg.functional.losses import segmentation_loss
from scarceseg.types import Prompt
from tests.foundation.small import click, lively, noise, same, small_net, small_sam
from tests.foundation.test_lora import tiny_sam
from tests.foundation.test_sam_med3d import tiny_network

Size = tuple[int, int, int]
Sees = Literal["volume", "patch"]
SIZE: Size = (13, 11, 9)
ISO: Spacing = (1.0, 1.0, 1.0)
STRATEGIES: tuple[Strategy, ...] = ("lora", "decoder", "adapter")

SMALL: dict[str, Callable[[], FoundationModel]] = {
    # Random weights would end the spreading from slice to slice by chance: it goes on here to the last slice.
    "small sam, slices": lambda: SamPromptable(
        lively(tiny_sam()), "sam", SamOptions(stop_quality=0.0, stop_overlap=0.0)
    ),
    "small sam, mosaic": lambda: SamPromptable(lively(tiny_sam()), "sam", SamOptions(view="mosaic")),
    "small sam-med3d": lambda: SamMed3DModel(tiny_network()),
    "small tiny-sam3d": lambda: TinySam3DModel(small_net(), longest=32, tuned_longest=32),
    "small tiny-sam": lambda: TinySam(small_sam()),
}


def _is_here(name: str) -> bool:
    """Whether a registered model needs no file of the user."""
    if name not in CATALOGUE:
        return True
    try:
        return CATALOGUE[name].packaged and find(name).exists()
    except DataError:
        return False


REGISTERED = [name for name in FOUNDATIONS.names() if _is_here(name)]
MODELS: dict[str, FoundationModel] = {}


def model_of(name: str) -> Any:
    """Built once, as in a run; a test that left a trace would show in the others."""
    if name not in MODELS:
        MODELS[name] = SMALL[name]() if name in SMALL else load_foundation(name)
    return MODELS[name]


ALL = [*SMALL, *REGISTERED]
PROMPTABLE = [name for name in ALL if isinstance(model_of(name), Promptable)]
HEADS = [name for name in PROMPTABLE if isinstance(model_of(name), HeadTunable)]
TUNABLE = [name for name in ALL if isinstance(model_of(name), Tunable)]


def networks(model: object) -> Iterator[nn.Module]:
    """The networks an adapter holds, itself or in an adapter inside of it."""
    for part in vars(model).values():
        if isinstance(part, nn.Module):
            yield part
        elif isinstance(part, Promptable | Tunable):
            yield from networks(part)


def weights(model: object) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers, also of those that no file holds."""
    return {
        f"{index}.{name}": value.detach().clone()
        for index, network in enumerate(networks(model))
        for name, value in [*network.named_parameters(), *network.named_buffers()]
    }


def assert_frozen(model: object, before: dict[str, torch.Tensor]) -> None:
    after = weights(model)
    assert after.keys() == before.keys()
    assert [name for name, value in after.items() if not torch.equal(value, before[name])] == []
    for network in networks(model):
        assert [name for name, p in network.named_parameters() if p.requires_grad or p.grad is not None] == []
        assert not any(module.training for module in network.modules())


def prompts_of(model: Promptable, size: Size) -> list[Prompt]:
    """One of each kind the model knows, with different numbers of clicks."""
    x, y, z = (n // 2 for n in size)
    low, high = [n // 4 for n in size], [max(n - 1 - n // 4, n // 4) for n in size]
    mask = torch.zeros(size)
    mask[low[0] : high[0] + 1, low[1] : high[1] + 1, low[2] : high[2] + 1] = 0.9
    offered: dict[PromptKind, list[Prompt]] = {
        "point": [click((x, y, z)), click((x, y, z), (0, 0, 0), (x, 0, z), labels=[1, 0, 0])],
        "box": [Prompt(box_voxel=torch.tensor([low, high]))],
        "mask": [Prompt(mask=mask)],
    }
    return [prompt for kind, some in offered.items() if kind in model.prompt_kinds for prompt in some]


def ask(model: Promptable, image: torch.Tensor, prompts: list[Prompt], spacing: Spacing = ISO) -> Masks:
    """All prompts on the first volume, one by one."""
    embedding = model.embed(image[:1], spacing)
    answers = [model.segment(embedding, [prompt]) for prompt in prompts]
    return Masks(torch.cat([a.logits for a in answers]), torch.cat([a.quality for a in answers]))


# Promptable


@pytest.mark.parametrize("name", PROMPTABLE)
def test_one_mask_for_each_prompt_in_the_frame_of_the_volume(name: str) -> None:
    model = model_of(name)
    prompts = prompts_of(model, SIZE)
    embedding = model.embed(noise(SIZE, 2), ISO)
    assert len(embedding) == 2 and embedding.size == SIZE
    masks = model.segment(embedding.select([0] * len(prompts)), prompts)
    assert masks.logits.shape == (len(prompts), *SIZE) and masks.logits.dtype == torch.float32
    assert masks.quality.shape == (len(prompts),) and masks.quality.dtype == torch.float32
    assert torch.isfinite(masks.logits).all()
    assert ((masks.quality >= 0) & (masks.quality <= 1)).all()
    assert ((masks.probability >= 0) & (masks.probability <= 1)).all()
    assert all(len(value) == len(prompts) for value in masks.memory.values())
    assert model.to(torch.device("cpu")) is model


@pytest.mark.parametrize("name", PROMPTABLE)
def test_a_batch_is_answered_like_its_rows_one_by_one(name: str) -> None:
    model = model_of(name)
    image = noise(SIZE, 2)
    together = model.embed(image, ISO)
    alone = [model.embed(image[row : row + 1], ISO) for row in range(2)]
    prompts = prompts_of(model, SIZE)
    rows = [index % 2 for index in range(len(prompts))]
    answer = model.segment(together.select(rows), prompts)
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        expected = model.segment(alone[row], [prompt])
        same(Masks(answer.logits[index : index + 1], answer.quality[index : index + 1]), expected)
    # The two volumes differ, or this test would say nothing.
    other = model.segment(alone[1], [prompts[0]]).logits
    assert not torch.allclose(answer.logits[:1], other, atol=1e-4)


@pytest.mark.parametrize("name", PROMPTABLE)
def test_rows_can_be_selected_again_and_again(name: str) -> None:
    model = model_of(name)
    prompt = prompts_of(model, SIZE)[0]
    embedding = model.embed(noise(SIZE, 2), ISO)
    both = model.segment(embedding, [prompt] * 2)
    picked = [1, 0, 1, 1]
    answer = model.segment(embedding.select(picked), [prompt] * 4)
    same(answer, Masks(both.logits[picked], both.quality[picked]))
    assert not torch.allclose(both.logits[0], both.logits[1], atol=1e-4)


@pytest.mark.parametrize("name", PROMPTABLE)
def test_embeds_once_for_any_number_of_prompts(name: str) -> None:
    model = model_of(name)
    calls: dict[str, int] = {}
    sizes: dict[str, int] = {}
    handles = []
    for index, network in enumerate(networks(model)):
        for path, module in network.named_modules():
            key = f"{index}.{path}"
            sizes[key] = sum(p.numel() for p in module.parameters())

            def count(*_: object, key: str = key) -> None:
                calls[key] = calls.get(key, 0) + 1

            handles.append(module.register_forward_hook(count))
    try:
        embedding = model.embed(noise(SIZE), ISO)
        encoder = max(calls, key=lambda key: sizes[key])
        assert sizes[encoder] > 0.2 * max(sizes.values()), "embedding should do the expensive part"
        embedded = calls.copy()
        calls.clear()
        prompts = (prompts_of(model, SIZE) * 5)[:10]
        for prompt in prompts:
            model.segment(embedding, [prompt])
        model.segment(embedding.select([0] * 10), prompts)
    finally:
        for handle in handles:
            handle.remove()
    assert calls and not calls.keys() & {key for key in embedded if sizes[key] > 0.05 * sizes[encoder]}


@pytest.mark.parametrize("name", PROMPTABLE)
def test_frozen_means_frozen(name: str) -> None:
    model = model_of(name)
    before = weights(model)
    assert before
    assert_frozen(model, before)
    prompts = prompts_of(model, SIZE)
    with torch.enable_grad():
        embedding = model.embed(noise(SIZE).requires_grad_(True), ISO)
        row = embedding.select([0] * len(prompts))
        first = model.segment(row, prompts)
        masks = model.segment(row, prompts, first)
    for value in (*embedding.features.values(), first.logits, masks.logits, masks.quality, *masks.memory.values()):
        assert not value.requires_grad and value.grad_fn is None
    assert_frozen(model, before)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_of_its_own_learns_and_the_original_stays(name: str) -> None:
    model = model_of(name)
    before = weights(model)
    opened = Redrawing(model, Asking(kinds=("point", "mask")), ISO)
    drawn = torch.zeros(1, 1, *SIZE)
    drawn[:, :, 3:10, 3:8, 3:7] = 0.95
    image = torch.cat([noise(SIZE), drawn], 1)
    label = (drawn[:, 0] > 0.5).long()
    optimizer = torch.optim.SGD(opened.parameters(), lr=0.1)
    segmentation_loss(opened(image), label).backward()
    gradients = {path: p.grad for path, p in opened.named_parameters()}
    assert all(g is not None and torch.isfinite(g).all() for g in gradients.values())
    assert any(g.any() for g in gradients.values() if g is not None)
    optimizer.step()
    prompt = prompts_of(model, SIZE)[0]
    answers = [one.segment(one.embed(image[:, :1], ISO), [prompt]).logits for one in (model, opened.frozen())]
    assert not torch.equal(*answers) and not answers[1].requires_grad
    opened.head.zero_grad(set_to_none=True)
    assert_frozen(model, before)
    assert_frozen(opened.model, weights(opened.model))


@pytest.mark.parametrize("name", PROMPTABLE)
def test_nothing_is_remembered_between_calls(name: str) -> None:
    model = model_of(name)
    prompts = prompts_of(model, SIZE)
    embedding = model.embed(noise(SIZE), ISO)
    kept = {key: value.clone() for key, value in embedding.features.items()}
    first = model.segment(embedding, [prompts[0]])
    for prompt in prompts[1:]:
        model.segment(embedding, [prompt], first)
    model.embed(noise(SIZE, seed=5), (0.5, 1.0, 2.0))
    again = model.segment(embedding, [prompts[0]])
    assert torch.equal(again.logits, first.logits) and torch.equal(again.quality, first.quality)
    assert all(torch.equal(value, kept[key]) for key, value in embedding.features.items())


@pytest.mark.parametrize("name", PROMPTABLE)
@pytest.mark.parametrize(
    ("size", "spacing"),
    [((7, 20, 5), (0.7, 1.0, 3.0)), ((1, 15, 11), ISO), ((18, 9, 1), (1.0, 1.0, 10.0)), ((5, 5, 23), (2.0, 2.0, 0.4))],
)
def test_masks_have_the_grid_of_any_volume(name: str, size: Size, spacing: Spacing) -> None:
    model = model_of(name)
    prompts = prompts_of(model, size)
    corner = click(tuple(n - 1 for n in size))
    masks = ask(model, noise(size), [*prompts, corner], spacing)
    assert masks.logits.shape == (len(prompts) + 1, *size)
    assert torch.isfinite(masks.logits).all()


@pytest.mark.parametrize("name", PROMPTABLE)
@pytest.mark.parametrize(("scale", "shift"), [(3.7, -12.0), (0.02, 0.5)])
def test_the_scale_of_the_intensities_does_not_matter(name: str, scale: float, shift: float) -> None:
    model = model_of(name)
    image = noise(SIZE)
    prompts = prompts_of(model, SIZE)[:2]
    one, other = ask(model, image, prompts), ask(model, scale * image + shift, prompts)
    same(other, one, rtol=0.02, atol=0.01)
    assert not torch.allclose(ask(model, -image, prompts).logits, one.logits, atol=1e-3)


@pytest.mark.parametrize("name", PROMPTABLE)
def test_prompts_outside_the_volume_are_refused(name: str) -> None:
    model = model_of(name)
    embedding = model.embed(noise(SIZE), ISO)
    nan = float("nan")
    for place in ((-1, 0, 0), (13, 5, 5), (6, 11, 5), (6, 5, 9), (6.0, nan, 5.0), (nan, nan, nan)):
        with pytest.raises(DataError, match="outside the volume"):
            model.segment(embedding, [click((6, 5, 4), place)])
        if "box" in model.prompt_kinds:
            for corners in ([(0, 0, 0), place], [place, (12, 10, 8)]):
                with pytest.raises(DataError, match="outside the volume"):
                    model.segment(embedding, [Prompt(box_voxel=torch.tensor(corners))])


@pytest.mark.parametrize("name", PROMPTABLE)
def test_prompts_it_cannot_answer_are_refused(name: str) -> None:
    model = model_of(name)
    embedding = model.embed(noise(SIZE), ISO)
    good = click((6.0, 5.0, 4.0))
    box = torch.tensor([[1.0, 1, 1], [5, 5, 5]])
    bad: list[tuple[list[Prompt], str]] = [
        ([good, good], "expected 1 prompts"),
        ([], "expected 1 prompts"),
        ([Prompt()], "empty prompt"),
        ([Prompt(torch.zeros(2, 3), torch.ones(1))], "one label"),
        ([Prompt(torch.zeros(2, 3))], "one label"),
        ([Prompt(torch.zeros(2, 2), torch.ones(2))], r"\[N, 3\]"),
        ([Prompt(torch.zeros(3), torch.ones(3))], r"\[N, 3\]"),
        ([click((6.0, 5.0, 4.0), labels=[2])], "labels 1"),
        ([click((6.0, 5.0, 4.0), labels=[-1])], "labels 1"),
    ]
    if "box" in model.prompt_kinds:
        bad += [([Prompt(box_voxel=box.flip(0))], "lowest corner"), ([Prompt(box_voxel=box[:1])], "lowest corner")]
    if "mask" in model.prompt_kinds:
        bad += [([Prompt(mask=torch.zeros(11, 13, 9))], "expected the volume's size")]
        bad += [([Prompt(mask=torch.full(SIZE, float("nan")))], "not finite")]
    offered: dict[PromptKind, Prompt] = {
        "point": good,
        "box": Prompt(box_voxel=box),
        "mask": Prompt(mask=torch.ones(SIZE)),
    }
    bad += [([p], f"not understand a {kind}") for kind, p in offered.items() if kind not in model.prompt_kinds]
    for prompts, message in bad:
        with pytest.raises(DataError, match=message) as caught:
            model.segment(embedding, prompts)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", PROMPTABLE)
def test_images_that_are_no_volumes_are_refused(name: str) -> None:
    for image in (noise(SIZE)[0], noise(SIZE)[0, 0]):
        with pytest.raises(DataError, match=r"\[B, C, X, Y, Z\]"):
            model_of(name).embed(image, ISO)


def test_an_unknown_kind_is_refused_in_the_same_words_by_all() -> None:
    class OnlyBoxes(Promptable):
        name = "boxes"
        prompt_kinds: frozenset[PromptKind] = frozenset({"box"})

        def embed(self, image: torch.Tensor, spacing_mm: Spacing) -> Embedding:
            return Embedding({"image": image}, SIZE)

        def segment(self, embedding: Embedding, prompts: Any, previous: Masks | None = None) -> Masks:
            check_prompts(self, embedding, prompts)
            return Masks(embedding.features["image"][:, 0], torch.ones(len(embedding)))

        def to(self, device: torch.device) -> OnlyBoxes:
            return self

    model = OnlyBoxes()
    for prompt, kind in ((click((1.0, 1.0, 1.0)), "point"), (Prompt(mask=torch.ones(SIZE)), "mask")):
        with pytest.raises(DataError, match=f"boxes does not understand a {kind} prompt: use box"):
            model.segment(model.embed(noise(SIZE), ISO), [prompt])


# Tunable


def opened(name: str, strategy: Strategy, channels: int = 1, classes: int = 2, size: Size = SIZE) -> TunedModel:
    torch.manual_seed(3)
    tuned: TunedModel = model_of(name).tunable(channels, classes, Tuning(strategy, 2), size)
    return tuned


def tune(tuned: TunedModel, image: torch.Tensor, label: torch.Tensor, steps: int = 2, lr: float = 1e-2) -> None:
    """As a stage of a run does."""
    tuned.train()
    optimiser = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)
    for _ in range(steps):
        optimiser.zero_grad()
        loss = segmentation_loss(tuned(image), label)
        assert torch.isfinite(loss)
        loss.backward()
        optimiser.step()


@pytest.mark.parametrize("name", TUNABLE)
@pytest.mark.parametrize(("strategy", "channels", "classes"), [("lora", 1, 5), ("decoder", 2, 2), ("adapter", 2, 3)])
def test_tuned_logits_for_any_channels_and_classes(name: str, strategy: Strategy, channels: int, classes: int) -> None:
    tuned = opened(name, strategy, channels, classes).eval()
    with torch.no_grad():
        logits = tuned(noise(SIZE, 1, channels))
    assert logits.shape == (1, classes, *SIZE) and logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
    with pytest.raises(DataError, match="opened for"):
        tuned(noise(SIZE, 1, channels + 1))


# Models of full size take part with one strategy.
@pytest.mark.parametrize(
    ("name", "strategy"), [(n, s) for n in TUNABLE for s in (STRATEGIES if n in SMALL else STRATEGIES[:1])]
)
def test_tuning_changes_what_it_opens_and_nothing_else(name: str, strategy: Strategy) -> None:
    model = model_of(name)
    original = weights(model)
    image = noise(SIZE, 1, 2)
    label = torch.randint(3, (1, *SIZE), generator=torch.Generator().manual_seed(0))
    tuned, other = opened(name, strategy, 2, 3), opened(name, strategy, 2, 3)
    before = copy.deepcopy(tuned.state_dict())
    trained = {key for key, p in tuned.named_parameters() if p.requires_grad}
    assert trained and trained < {key for key, _ in tuned.named_parameters()}, "most of the model stays frozen"
    tune(tuned, image, label)
    assert all(p.grad is None for key, p in tuned.named_parameters() if key not in trained)
    reached = {key for key, p in tuned.named_parameters() if p.grad is not None and float(p.grad.abs().sum()) > 0}
    changed = {key for key, value in tuned.state_dict().items() if not torch.equal(value, before[key])}
    assert reached and changed <= trained and reached <= changed
    assert_frozen(model, original)
    # A second network from the same model knows nothing of the first until it is given its state.
    tuned.eval(), other.eval()
    with torch.no_grad():
        wanted, untouched = tuned(image), other(image)
        assert not torch.allclose(untouched, wanted, atol=1e-4)
        state = tuned.tuned_state()
        assert not any(value.requires_grad for value in state.values())
        other.load_tuned_state(state)
        torch.testing.assert_close(other(image), wanted, rtol=1e-5, atol=1e-5)
    kept = {key: value.clone() for key, value in state.items()}
    tune(other, image, label, steps=1)
    assert all(torch.equal(value, kept[key]) for key, value in state.items()), "a state is a copy"
    first = sorted(state)[0]
    for wrong in ({}, {k: v for k, v in state.items() if k != first}, {**state, first: state[first][..., :0]}):
        with pytest.raises(DataError, match="missing|shape|expected"):
            other.load_tuned_state(wrong)


@pytest.mark.parametrize("name", TUNABLE)
def test_it_says_whether_it_wants_volumes_or_patches(name: str) -> None:
    model = model_of(name)
    assert model.sees in get_args(Sees) and model.shown(model.sees) is model
    for other in set(get_args(Sees)) - {model.sees}:
        if "tiny-sam3d" in name:
            assert model.shown(other).sees == other and model.sees != other, "the first one stays as it is"
        else:
            with pytest.raises(ConfigError, match=f"{model.name} can only be tuned on a {model.sees} at a time"):
                model.shown(other)


SMALL_TUNABLE = [name for name in TUNABLE if name in SMALL]


@pytest.mark.parametrize("name", SMALL_TUNABLE)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("channels", "classes", "size"), [(1, 2, (19, 10, 7)), (2, 4, (5, 17, 12))])
def test_thirty_steps_teach_it_a_label(name: str, strategy: Strategy, channels: int, classes: int, size: Size) -> None:
    """Classes are slabs of their own intensity. The random networks start on a plateau: the loss falls, that is all."""
    tuned = opened(name, strategy, channels, classes, size)
    x = torch.arange(size[0])[:, None, None].expand(size)
    label = (x * classes // size[0])[None]
    image = label[:, None] + 0.1 * noise(size, 1, channels)
    losses = []
    for steps in (0, 30):
        torch.manual_seed(11)
        tune(tuned, image, label, steps, lr=3e-3)
        with torch.no_grad():
            losses.append(float(segmentation_loss(tuned.eval()(image), label)))
    assert losses[1] < losses[0] - 0.01, losses


@pytest.mark.parametrize("name", SMALL_TUNABLE)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_copy_is_tuned_alone_and_a_frozen_one_still_has_its_state(name: str, strategy: Strategy) -> None:
    tuned = opened(name, strategy, 2, 3)
    image, label = noise(SIZE, 1, 2), torch.randint(3, (1, *SIZE), generator=torch.Generator().manual_seed(0))
    tune(tuned, image, label, 1)
    twin = freeze(copy.deepcopy(tuned))
    assert isinstance(twin, TunedModel)
    kept = twin.tuned_state()
    with torch.no_grad():
        wanted = tuned.eval()(image)
        torch.testing.assert_close(twin(image), wanted, rtol=1e-5, atol=1e-5)
    tune(tuned, image, label, 1)
    assert kept.keys() == tuned.tuned_state().keys()
    assert all(torch.equal(value, kept[key]) for key, value in twin.tuned_state().items())
    assert any(not torch.equal(value, kept[key]) for key, value in tuned.tuned_state().items())


@pytest.mark.parametrize("name", SMALL_TUNABLE)
def test_a_tuned_batch_is_predicted_like_its_rows(name: str) -> None:
    tuned = opened(name, "lora", 2, 3).eval()
    image = noise(SIZE, 2, 2)
    with torch.no_grad():
        together, alone = tuned(image), torch.cat([tuned(row[None]) for row in image])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4 * float(1 + alone.std()))
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)


@pytest.mark.parametrize("name", TUNABLE)
def test_impossible_tunings_are_refused(name: str) -> None:
    model = model_of(name)
    good = Tuning("lora", 2)
    for channels, classes, tuning in (
        (0, 2, good),
        (1, 1, good),
        (1, 2, replace(good, rank=0)),
        (1, 2, replace(good, strategy="everything")),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError) as caught:
            model.tunable(channels, classes, tuning, SIZE)
        assert len(str(caught.value).splitlines()) == 1


def test_every_registered_model_is_tested_or_lacks_its_weights() -> None:
    for name in set(FOUNDATIONS.names()) - set(REGISTERED):
        with pytest.raises(DataError, match="not on this machine"):
            load_foundation(name)
