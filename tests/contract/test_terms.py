"""What every term promises. A new file in methods/ is picked up here by itself."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import nn

from scarceseg.config import OptimConfig
from scarceseg.engine.loop import build_optimizer, forward_step, train_step
from scarceseg.methods import METHODS, Term, build_terms
from scarceseg.networks import build_network
from scarceseg.types import Labelled, Step, Unlabelled

NAMES = METHODS.names()
PATCH = (32, 32, 16)


def batch(
    classes: int = 2, rows_l: int = 2, rows_u: int = 2, channels: int = 1, seed: int = 0
) -> tuple[Labelled, Unlabelled]:
    g = torch.Generator().manual_seed(seed)
    shape = (channels, *PATCH)
    labelled = Labelled(
        torch.randn(rows_l, *shape, generator=g),
        torch.randint(0, classes, (rows_l, *shape[1:]), generator=g),
        tuple(f"l{i}" for i in range(rows_l)),
    )
    return labelled, Unlabelled(torch.randn(rows_u, *shape, generator=g), tuple(f"u{i}" for i in range(rows_u)))


def setup(name: str, classes: int = 2, channels: int = 1) -> tuple[nn.Module, dict[str, Term]]:
    torch.manual_seed(1)
    student = build_network("vnet", channels, classes, {"n_filters": 2})
    with torch.no_grad():
        # A fresh network is unsure everywhere; terms that listen to confident voxels need some.
        student.out_conv.weight.mul_(40)
    terms = build_terms(name, {}, classes)
    for term in terms.values():
        term.attach(student)
    student.train()
    return student, terms


def generator(seed: int = 5) -> torch.Generator:
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def step_of(student: nn.Module, terms: dict[str, Term], data: tuple[Labelled, Unlabelled], t: int = 95) -> Step:
    return forward_step(student, terms, *data, t, 100, generator())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("classes", "rows_l", "rows_u", "channels"), [(2, 2, 2, 1), (4, 1, 2, 1), (3, 2, 1, 2)])
def test_finite_scalar_for_any_split(name: str, classes: int, rows_l: int, rows_u: int, channels: int) -> None:
    student, terms = setup(name, classes, channels)
    loss = terms[name].loss(step_of(student, terms, batch(classes, rows_l, rows_u, channels)))
    assert loss.shape == () and torch.isfinite(loss)
    assert float(loss.detach()) >= 0


@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_the_student(name: str) -> None:
    student, terms = setup(name)
    data = batch()
    # After an update the teacher is no longer the student, so that a term comparing the two has something to say.
    optimizer = build_optimizer(OptimConfig(lr=0.1), student, terms)
    train_step(student, student, terms, optimizer, data, 3, 100, generator())
    step = step_of(student, terms, data)
    assert step.logits_u is not None
    terms[name].loss(step).backward()
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert sum(float(g.abs().sum()) for g in gradients) > 0


@pytest.mark.parametrize("name", [n for n in NAMES if "unlabelled" in METHODS.get(n).reads])
def test_gradient_on_unlabelled_voxels(name: str) -> None:
    student, terms = setup(name)
    data = batch()
    optimizer = build_optimizer(OptimConfig(lr=0.1), student, terms)
    train_step(student, student, terms, optimizer, data, 3, 100, generator())
    step = step_of(student, terms, data)
    assert step.logits_u is not None
    step.logits_u.retain_grad()
    terms[name].loss(step).backward()
    assert step.logits_u.grad is not None and float(step.logits_u.grad.abs().sum()) > 0


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_the_student_and_own_heads_is_trained(name: str) -> None:
    student, terms = setup(name)
    own = {id(p) for p in terms[name].trainable_parameters()}
    terms[name].loss(step_of(student, terms, batch())).backward()
    for key, parameter in terms[name].named_parameters():
        if id(parameter) not in own:
            assert parameter.grad is None, f"{key} is frozen and got a gradient"


@pytest.mark.parametrize("name", [n for n in NAMES if "unlabelled" not in METHODS.get(n).reads])
def test_terms_without_unlabelled_rows_ignore_them(name: str) -> None:
    student, terms = setup(name)
    labelled, _ = batch()
    step = forward_step(student, terms, labelled, None, 0, 100, generator())
    assert torch.isfinite(terms[name].loss(step))


def test_unlabelled_rows_have_no_label() -> None:
    assert {f.name for f in fields(Unlabelled)} == {"image", "case", "fields"}


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_resumed_terms_give_the_same_next_loss(name: str) -> None:
    student, terms = setup(name)
    optimizer = build_optimizer(OptimConfig(), student, terms)
    train_step(student, student, terms, optimizer, batch(seed=1), 3, 100, generator())
    states = {key: {k: v.clone() for k, v in term.state_dict().items()} for key, term in terms.items()}
    weights = {k: v.clone() for k, v in student.state_dict().items()}
    expected = terms[name].loss(step_of(student, terms, batch(seed=2)))
    other, others = setup(name)
    other.load_state_dict(weights)
    for key, term in others.items():
        term.load_state_dict(states[key])
    assert torch.equal(others[name].loss(step_of(other, others, batch(seed=2))), expected)


@pytest.mark.parametrize("name", NAMES)
def test_randomness_comes_from_the_seeds(name: str) -> None:
    student, terms = setup(name)
    weights = {k: v.clone() for k, v in student.state_dict().items()}
    states = {key: {k: v.clone() for k, v in term.state_dict().items()} for key, term in terms.items()}
    losses = []
    for _ in range(2):
        student.load_state_dict(weights)
        for key, term in terms.items():
            term.load_state_dict(states[key])
        losses.append(terms[name].loss(step_of(student, terms, batch())))
    assert torch.equal(*losses)


@pytest.mark.parametrize("name", NAMES)
def test_documented(name: str) -> None:
    kind = METHODS.get(name)
    assert kind.__doc__ and len(kind.__doc__) > 60
    assert kind.Options.__doc__
