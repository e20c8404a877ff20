"""CCT: what the decoders see, and what they must agree with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from scarceseg.methods import build_terms
from scarceseg.methods.cct import Cct, attention_drop, feature_dropout, feature_noise
from scarceseg.networks import build_network
from tests.methods.small import SIZE, Scripted, random_features, random_step
from tests.reference import losses as oracle


def cct(classes: int, outputs: list[torch.Tensor], **options: float) -> Cct:
    term = build_terms("cct", {"cct": options}, classes)["cct"]
    assert isinstance(term, Cct)
    term.decoders = nn.ModuleList(Scripted([x]) for x in outputs)
    return term


@pytest.mark.parametrize("classes", [2, 3])
def test_equation(classes: int) -> None:
    step = random_step(classes)
    step.encoded = random_features(2, SIZE, 2)
    g = torch.Generator().manual_seed(9)
    outputs = [torch.randn(3, classes, *SIZE, generator=g) for _ in range(3)]
    assert step.logits_u is not None
    parts = cct(classes, outputs, supervision=0.5).loss(step)
    expected = [oracle.mean_teacher(x[1:].numpy(), step.logits_u.numpy()) for x in outputs]
    assert float(parts.ramped) == pytest.approx(sum(expected) / 3, rel=1e-5)
    label = step.labelled.label.numpy()
    own = [
        0.5 * (oracle.cross_entropy(x[:1].numpy(), label) + oracle.dice_loss(x[:1].numpy(), label, background=False))
        for x in outputs
    ]
    assert float(parts.fixed) == pytest.approx(0.5 * sum(own) / 3, rel=1e-5)


def test_each_decoder_sees_all_levels_disturbed_in_its_way() -> None:
    step = random_step(2)
    step.encoded = random_features(4, (8, 6, 8), 2)
    step.labelled.label.resize_(1, 8, 6, 8).zero_()
    step.logits_l, step.logits_u = torch.zeros(1, 2, 8, 6, 8), torch.zeros(2, 2, 8, 6, 8)
    term = cct(2, [torch.zeros(3, 2, 8, 6, 8) for _ in range(3)])
    term.loss(step)
    clean = [torch.cat(pair) for pair in zip(step.encoded["labelled"], step.encoded["unlabelled"], strict=True)]
    noisy, dropped, erased = (decoder.seen[0] for decoder in term.decoders)  # type: ignore[index]
    for level, x in enumerate(clean):
        change = noisy[level] / x - 1
        assert 0.25 < float(change.abs().max()) <= 0.3 + 1e-5
        zero = dropped[level] == 0
        assert 0.2 < float(zero.float().mean()) < 0.4
        torch.testing.assert_close(dropped[level][~zero], x[~zero] / 0.7)
        kept = (erased[level] == x).all(1)
        assert bool(((erased[level] == 0).all(1) | kept).all())
        assert 0 < int(kept.sum()) < kept.numel()


def test_erased_places_are_the_most_active_ones() -> None:
    x = torch.rand(2, 3, *SIZE)
    drawn = torch.empty(2, 1, 1, 1, 1).uniform_(0.7, 0.9, generator=torch.Generator().manual_seed(4)).numpy()
    ours = attention_drop(x, torch.Generator().manual_seed(4), 0.7, 0.9).numpy()
    for b, row in enumerate(x.numpy()):
        activation = row.mean(0)
        for v in np.ndindex(*SIZE):
            active = activation[v] >= drawn[b, 0, 0, 0, 0] * activation.max()
            np.testing.assert_array_equal(ours[(b, slice(None), *v)], 0 if active else row[(slice(None), *v)])


def test_disturbances_keep_the_mean() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.ones(1, 50, 10, 10, 10)
    assert float(feature_noise(x, g, 0.3).mean()) == pytest.approx(1, abs=0.01)
    assert float(feature_dropout(x, g, 0.5).mean()) == pytest.approx(1, abs=0.02)


def test_the_students_prediction_is_a_fixed_target() -> None:
    student = build_network("vnet", 1, 2, {"n_filters": 2})
    term = build_terms("cct", {}, 2)["cct"]
    term.attach(student)
    step = random_step(2, (16, 16, 32))
    assert step.logits_u is not None
    step.logits_u.requires_grad_()
    encoded = student.encode(torch.randn(3, 1, 16, 16, 32))  # type: ignore[operator]
    step.encoded = {"labelled": [x[:1] for x in encoded], "unlabelled": [x[1:] for x in encoded]}
    parts = term.loss(step)
    assert not isinstance(parts, torch.Tensor)
    parts.ramped.backward()
    assert step.logits_u.grad is None
    assert all(p.grad is not None for p in term.trainable_parameters())
    # The student's own decoder is left to the labels.
    assert student.out_conv.weight.grad is None  # type: ignore[union-attr]
