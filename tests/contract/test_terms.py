"""What every term promises. A new file in methods/ is picked up here by itself."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import nn

from scarceseg.config import OptimConfig
from scarceseg.engine.loop import build_optimizer
from scarceseg.engine.step import as_called, forward_step, train_step
from scarceseg.methods import METHODS, Term, build_terms
from scarceseg.methods.base import Parts
from scarceseg.methods.semisam import SemiSam
from scarceseg.networks import build_network
from scarceseg.networks.ema import EmaTeacher
from scarceseg.types import Labelled, Step, Unlabelled
from tests.foundation.stub import Stub

NAMES = METHODS.names()
PATCH = (32, 32, 16)


def fields_of(
    name: str, classes: int, rows: int, g: torch.Generator, patch: tuple[int, int, int] = PATCH
) -> dict[str, torch.Tensor]:
    """Random maps of the kinds a term reads, as its stages would leave them."""
    maps = {}
    for key, kind in build_terms(name, {}, classes)[name].field_kinds.items():
        if kind == "label":
            maps[key] = torch.randint(0, classes, (rows, *patch), generator=g).to(torch.uint8)
        elif kind == "probability":
            maps[key] = torch.randn(rows, classes, *patch, generator=g).softmax(1).half()
        else:
            maps[key] = torch.rand(rows, *patch, generator=g)
    return maps


def batch(
    name: str,
    classes: int = 2,
    rows_l: int = 2,
    rows_u: int = 2,
    channels: int = 1,
    seed: int = 0,
    patch: tuple[int, int, int] = PATCH,
) -> tuple[Labelled, Unlabelled]:
    g = torch.Generator().manual_seed(seed)
    shape = (channels, *patch)
    labelled = Labelled(
        torch.randn(rows_l, *shape, generator=g),
        torch.randint(0, classes, (rows_l, *shape[1:]), generator=g),
        tuple(f"l{i}" for i in range(rows_l)),
    )
    image = torch.randn(rows_u, *shape, generator=g)
    names = tuple(f"u{i}" for i in range(rows_u))
    return labelled, Unlabelled(image, names, fields_of(name, classes, rows_u, g, patch))


NETWORKS: dict[str, dict[str, Any]] = {"vnet": {"n_filters": 2}, "unet3d": {"feature_scale": 32}}


def setup(
    name: str, classes: int = 2, channels: int = 1, network: str = "vnet", **arguments: Any
) -> tuple[nn.Module, dict[str, Term]]:
    torch.manual_seed(1)
    student = build_network(network, channels, classes, NETWORKS[network] | arguments)
    last = [module for module in student.modules() if isinstance(module, nn.Conv3d)][-1]
    with torch.no_grad():
        # A fresh network is unsure everywhere; terms that listen to confident voxels need some.
        last.weight.mul_(40)
    terms = build_terms(name, {}, classes)
    for term in terms.values():
        if isinstance(term, SemiSam):
            term.consult([Stub(echo=True)], (1.0, 1.0, 1.0))
        term.attach(student)
    student.train()
    return student, terms


def generator(seed: int = 5) -> torch.Generator:
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def step_of(student: nn.Module, terms: dict[str, Term], data: tuple[Labelled, Unlabelled], t: int = 95) -> Step:
    return forward_step(as_called(student, terms), terms, *data, t, 100, generator())


def total(loss: torch.Tensor | Parts) -> torch.Tensor:
    return loss.ramped + loss.fixed if isinstance(loss, Parts) else loss


def ramped(loss: torch.Tensor | Parts) -> torch.Tensor:
    return loss.ramped if isinstance(loss, Parts) else loss


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("classes", "rows_l", "rows_u", "channels"), [(2, 2, 2, 1), (4, 1, 2, 1), (3, 2, 1, 2)])
def test_finite_scalar_for_any_split(name: str, classes: int, rows_l: int, rows_u: int, channels: int) -> None:
    student, terms = setup(name, classes, channels)
    value = terms[name].loss(step_of(student, terms, batch(name, classes, rows_l, rows_u, channels)))
    if isinstance(value, Parts):
        assert all(part.shape == () and float(part.detach()) >= 0 for part in value)
    loss = total(value)
    assert loss.shape == () and torch.isfinite(loss)
    assert float(loss.detach()) >= 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("network", "patch"), [("vnet", (16, 48, 32)), ("vnet", (48, 32, 16)), ("unet3d", (32, 16, 48))]
)
def test_any_shape_of_patch_and_both_networks(name: str, network: str, patch: tuple[int, int, int]) -> None:
    student, terms = setup(name, network=network)
    assert torch.isfinite(total(terms[name].loss(step_of(student, terms, batch(name, patch=patch)))))


@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_the_student(name: str) -> None:
    student, terms = setup(name)
    data = batch(name)
    # After an update the teacher is no longer the student, so that a term comparing the two has something to say.
    optimizer = build_optimizer(OptimConfig(lr=0.1), student, terms)
    train_step(as_called(student, terms), student, terms, optimizer, data, 3, 100, generator())
    step = step_of(student, terms, data)
    ramped(terms[name].loss(step)).backward()
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert sum(float(g.abs().sum()) for g in gradients) > 0


@pytest.mark.parametrize("name", [n for n in NAMES if "unlabelled" in METHODS.get(n).reads])
def test_gradient_on_unlabelled_voxels(name: str) -> None:
    # The way from the loss to the unlabelled image leads through the student or a head of the term's own.
    assert unlabelled_gradient(name) > 0


def unlabelled_gradient(name: str, of: str | None = None) -> float:
    """Of a term's unlabelled part on the unlabelled image.

    The student has no batch norm: through common statistics a loss of labelled rows alone would have a gradient there too.
    """
    student, terms = setup(name, normalization="none")
    data = batch(name)
    optimizer = build_optimizer(OptimConfig(lr=1e-3), student, terms)
    train_step(as_called(student, terms), student, terms, optimizer, data, 3, 100, generator())
    labelled, unlabelled = data
    image = unlabelled.image.requires_grad_()
    step = step_of(student, terms, (labelled, replace(unlabelled, image=image)))
    ramped(terms[of or name].loss(step)).backward()
    return 0.0 if image.grad is None else float(image.grad.abs().sum())


def test_a_term_that_reads_labelled_rows_alone_would_be_seen() -> None:
    assert unlabelled_gradient("mean-teacher", of="supervised") == 0


def test_teachers_follow_the_student_and_are_not_trained() -> None:
    found = {name for name in NAMES if teachers_follow(name)}
    assert {"mean-teacher", "ua-mt", "acmt", "ict", "bcp", "magicnet"} <= found


def teachers_follow(name: str) -> bool:
    """Whether the term has weight averages; they are looked at before and after a step."""
    student, terms = setup(name)
    teachers = [module for module in terms[name].modules() if isinstance(module, EmaTeacher)]
    trained = {id(p) for p in terms[name].trainable_parameters()}
    before = [[p.clone() for p in teacher.parameters()] for teacher in teachers]
    optimizer = build_optimizer(OptimConfig(lr=0.1), student, terms)
    train_step(as_called(student, terms), student, terms, optimizer, batch(name), 3, 100, generator())
    for teacher, old in zip(teachers, before, strict=True):
        mine = list(teacher.parameters())
        assert not any(p.requires_grad or p.grad is not None or id(p) in trained for p in mine), name
        for was, now, target in zip(old, mine, student.parameters(), strict=True):
            # a = 1 - 1/(t+1) at t = 3
            torch.testing.assert_close(now, 0.75 * was + 0.25 * target, msg=f"{name}: its teacher does not follow")
        assert any(not torch.equal(a, b) for a, b in zip(old, mine, strict=True)), name
    return bool(teachers)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_the_student_and_own_heads_is_trained(name: str) -> None:
    student, terms = setup(name)
    own = {id(p) for p in terms[name].trainable_parameters()}
    total(terms[name].loss(step_of(student, terms, batch(name)))).backward()
    for key, parameter in terms[name].named_parameters():
        if id(parameter) not in own:
            assert parameter.grad is None, f"{key} is frozen and got a gradient"


@pytest.mark.parametrize("name", [n for n in NAMES if "unlabelled" not in METHODS.get(n).reads])
def test_terms_without_unlabelled_rows_ignore_them(name: str) -> None:
    student, terms = setup(name)
    labelled, _ = batch(name)
    step = forward_step(student, terms, labelled, None, 0, 100, generator())
    assert torch.isfinite(terms[name].loss(step))


@pytest.mark.parametrize("name", [n for n in NAMES if not METHODS.get(n).predicts_unlabelled])
def test_rows_whose_output_nobody_wants_are_not_computed(name: str) -> None:
    student, terms = setup(name)
    assert step_of(student, terms, batch(name)).logits_u is None
    terms |= build_terms("mean-teacher", {}, 2)
    terms["mean-teacher"].attach(student)
    assert step_of(student, terms, batch(name)).logits_u is not None


def test_unlabelled_rows_have_no_label() -> None:
    assert {f.name for f in fields(Unlabelled)} == {"image", "case", "fields"}


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_resumed_terms_give_the_same_next_loss(name: str) -> None:
    student, terms = setup(name)
    optimizer = build_optimizer(OptimConfig(), student, terms)
    train_step(as_called(student, terms), student, terms, optimizer, batch(name, seed=1), 3, 100, generator())
    states = {key: {k: v.clone() for k, v in term.state_dict().items()} for key, term in terms.items()}
    weights = {k: v.clone() for k, v in student.state_dict().items()}
    expected = total(terms[name].loss(step_of(student, terms, batch(name, seed=2))))
    other, others = setup(name)
    other.load_state_dict(weights)
    for key, term in others.items():
        term.load_state_dict(states[key])
    assert torch.equal(total(others[name].loss(step_of(other, others, batch(name, seed=2)))), expected)


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
        losses.append(total(terms[name].loss(step_of(student, terms, batch(name)))))
    assert torch.equal(*losses)


@pytest.mark.parametrize("name", NAMES)
def test_documented(name: str) -> None:
    kind = METHODS.get(name)
    assert kind.__doc__ and len(kind.__doc__) > 60
    assert kind.Options.__doc__
