"""Losses and schedules against the arrays of the published implementations."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from scarceseg.functional import losses, ramps
from scarceseg.functional.uncertainty import entropy, masked_mean
from tests.reference import losses as oracle


def load(shared: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(shared / "conformance" / "losses_schedules" / f"{name}.npz") as file:
        return dict(file)


def close(value: torch.Tensor, expected: np.ndarray, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    np.testing.assert_allclose(value.detach().numpy(), expected.reshape(tuple(value.shape)), rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", ["dice_c2", "dice_c4"])
def test_dice_and_cross_entropy(shared: Path, name: str) -> None:
    data = load(shared, name)
    logits = torch.from_numpy(data["logits"]).requires_grad_()
    label, holes = (torch.from_numpy(data[key]).long() for key in ("label", "label_ignore"))
    p = logits.softmax(1)
    for smooth, key in ((1e-10, "dice_sfr"), (1e-5, "dice_ssl4mis")):
        close(losses.dice_loss(p, label, background=True, smooth=smooth), data[key])
        faithful = losses.dice_loss(p, holes, background=True, smooth=smooth, mask_ignored=False)
        close(faithful, data[f"{key}_ignore"])
    close(losses.dice_loss(p, holes, background=True, smooth=1e-10), data["dice_masked_corrected"])
    close(losses.cross_entropy(logits, label), data["ce"])
    close(losses.cross_entropy(logits, holes), data["ce_ignore"])
    total = losses.segmentation_loss(logits, holes, background=True, mask_ignored=False, smooth=1e-10)
    close(total, data["sfr_sam_loss"])
    (gradient,) = torch.autograd.grad(total, logits)
    close(gradient, data["sfr_sam_loss_grad"], atol=1e-9)


@pytest.mark.parametrize("name", ["losses_a", "losses_b"])
def test_consistency(shared: Path, name: str) -> None:
    data = load(shared, name)
    student = torch.from_numpy(data["student_logits"]).requires_grad_()
    teacher, passes = (torch.from_numpy(data[key]) for key in ("teacher_logits", "mc_teacher_logits"))
    rows = 2 if name == "losses_a" else 1
    label = torch.from_numpy(data["label"]).long()[:rows]
    squared = losses.softmax_mse(student, teacher.softmax(1))
    close(squared, data["softmax_mse_map"])
    close(squared.mean(), data["softmax_mse_mean"])
    divergence = losses.softmax_kl(student, teacher)
    close(divergence, data["softmax_kl_map"], atol=1e-6)
    close(divergence.mean(), data["softmax_kl_mean"])
    close((student - teacher).square().mean(), data["symmetric_mse"])
    close(losses.softmax_dice_loss(student, teacher), data["softmax_dice_loss"])
    p = student[:rows].softmax(1)
    close(losses.cross_entropy(student[:rows], label), data["ce_labeled"])
    close(losses.dice_loss(p, label), data["dice_loss_fg_labeled"])
    close(losses.dice_loss(p, label, squared=False), data["dice_loss1_fg_labeled"])
    mean = passes.softmax(2).mean(0)
    close(mean, data["mc_mean_prob"])
    uncertainty = entropy(mean)
    close(uncertainty, data["uncertainty"])
    for i, t in enumerate((0, 1500, 3000, 5999)):
        threshold = ramps.uamt_threshold(t, 6000, 2)
        assert threshold == pytest.approx(data["uamt_threshold"][i], rel=1e-12)
        mask = uncertainty < threshold
        assert float(mask.float().mean()) == pytest.approx(data["uamt_mask_fraction"][i], rel=1e-6)
        distance = masked_mean(losses.softmax_mse(student, teacher.softmax(1)), mask)
        close(distance, data["uamt_consistency_dist"][i])
        weight = 0.1 * ramps.laine(t, 6000, 40)
        assert weight == pytest.approx(data["uamt_consistency_weight"][i], rel=1e-12)
        total = losses.segmentation_loss(student[:rows], label) + weight * distance
        close(total, data["uamt_total_loss"][i])
        (gradient,) = torch.autograd.grad(total, student)
        close(gradient, data["uamt_total_loss_grad"][i], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("name", "total", "epochs"), [("schedules_6000", 6000, 40), ("schedules_30000", 30000, 200)])
def test_schedules(shared: Path, name: str, total: int, epochs: int) -> None:
    data = load(shared, name)
    for i, t in enumerate(int(t) for t in data["iteration"]):
        expected = {key: float(values[i]) for key, values in data.items()}
        ours = {
            "sigmoid_rampup": ramps.laine(t, total, epochs),
            "consistency_weight": 0.1 * ramps.laine(t, total, epochs),
            "ema_alpha": ramps.ema_alpha(t, 0.99),
            "uncertainty_threshold": ramps.uamt_threshold(t, total, 2),
            "lr_step": ramps.step_lr(t, 0.01, 2500, 0.1),
            "lr_poly_sfr_sam": ramps.poly_lr(t, total, 0.001, 0.9),
            # The published script is one iteration late.
            "lr_poly_ssl4mis": ramps.poly_lr(max(t - 1, 0), total, 0.01, 0.9),
            "semisam_paper_lambda_c": 0.1 * ramps.semisam(t, total, 40),
            "semisam_paper_lambda_s": 0.1 * ramps.semisam_down(t, total, 40),
        }
        if total == 6000:
            ours["semisam_code_lambda_c"] = 0.1 * ramps.laine(t, total, 40)
            ours["semisam_code_lambda_s"] = 0.1 * ramps.laine_down(t, total, 40)
        for key, value in ours.items():
            assert value == pytest.approx(expected[key], rel=1e-12, abs=1e-300), (key, t)


def test_ramps_span_any_run_length() -> None:
    for total in (7, 100, 1000):
        curve = [ramps.laine(t, total, 40) for t in range(total)]
        assert curve == sorted(curve)
        assert curve[0] == pytest.approx(math.exp(-5))
        assert ramps.laine(total, total, 40) == 1.0


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("background", [False, True])
def test_against_the_oracle(classes: int, background: bool) -> None:
    generator = np.random.default_rng(classes)
    logits = generator.normal(size=(2, classes, 4, 3, 5)).astype(np.float32)
    label = generator.integers(0, classes, (2, 4, 3, 5))
    label[0, 1] = 255
    x, y = torch.from_numpy(logits), torch.from_numpy(label)
    assert float(losses.cross_entropy(x, y)) == pytest.approx(oracle.cross_entropy(logits, label), rel=1e-5)
    ours = float(losses.dice_loss(x.softmax(1), y, background=background))
    assert ours == pytest.approx(oracle.dice_loss(logits, label, background), rel=1e-5)


def test_all_ignored_gives_zero_not_nan() -> None:
    logits = torch.randn(1, 3, 2, 2, 2, requires_grad=True)
    loss = losses.segmentation_loss(logits, torch.full((1, 2, 2, 2), 255))
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
