"""The student's batch norm over all rows of a step, or over each kind of rows by itself."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from scarceseg.engine.step import as_called, forward_step
from scarceseg.methods import Term, build_terms
from scarceseg.networks import build_network
from scarceseg.types import Labelled, Step, Unlabelled

PATCH = (32, 32, 16)


def data(rows_u: int = 3) -> tuple[Labelled, Unlabelled]:
    g = torch.Generator().manual_seed(0)
    image = torch.randn(2, 1, *PATCH, generator=g)
    other = 3 + 2 * torch.randn(rows_u, 1, *PATCH, generator=g)
    label = torch.randint(0, 2, (2, *PATCH), generator=g)
    return Labelled(image, label, ("a", "b")), Unlabelled(other, tuple(f"u{i}" for i in range(rows_u)))


def network(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_network("vnet", 1, 2, {"n_filters": 2, "dropout": False, **changes}).train()


def run(
    student: nn.Module, terms: dict[str, Term], labelled: Labelled, unlabelled: Unlabelled | None, split: bool
) -> Step:
    for term in terms.values():
        term.attach(student)
    generator = torch.Generator().manual_seed(1)
    return forward_step(as_called(student, terms), terms, labelled, unlabelled, 3, 10, generator, split)


@pytest.mark.parametrize("split", [True, False])
def test_unlabelled_rows_reach_labelled_ones_through_the_statistics_of_a_common_batch_alone(split: bool) -> None:
    labelled, unlabelled = data()
    unlabelled.image.requires_grad_(True)
    step = run(network(), build_terms("mean-teacher", {}, 2), labelled, unlabelled, split)
    (gradient,) = torch.autograd.grad(step.logits_l.square().mean(), unlabelled.image, allow_unused=True)
    reaches = gradient is not None and bool(gradient.abs().max() > 1e-6)
    assert reaches is not split


def test_each_kind_of_rows_is_normalised_by_itself() -> None:
    labelled, unlabelled = data()
    student = network()
    alone = copy.deepcopy(student)
    step = run(student, build_terms("mean-teacher", {}, 2), labelled, unlabelled, split=True)
    torch.testing.assert_close(step.logits_l, alone(labelled.image))
    torch.testing.assert_close(step.logits_u, alone(unlabelled.image))
    for (name, mine), other in zip(student.named_buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(mine, other, msg=name)  # both kinds went into the running statistics


@pytest.mark.parametrize("method", ["mean-teacher", "cct", "bcp", "magicnet", "ict"])
def test_without_batch_norm_there_is_no_difference(method: str) -> None:
    labelled, unlabelled = data(2)
    steps = []
    for split in (True, False):
        torch.manual_seed(2)
        steps.append(run(network(normalization="groupnorm"), build_terms(method, {}, 2), labelled, unlabelled, split))
    one, two = steps
    torch.testing.assert_close(one.logits_l, two.logits_l)
    if two.logits_u is not None:
        torch.testing.assert_close(one.logits_u, two.logits_u)
    for mine, other in ((one.extra, two.extra), (one.encoded, two.encoded), (one.decoded, two.decoded)):
        assert mine.keys() == other.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], other[name])


def test_labelled_rows_alone_are_one_kind() -> None:
    labelled, _ = data()
    steps = [run(network(), build_terms("supervised", {}, 2), labelled, None, split) for split in (True, False)]
    assert torch.equal(steps[0].logits_l, steps[1].logits_l)
    assert replace(steps[0], labelled=labelled).logits_u is None
