"""The terms against their equations, and how a sum is put together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from scarceseg.engine.run import train
from scarceseg.errors import ConfigError
from scarceseg.methods import build_terms, parse_method
from scarceseg.methods.base import METHODS, TermOptions
from scarceseg.methods.mean_teacher import MeanTeacher
from scarceseg.methods.supervised import Supervised
from scarceseg.networks.ema import EmaTeacher
from scarceseg.show import plan_dataset
from scarceseg.types import Labelled, Step, Unlabelled
from tests.reference import losses as oracle
from tests.tiny import tiny_config, tiny_dataset


class Scripted(nn.Module):
    """A 'network' that returns prepared logits, one after the other, repeated to the rows asked for."""

    def __init__(self, outputs: list[torch.Tensor]) -> None:
        super().__init__()
        self.outputs = list(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outputs.pop(0)


def scripted_step(classes: int, t: int = 30, total: int = 100, seed: int = 0) -> tuple[Step, torch.Generator]:
    g = torch.Generator().manual_seed(seed)
    shape = (4, 3, 5)
    return (
        Step(
            iteration=t,
            total=total,
            labelled=Labelled(torch.zeros(1, 1, *shape), torch.zeros(1, *shape, dtype=torch.long), ("a",)),
            unlabelled=Unlabelled(torch.zeros(2, 1, *shape), ("b", "c")),
            logits_l=torch.randn(1, classes, *shape, generator=g),
            logits_u=torch.randn(2, classes, *shape, generator=g),
            generator=torch.Generator(),
        ),
        g,
    )


def with_teacher(name: str, classes: int, outputs: list[torch.Tensor]) -> MeanTeacher:
    term = build_terms(name, {}, classes)[name]
    assert isinstance(term, MeanTeacher)
    term.teacher = EmaTeacher(Scripted(outputs))
    return term


@pytest.mark.parametrize("classes", [2, 3])
def test_mean_teacher_equation(classes: int) -> None:
    step, g = scripted_step(classes)
    teacher = torch.randn(2, classes, 4, 3, 5, generator=g)
    assert step.logits_u is not None
    ours = with_teacher("mean-teacher", classes, [teacher]).loss(step)
    assert float(ours) == pytest.approx(oracle.mean_teacher(step.logits_u.numpy(), teacher.numpy()), rel=1e-5)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("t", [0, 30, 99])
def test_ua_mt_equation(classes: int, t: int) -> None:
    step, g = scripted_step(classes, t)
    assert step.logits_u is not None
    # Sharp enough that some voxels pass the threshold and some do not.
    teacher = 2 * torch.randn(2, classes, 4, 3, 5, generator=g)
    base = (4 * torch.randn(2, classes, 4, 3, 5, generator=g)).repeat(2, 1, 1, 1, 1)
    passes = [base + torch.randn(4, classes, 4, 3, 5, generator=g) for _ in range(4)]
    single = [half.numpy() for output in passes for half in output.split(2)]
    ours = with_teacher("ua-mt", classes, [teacher, *passes]).loss(step)
    expected = oracle.ua_mt(step.logits_u.numpy(), teacher.numpy(), single, t, 100)
    assert expected > 0
    assert float(ours) == pytest.approx(expected, rel=1e-5)


def test_ua_mt_differs_from_mean_teacher() -> None:
    step, g = scripted_step(2, t=0)
    assert step.logits_u is not None
    teacher = torch.randn(2, 2, 4, 3, 5, generator=g)
    sure = 5 * torch.randn(4, 2, 4, 3, 5, generator=g)
    masked = with_teacher("ua-mt", 2, [teacher, sure, sure, sure, sure]).loss(step)
    plain = with_teacher("mean-teacher", 2, [teacher]).loss(step)
    assert not torch.isclose(masked, plain)


def test_ema_follows_the_equation_and_never_becomes_zero() -> None:
    student = nn.Linear(3, 2)
    teacher = EmaTeacher(student, decay=0.9)
    expected = {k: v.detach().clone().numpy() for k, v in student.named_parameters()}
    for t in range(25):
        with torch.no_grad():
            for p in student.parameters():
                p.add_(torch.randn_like(p))
        teacher.update(student, t)
        a = min(1 - 1 / (t + 1), 0.9)
        for key, value in student.named_parameters():
            expected[key] = a * expected[key] + (1 - a) * value.detach().numpy()
    for key, value in teacher.network.named_parameters():
        np.testing.assert_allclose(value.numpy(), expected[key], rtol=1e-5)
        assert float(value.abs().sum()) > 0
        assert not value.requires_grad


def test_teacher_batch_norm_modes() -> None:
    student = nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2))
    batch, running = EmaTeacher(student), EmaTeacher(student, norm="running")
    for teacher in (batch, running):
        teacher.eval().train()  # what the loop or the user asks must not matter
    before = running.network[1].running_mean.clone()  # type: ignore[union-attr,index]
    for teacher in (batch, running):
        teacher(torch.randn(2, 1, 3, 3, 3) + 4)
    assert not torch.equal(batch.network[1].running_mean, before)  # type: ignore[index]
    assert torch.equal(running.network[1].running_mean, before)  # type: ignore[index]
    student(torch.randn(2, 1, 3, 3, 3) - 4)
    for teacher in (batch, running):
        teacher.update(student, 5)
    assert torch.equal(running.network[1].running_mean, student[1].running_mean)  # type: ignore[index]
    assert not torch.equal(batch.network[1].running_mean, student[1].running_mean)  # type: ignore[index]


def test_sums() -> None:
    assert parse_method("mean-teacher") == ["supervised", "mean-teacher"]
    assert parse_method("ua-mt+supervised") == ["supervised", "ua-mt"]
    for wrong, word in (
        ("meanteacher", "mean-teacher"),
        ("mean-teacher+", "empty"),
        ("ua-mt+ua-mt", "twice"),
        ("uamt", "ua-mt"),
    ):
        with pytest.raises(ConfigError, match=word):
            parse_method(wrong)
    with pytest.raises(ConfigError, match="not part of method"):
        build_terms("supervised", {"mean-teacher": {"weight": 1.0}}, 2)
    with pytest.raises(ConfigError, match="noise_std"):
        build_terms("mean-teacher", {"mean-teacher": {"noise_sd": 1.0}}, 2)
    with pytest.raises(ConfigError, match="weight"):
        build_terms("mean-teacher", {"mean-teacher": {"weight": -1}}, 2)


def test_weights_belong_to_the_recipe() -> None:
    term = build_terms("mean-teacher", {"mean-teacher": {"weight": 0.5, "ramp": "constant"}}, 2)["mean-teacher"]
    assert term.weight(0, 10) == 0.5
    ramped = build_terms("mean-teacher", {}, 2)["mean-teacher"]
    assert ramped.weight(0, 6000) < ramped.weight(3000, 6000) < ramped.weight(5999, 6000) <= 0.1


def test_an_own_term_may_ask_for_a_number_of_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Several(Supervised):
        def __init__(self, options: TermOptions, classes: int) -> None:
            super().__init__(options, classes)
            assert classes == 4

    monkeypatch.setitem(METHODS._parts, "several", Several)
    config = tiny_config(tiny_dataset(tmp_path / "data", classes=4), method="several", iterations=1)
    plan_dataset(config)
    assert train(config, tmp_path / "run").folder.exists()
