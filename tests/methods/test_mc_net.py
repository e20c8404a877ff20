"""MC-Net: mutual consistency, and decoders that differ."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scarceseg.methods import build_terms
from scarceseg.methods.mc_net import McNet, mutual_consistency
from scarceseg.networks import build_network
from tests.methods.small import SIZE, Scripted, random_features, random_step
from tests.reference import decoders as oracle
from tests.reference import losses


def mc_net(classes: int, **options: object) -> McNet:
    term = build_terms("mc-net", {"mc-net": options}, classes)["mc-net"]
    assert isinstance(term, McNet)
    return term


@pytest.mark.parametrize(("classes", "decoders", "temperature"), [(2, 2, 0.1), (4, 3, 0.1), (3, 3, 0.5)])
def test_mutual_consistency_equation(classes: int, decoders: int, temperature: float) -> None:
    g = torch.Generator().manual_seed(0)
    logits = [torch.randn(2, classes, *SIZE, generator=g) for _ in range(decoders)]
    expected = oracle.mc_net([x.numpy() for x in logits], temperature)
    assert float(mutual_consistency(logits, temperature)) == pytest.approx(expected, rel=1e-5)


def test_the_sharpened_output_is_a_fixed_target() -> None:
    first, second = (torch.randn(1, 3, *SIZE, requires_grad=True) for _ in range(2))
    mutual_consistency([first, second], 0.1).backward()
    grads = (first.grad, second.grad)
    copies = [x.detach().clone().requires_grad_() for x in (first, second)]
    sharp = [(x.detach() / 0.1).softmax(1) for x in copies]
    for x, s, grad in zip(copies, reversed(sharp), grads, strict=True):
        (x.softmax(1) - s).square().mean().backward()
        assert grad is not None and x.grad is not None
        torch.testing.assert_close(grad, x.grad)


@pytest.mark.parametrize("samples", ["all", "unlabelled"])
def test_loss(samples: str) -> None:
    term, step = mc_net(3, samples=samples, supervision=0.5), random_step(3)
    step.encoded = random_features(2, SIZE, 2)
    outputs = [torch.randn(3, 3, *SIZE) for _ in range(2)]
    term.decoders = nn.ModuleList(Scripted([x]) for x in outputs)
    parts = term.loss(step)
    assert step.logits_u is not None
    every = [torch.cat([step.logits_l, step.logits_u]), *outputs]
    rows = slice(1, None) if samples == "unlabelled" else slice(None)
    assert float(parts.ramped) == pytest.approx(oracle.mc_net([x[rows].numpy() for x in every], 0.1), rel=1e-5)
    label = step.labelled.label.numpy()
    own = [
        0.5 * (losses.cross_entropy(x[:1].numpy(), label) + losses.dice_loss(x[:1].numpy(), label, False))
        for x in outputs
    ]
    assert float(parts.fixed) == pytest.approx(0.5 * sum(own) / 2, rel=1e-5)
    seen = term.decoders[0].seen[0]
    torch.testing.assert_close(seen[1], torch.cat([step.encoded["labelled"][1], step.encoded["unlabelled"][1]]))


@pytest.mark.parametrize("decoders", [2, 3, 4])
def test_decoders_of_vnet_go_up_in_different_ways(decoders: int) -> None:
    student = build_network("vnet", 1, 2, {"n_filters": 2})
    before = {key: value.clone() for key, value in student.state_dict().items()}
    term = mc_net(2, decoders=decoders)
    term.attach(student)
    modes = [{m.mode for m in d.modules() if isinstance(m, nn.Upsample)} for d in term.decoders]
    assert modes == [{"trilinear"}, {"nearest"}, {"trilinear"}][: decoders - 1]
    assert not any(isinstance(m, nn.ConvTranspose3d) for m in term.modules())
    assert sum(isinstance(m, nn.ConvTranspose3d) for m in student.modules()) == 4
    assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())
    features = student.encode(torch.randn(2, 1, 16, 32, 16))  # type: ignore[operator]
    for decoder in term.decoders:
        assert decoder(features).shape == (2, 2, 16, 32, 16)


def test_decoders_of_a_network_that_interpolates_differ_by_their_weights() -> None:
    student = build_network("unet3d", 1, 2, {"feature_scale": 32})
    term = mc_net(2)
    term.attach(student)
    first, second = (list(decoder.parameters()) for decoder in term.decoders)
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a.ndim > 1)
