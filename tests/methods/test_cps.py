"""Cross pseudo supervision against its equation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scarceseg.config import OptimConfig
from scarceseg.engine.loop import build_optimizer
from scarceseg.engine.step import train_step
from scarceseg.methods import build_terms
from scarceseg.methods.cps import Cps
from scarceseg.networks import build_network
from scarceseg.types import Labelled, Step, Unlabelled
from tests.reference import consistency as oracle
from tests.reference.losses import cross_entropy, dice_loss

SHAPE = (4, 3, 5)


class Given(nn.Module):
    """A network that always returns the same logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert len(x) == len(self.logits)
        return self.logits


def step_of(student: torch.Tensor, label: torch.Tensor) -> Step:
    rows = len(label)
    return Step(
        iteration=0,
        total=10,
        labelled=Labelled(torch.zeros(rows, 1, *SHAPE), label, ("a",) * rows),
        unlabelled=Unlabelled(torch.zeros(len(student) - rows, 1, *SHAPE), ("b",) * (len(student) - rows)),
        logits_l=student[:rows],
        logits_u=student[rows:],
        generator=torch.Generator(),
    )


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("samples", ["unlabelled", "all"])
@pytest.mark.parametrize("background", [False, True])
def test_equation(classes: int, samples: str, background: bool) -> None:
    g = torch.Generator().manual_seed(0)
    first, second = (torch.randn(3, classes, *SHAPE, generator=g) for _ in range(2))
    label = torch.randint(0, classes, (2, *SHAPE), generator=g)
    label[0, 0] = 255
    term = build_terms("cps", {"cps": {"samples": samples, "background": background}}, classes)["cps"]
    assert isinstance(term, Cps)
    term.second = Given(second)
    first.requires_grad_()
    cross, own = term.loss(step_of(first, label))
    start = 0 if samples == "all" else 2
    a, b = first.detach().numpy(), second.numpy()
    assert float(cross.detach()) == pytest.approx(oracle.cps(a[start:], b[start:]), rel=1e-5)
    supervised = 0.5 * (cross_entropy(b[:2], label.numpy()) + dice_loss(b[:2], label.numpy(), background))
    assert float(own.detach()) == pytest.approx(supervised, rel=1e-5)
    own.backward(retain_graph=True)
    assert first.grad is None, "the labels teach the second network alone"
    cross.backward()
    assert first.grad is not None and term.second.logits.grad is not None
    assert float(first.grad[2:].abs().sum()) > 0
    assert (float(first.grad[:2].abs().sum()) > 0) == (samples == "all")


def test_the_second_network_starts_elsewhere_and_is_trained() -> None:
    torch.manual_seed(0)
    student = build_network("vnet", 1, 3, {"n_filters": 2})
    # With weight 0 only the supervision of its own is left for the second network.
    terms = build_terms("cps", {"cps": {"weight": 0.0}, "supervised": {"weight": 0.0}}, 3)
    for term in terms.values():
        term.attach(student)
    second = terms["cps"].second
    assert isinstance(second, nn.Module)
    mine, theirs = dict(student.named_parameters()), dict(second.named_parameters())
    assert mine.keys() == theirs.keys()
    assert not any(torch.equal(mine[k], theirs[k]) for k in mine if k.endswith("weight") and mine[k].ndim == 5)
    before = [{k: v.detach().clone() for k, v in net.named_parameters()} for net in (student, second)]
    x = torch.randn(4, 1, 16, 16, 16)
    batch = (
        Labelled(x[:2], torch.randint(0, 3, (2, 16, 16, 16)), ("a", "b")),
        Unlabelled(x[2:], ("c", "d")),
    )
    optimizer = build_optimizer(OptimConfig(weight_decay=0.0), student, terms)
    report = train_step(student, student, terms, optimizer, batch, 0, 10, torch.Generator())
    assert float(report["loss"]) == pytest.approx(float(report["own/cps"]))
    assert all(torch.equal(before[0][k], v) for k, v in student.named_parameters())
    assert not all(torch.equal(before[1][k], v) for k, v in second.named_parameters())
