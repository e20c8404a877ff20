"""Whole optimisation steps against the published scripts: forward, sum, update, EMA, batch-norm buffers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from scarceseg.config import OptimConfig, read_recipe
from scarceseg.engine.loop import build_optimizer
from scarceseg.engine.step import train_step
from scarceseg.functional.ramps import ema_alpha
from scarceseg.methods import build_terms
from scarceseg.methods.mean_teacher import MeanTeacher
from scarceseg.networks import build_network
from scarceseg.types import Labelled, Unlabelled

OPTIONS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "uamt_start3000": ("ua-mt", {"ua-mt": {"samples": "all"}}),
    "sfr_start2499": (
        "mean-teacher+sfr",
        {**read_recipe("la-1")["terms"], "mean-teacher": {"samples": "all"}},
    ),
    "mt_ssl4mis_start0": ("mean-teacher", {"supervised": {"background": True}, "mean-teacher": {"ramp_epochs": 200}}),
}


def wave(frequency: float, phase: float, shape: tuple[int, ...]) -> torch.Tensor:
    n = np.arange(np.prod(shape), dtype=np.float64)
    return torch.from_numpy((0.2 * np.sin(frequency * n + phase)).astype(np.float32).reshape(shape))


class StoredNoise:
    """The reference's noise formula in the place of random noise: first the teacher's pass, then the Monte-Carlo ones."""

    def __init__(self) -> None:
        self.step = 0
        self.calls = 0

    def __call__(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        self.calls += 1
        if self.calls == 1:
            return x + wave(0.9, 0.1 * self.step, tuple(x.shape))
        return x + wave(0.7, 0.3 * self.step, (4, *x.shape))[self.calls - 2]


@pytest.mark.parametrize("case", sorted(OPTIONS))
def test_two_steps(shared: Path, case: str) -> None:
    folder = shared / "conformance" / "train_step"
    config = json.loads((folder / f"{case}.json").read_text())["config"]
    with np.load(folder / f"{case}.npz") as file:
        data = dict(file)
    method, options = OPTIONS[case]
    student = build_network("vnet", 1, 2, {"n_filters": 1, "dropout": False})
    student.load_state_dict(load_file(folder / f"{case}_student_before.safetensors"))
    terms = build_terms(method, options, 2)
    for term in terms.values():
        term.attach(student)
    base = method.split("+")[0]
    teacher_term = terms[base]
    assert isinstance(teacher_term, MeanTeacher)
    teacher_term.teacher.network.load_state_dict(load_file(folder / f"{case}_teacher_before.safetensors"))
    noise = StoredNoise()
    teacher_term.perturb = noise  # type: ignore[method-assign]
    student.train()
    optimizer = build_optimizer(OptimConfig(), student, terms)
    rows = config["labeled_bs"]
    for k in range(config["steps"]):
        noise.step, noise.calls = k, 0
        t = config["start_iteration"] + k
        optimizer.param_groups[0]["lr"] = float(data["lr"][k])
        x, y = torch.from_numpy(data[f"x_{k}"]), torch.from_numpy(data[f"y_{k}"]).long()
        # The reference's labels of a patch made on the fly arrive as the field that a stage would have left.
        fields = {"sfr/label": torch.from_numpy(data[f"pseudo_{k}"])} if "sfr" in terms else {}
        batch = (Labelled(x[:rows], y[:rows], ("a",) * rows), Unlabelled(x[rows:], ("b",) * (len(x) - rows), fields))
        report = train_step(student, student, terms, optimizer, batch, t, config["max_iterations"], torch.Generator())
        assert float(report["loss"]) == pytest.approx(data["loss"][k], rel=1e-5)
        assert float(report["loss/supervised"]) == pytest.approx(data["loss_sup"][k], rel=1e-5)
        assert float(report[f"loss/{base}"]) == pytest.approx(data["consistency_dist"][k], rel=1e-4)
        if "sfr" in terms:
            assert float(report["loss/sfr"]) == pytest.approx(data["loss_pseudo"][k], rel=1e-5)
        assert float(report[f"weight/{base}"]) == pytest.approx(data["consistency_weight"][k], rel=1e-6)
        assert ema_alpha(t, teacher_term.teacher.decay) == pytest.approx(data["alpha"][k], rel=1e-12)
    for network, name in ((student, "student"), (teacher_term.teacher.network, "teacher")):
        expected = load_file(folder / f"{case}_{name}_after.safetensors")
        for key, value in network.state_dict().items():
            torch.testing.assert_close(value, expected[key], atol=3e-4, rtol=0, msg=f"{name} {key}")
