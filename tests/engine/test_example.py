"""The single-file example and the engine are two writings of the same method: they must give the same losses."""

from __future__ import annotations

import copy
import importlib.util
from itertools import islice
from pathlib import Path

import pytest
import torch

from scarceseg.config import OptimConfig
from scarceseg.engine.loop import build_optimizer, learning_rate
from scarceseg.engine.step import train_step
from scarceseg.methods import build_terms
from scarceseg.methods.mean_teacher import MeanTeacher
from scarceseg.types import Labelled, Unlabelled


def test_example_gives_the_losses_of_the_engine() -> None:
    path = Path(__file__).resolve().parents[2] / "examples" / "mean_teacher_in_one_file.py"
    spec = importlib.util.spec_from_file_location("example", path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    total = 12
    batches = list(islice(example.made_up_batches(16), total))
    torch.manual_seed(0)
    student = example.small_network(4)
    twin = copy.deepcopy(student)

    def fixed(x: torch.Tensor) -> torch.Tensor:
        return 0.2 * torch.sin(torch.arange(x.numel(), dtype=x.dtype)).reshape(x.shape)

    theirs = example.train(twin, iter(batches), total, noise=fixed)
    terms = build_terms("mean-teacher", {}, 2)
    for term in terms.values():
        term.attach(student)
    teacher_term = terms["mean-teacher"]
    assert isinstance(teacher_term, MeanTeacher)
    teacher_term.perturb = lambda x, generator: x + fixed(x)  # type: ignore[method-assign]
    optim = OptimConfig()
    optimizer = build_optimizer(optim, student, terms)
    student.train()
    for t, (x_l, y_l, x_u) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = learning_rate(optim, t, total)
        batch = (Labelled(x_l, y_l, ("a", "b")), Unlabelled(x_u, ("c", "d")))
        report = train_step(student, student, terms, optimizer, batch, t, total, torch.Generator())
        assert float(report["loss/supervised"]) == pytest.approx(theirs[t][0], rel=1e-4)
        assert float(report["loss/mean-teacher"]) == pytest.approx(theirs[t][1], rel=1e-3, abs=1e-9)
    assert theirs[-1][1] > 0
