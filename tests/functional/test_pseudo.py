"""Losses against guessed labels, next to slow loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from scarceseg.functional.pseudo import confidence, pseudo_label_loss, soft_label_loss


def slow_soft_loss(logits: np.ndarray, target: np.ndarray, weight: np.ndarray, smooth: float) -> float:
    exp = np.exp(logits - logits.max(1, keepdims=True))
    p = exp / exp.sum(1, keepdims=True)
    rows, classes, *size = p.shape
    ce = total = 0.0
    overlap, squares = np.zeros(classes), np.zeros(classes)
    for b in range(rows):
        for v in np.ndindex(*size):
            w = float(weight[(b, *v)])
            total += w
            for c in range(classes):
                q, mine = float(target[(b, c, *v)]), float(p[(b, c, *v)])
                ce -= w * q * math.log(mine)
                overlap[c] += w * mine * q
                squares[c] += w * mine * mine + w * q * q
    dice = np.mean([1 - (2 * overlap[c] + smooth) / (squares[c] + smooth) for c in range(classes)])
    return 0.5 * (ce / total + float(dice))


@pytest.mark.parametrize("classes", [2, 4])
def test_soft_loss_against_loops(classes: int) -> None:
    g = torch.Generator().manual_seed(classes)
    logits = torch.randn(2, classes, 3, 4, 2, generator=g)
    target = torch.randn(2, classes, 3, 4, 2, generator=g).softmax(1)
    weight = torch.rand(2, 3, 4, 2, generator=g)
    expected = slow_soft_loss(logits.numpy(), target.numpy(), weight.numpy(), 1e-5)
    assert float(soft_label_loss(logits, target, weight)) == pytest.approx(expected, rel=1e-5)


def test_hard_targets_of_full_weight_are_the_hard_loss() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, 4, generator=g)
    label = torch.randint(0, 3, (2, 4, 4, 4), generator=g)
    target = torch.nn.functional.one_hot(label, 3).movedim(-1, 1).float()
    soft = soft_label_loss(logits, target, smooth=1e-10)
    torch.testing.assert_close(soft, pseudo_label_loss(logits, label, smooth=1e-10))


def test_weight_zero_and_ignored_voxels_do_not_count() -> None:
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 2, 4, 4, 4, generator=g, requires_grad=True)
    label = torch.randint(0, 2, (1, 4, 4, 4), generator=g).to(torch.uint8)
    label[:, :2] = 255
    pseudo_label_loss(logits, label).backward()
    assert logits.grad is not None
    assert not logits.grad[:, :, :2].any() and logits.grad[:, :, 2:].any()
    logits.grad = None
    weight = (label != 255).float()
    soft_label_loss(logits, logits.detach().flip(1).softmax(1), weight).backward()
    assert not logits.grad[:, :, :2].any() and logits.grad[:, :, 2:].any()


def test_a_voxel_without_any_class_does_not_count() -> None:
    """Beyond a volume that is smaller than the patch there is no class, not even background."""
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(1, 3, 4, 4, 8, generator=g, requires_grad=True)
    target = torch.randn(1, 3, 4, 4, 4, generator=g).softmax(1)
    padded = torch.nn.functional.pad(target, (2, 2))
    loss = soft_label_loss(logits, padded)
    torch.testing.assert_close(loss, soft_label_loss(logits[..., 2:6], target))
    loss.backward()
    assert logits.grad is not None and not logits.grad[..., :2].any() and not logits.grad[..., 6:].any()


def test_nothing_to_learn_is_a_loss_of_zero_with_a_gradient_of_zero() -> None:
    logits = torch.randn(1, 2, 3, 3, 3, requires_grad=True)
    for loss in (
        pseudo_label_loss(logits, torch.full((1, 3, 3, 3), 255)),
        soft_label_loss(logits, torch.full((1, 2, 3, 3, 3), 0.5), torch.zeros(1, 3, 3, 3)),
    ):
        logits.grad = None
        loss.backward()
        assert float(loss.detach()) == 0
        assert logits.grad is not None and not logits.grad.any()


def test_confidence_counts_background_and_foreground_confidence_does_not() -> None:
    inside = np.full((10, 10, 10), 0.01, np.float32)
    inside[:2] = 0.6
    sure, foreground = confidence(np.stack([1 - inside, inside]))
    assert sure == pytest.approx(0.8 * 0.99 + 0.2 * 0.6, rel=1e-5)
    assert foreground == pytest.approx(0.6, rel=1e-5)
    assert confidence(np.stack([1 - inside * 0, inside * 0]))[1] == 0
