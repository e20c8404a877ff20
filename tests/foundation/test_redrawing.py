"""A head that learns to redraw: the gradient reaches it and nothing else, the original stays, and what is learnt is asked for."""

from __future__ import annotations

import copy

import pytest
import torch

from scarceseg.errors import DataError
from scarceseg.foundation.base import HeadTunable
from scarceseg.foundation.dialogue import Asking
from scarceseg.foundation.redrawing import Redrawing
from scarceseg.foundation.sam_med3d_tuned import SamMed3DModel
from scarceseg.foundation.tiny_sam3d_tuned import TinySam3DModel
from scarceseg.functional.losses import segmentation_loss
from tests.foundation.small import click, lively, noise, same, small_net
from tests.foundation.test_sam_med3d import tiny_network

SIZE = (20, 18, 14)
ISO = (1.0, 1.0, 1.0)
BOTH = Asking(kinds=("uncertainty", "mask"), clicks=2)
KINDS = {
    "tiny-sam3d": lambda: TinySam3DModel(lively(small_net()), longest=32),
    "sam-med3d": lambda: SamMed3DModel(tiny_network()),
}


@pytest.fixture(params=list(KINDS))
def model(request: pytest.FixtureRequest) -> HeadTunable:
    found = KINDS[request.param]()
    assert isinstance(found, HeadTunable)
    return found


def pair(rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Images with a bright box each, and the box drawn too small; labels."""
    label = torch.zeros(rows, *SIZE, dtype=torch.long)
    label[:, 5:15, 4:14, 3:11] = 1
    drawn = torch.zeros(rows, 1, *SIZE)
    drawn[:, :, 7:13, 6:12, 5:9] = 0.95
    return torch.cat([noise(SIZE, rows) * 0.3 + 2.0 * label[:, None], drawn], 1), label


def test_the_gradient_reaches_the_head_alone(model: HeadTunable) -> None:
    before = {name: value.clone() for name, value in model.head.state_dict().items()}
    opened = Redrawing(model, BOTH, ISO)
    image, label = pair()
    segmentation_loss(opened(image), label).backward()
    gradients = [p.grad for p in opened.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    assert sum(bool(g.any()) for g in gradients if g is not None) > len(gradients) / 3
    inner = opened.model
    assert {id(p) for p in opened.parameters()} == {id(p) for p in inner.head.parameters()}
    assert all(torch.equal(value, before[name]) for name, value in model.head.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.head.parameters())


def test_what_embeds_is_shared_and_frozen(model: HeadTunable) -> None:
    opened = Redrawing(model, BOTH, ISO)
    own, other = (vars(m)["network"] for m in (model, opened.model))
    heads = {id(p) for m in (model, opened.model) for p in m.head.parameters()}
    embedding = [p for p in own.parameters() if id(p) not in heads]
    assert embedding and {id(p) for p in embedding} == {id(p) for p in other.parameters() if id(p) not in heads}
    assert not any(p.requires_grad for p in embedding)


def test_it_learns_to_redraw_and_the_frozen_model_answers_so(model: HeadTunable) -> None:
    torch.manual_seed(0)
    opened = Redrawing(model, BOTH, ISO)
    image, label = pair()
    optimizer = torch.optim.AdamW(opened.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = segmentation_loss(opened(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    frozen = opened.frozen()
    assert not any(p.requires_grad for p in frozen.head.parameters())
    prompt = click((10, 9, 7))
    answers = [m.segment(m.embed(image[:1, :1], ISO), [prompt]) for m in (model, frozen)]
    assert not answers[1].logits.requires_grad
    wanted = label[0].bool()
    error = [float((a.probability[0] - wanted.float()).square().mean()) for a in answers]
    assert error[1] < error[0]


def test_rows_without_a_drawing_say_nothing_and_batches_of_them_have_a_gradient_of_0(model: HeadTunable) -> None:
    opened = Redrawing(model, BOTH, ISO)
    image, label = pair()
    image[0, 1] = 0
    logits = opened(image)
    assert not logits[0].any() and logits[1, 1].any() and not logits[:, 0].any()
    image[1, 1] = 0
    segmentation_loss(opened(image), torch.full_like(label, 255)).backward()
    assert all(p.grad is not None and not p.grad.any() for p in opened.parameters())


def test_it_is_asked_as_the_term_asks() -> None:
    asked = []
    model = KINDS["tiny-sam3d"]()
    opened = Redrawing(model, BOTH, ISO)
    segment = opened.model.segment

    def spy(embedding: object, prompts: list, *rest: object) -> object:  # type: ignore[type-arg]
        asked.extend(prompts)
        return segment(embedding, prompts, *rest)  # type: ignore[arg-type]

    opened.model.segment = spy  # type: ignore[assignment,method-assign]
    image, _ = pair()
    with torch.no_grad():
        for _ in range(20):
            opened(image)
    blind = [prompt for prompt in asked if prompt.mask is None]
    assert len(asked) == 40 and 0 < len(blind) < 20  # a fifth
    assert all(prompt.points_voxel is not None and len(prompt.points_voxel) == 1 for prompt in asked)
    places = {tuple(prompt.points_voxel[0].tolist()) for prompt in asked}
    assert len(places) > 5 and all(image[0, 1][tuple(int(v) for v in place)] > 0.5 for place in places)


def test_the_head_goes_into_a_file_and_back(model: HeadTunable) -> None:
    torch.manual_seed(1)
    opened, other = Redrawing(model, BOTH, ISO), Redrawing(model, BOTH, ISO)
    with torch.no_grad():
        for p in opened.parameters():
            p.add_(0.1 * torch.randn_like(p))
    state = copy.deepcopy(opened.tuned_state())
    other.load_tuned_state(state)
    image, prompt = pair()[0][:1, :1], click((10, 9, 7))
    one, two = (m.frozen().segment(m.model.embed(image, ISO), [prompt]) for m in (opened, other))
    same(one, two)
    state.popitem()
    with pytest.raises(DataError, match="1 missing"):
        other.load_tuned_state(state)


def test_a_channel_is_chosen() -> None:
    model = KINDS["tiny-sam3d"]()
    opened = Redrawing(model, BOTH, ISO, channel=1)
    image, _ = pair()
    several = torch.cat([torch.zeros_like(image[:, :1]), image], 1)
    torch.manual_seed(3)
    found = opened(several)
    torch.manual_seed(3)
    torch.testing.assert_close(found, Redrawing(model, BOTH, ISO)(image))
