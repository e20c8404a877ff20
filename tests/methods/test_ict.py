"""Interpolation consistency against its equation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from scarceseg.methods import build_terms
from scarceseg.methods.ict import Ict, beta
from scarceseg.networks.ema import EmaTeacher
from scarceseg.types import Labelled, Step, Unlabelled
from tests.reference import consistency as oracle

SHAPE = (4, 3, 5)


class Given(nn.Module):
    """Returns the same logits whatever it is asked, and remembers the question."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.asked: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.asked = x
        return self.logits


def rows(labelled: int, unlabelled: int) -> tuple[Labelled, Unlabelled]:
    g = torch.Generator().manual_seed(3)
    image = torch.randn(labelled + unlabelled, 2, *SHAPE, generator=g)
    label = torch.zeros(labelled, *SHAPE, dtype=torch.long)
    return Labelled(image[:labelled], label, ("a",) * labelled), Unlabelled(image[labelled:], ("u",) * unlabelled)


def term_of(classes: int, teacher: torch.Tensor) -> Ict:
    term = build_terms("ict", {}, classes)["ict"]
    assert isinstance(term, Ict)
    term.teacher = EmaTeacher(Given(teacher))
    return term


def step_of(labelled: Labelled, unlabelled: Unlabelled, mixed: torch.Tensor) -> Step:
    k = mixed.shape[1]
    return Step(
        iteration=0,
        total=10,
        labelled=labelled,
        unlabelled=unlabelled,
        logits_l=torch.zeros(len(labelled.image), k, *SHAPE),
        logits_u=torch.zeros(len(unlabelled.image), k, *SHAPE),
        generator=torch.Generator(),
        extra={"ict": mixed},
    )


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_equation(classes: int, count: int) -> None:
    labelled, unlabelled = rows(2, count)
    pool = unlabelled.image if count > 1 else torch.cat([unlabelled.image, labelled.image[:1]])
    g = torch.Generator().manual_seed(1)
    teacher, mixed = (torch.randn(n, classes, *SHAPE, generator=g) for n in (len(pool), count))
    term = term_of(classes, teacher)
    images = term.extra_inputs(labelled, unlabelled, torch.Generator().manual_seed(7))
    assert images is not None and images.shape == unlabelled.image.shape
    # The share of each row, read back from the images.
    a, b = pool.numpy()[:count], np.roll(pool.numpy(), -1, axis=0)[:count]
    shares = np.median((images.numpy() - b) / (a - b), axis=(1, 2, 3, 4))
    assert ((shares >= 0) & (shares <= 1)).all() and len(set(shares)) == count
    weights = shares[:, None, None, None, None]
    np.testing.assert_allclose(images.numpy(), weights * a + (1 - weights) * b, atol=1e-5)
    loss = term.loss(step_of(labelled, unlabelled, mixed))
    assert float(loss) == pytest.approx(oracle.ict(mixed.numpy(), teacher.numpy(), shares), rel=1e-4)
    assert isinstance(term.teacher.network, Given) and term.teacher.network.asked is not None
    assert torch.equal(term.teacher.network.asked, pool), "the teacher sees the rows as they are"


def test_a_mixture_that_is_matched_costs_nothing() -> None:
    labelled, unlabelled = rows(1, 2)
    teacher = torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(1))
    term = term_of(3, teacher)
    images = term.extra_inputs(labelled, unlabelled, torch.Generator().manual_seed(7))
    assert images is not None and term._mixed is not None
    share = term._mixed[1].view(-1, 1, 1, 1, 1)
    p = teacher.softmax(1)
    loss = term.loss(step_of(labelled, unlabelled, (share * p + (1 - share) * p.flip(0)).log()))
    assert float(loss) < 1e-12


def test_shares_follow_the_beta_distribution_and_the_seed() -> None:
    g = torch.Generator().manual_seed(0)
    drawn = beta(0.2, 20000, g)
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)).
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(drawn.var()) == pytest.approx(1 / (4 * 1.4), abs=0.01)
    assert not torch.equal(beta(0.2, 4, g), beta(0.2, 4, g))
    assert torch.equal(beta(0.2, 4, g.manual_seed(5)), beta(0.2, 4, torch.Generator().manual_seed(5)))


def test_shares_of_another_step_are_never_used() -> None:
    labelled, unlabelled = rows(1, 2)
    logits = torch.zeros(2, 2, *SHAPE)
    term = term_of(2, logits)
    with pytest.raises(ValueError, match="extra_inputs"):
        term.loss(step_of(labelled, unlabelled, logits))
    term.extra_inputs(labelled, unlabelled, torch.Generator())
    with pytest.raises(ValueError, match="extra_inputs"):
        term.loss(step_of(labelled, rows(1, 2)[1], logits))
    assert term.extra_inputs(labelled, None, torch.Generator()) is None
