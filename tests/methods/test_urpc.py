"""URPC against its equation, and where its heads sit."""

from __future__ import annotations

import pytest
import torch

from scarceseg.errors import ConfigError
from scarceseg.methods import build_terms
from scarceseg.methods.urpc import Urpc, pyramid_consistency
from scarceseg.networks import build_network
from tests.methods.small import SIZE, random_features, random_step
from tests.reference import decoders as oracle
from tests.reference import losses


def urpc(classes: int, network: str = "vnet", **options: float) -> Urpc:
    args = {"n_filters": 2} if network == "vnet" else {"feature_scale": 32}
    term = build_terms("urpc", {"urpc": options}, classes)["urpc"]
    assert isinstance(term, Urpc)
    term.attach(build_network(network, 1, classes, args))
    return term


@pytest.mark.parametrize(("classes", "scales"), [(2, 4), (4, 4), (3, 2)])
def test_pyramid_equation(classes: int, scales: int) -> None:
    g = torch.Generator().manual_seed(0)
    logits = [3 * torch.randn(2, classes, *SIZE, generator=g) for _ in range(scales)]
    expected = oracle.urpc([x.numpy() for x in logits])
    assert float(pyramid_consistency(logits)) == pytest.approx(expected, rel=1e-5)
    assert float(pyramid_consistency([logits[0]] * scales)) == pytest.approx(0, abs=1e-6)


def test_sure_voxels_that_disagree_stay_finite() -> None:
    sure = torch.tensor([200.0, -200.0]).view(1, 2, 1, 1, 1).expand(1, 2, *SIZE).clone().requires_grad_()
    loss = pyramid_consistency([sure, -sure])
    loss.backward()
    # d = 1/2 everywhere, and the divergence from the mean of two opposites is ln 2.
    assert float(loss.detach()) == pytest.approx(0.25 + 0.693147, rel=1e-5)
    assert sure.grad is not None and bool(torch.isfinite(sure.grad).all())


def test_loss_on_the_decoders_levels() -> None:
    size = (8, 4, 6)
    term, step = urpc(3, scales=3, supervision=2.0), random_step(3, size)
    step.decoded = random_features(2, size, 4)
    parts = term.loss(step)
    assert step.logits_u is not None
    pyramid = {}
    for rows in ("labelled", "unlabelled"):
        pyramid[rows] = [
            oracle.upsample_trilinear(
                oracle.conv_1x1(level.numpy(), head.weight.detach().numpy(), head.bias.detach().numpy()), size
            )
            for head, level in zip(term.heads, step.decoded[rows][1:3], strict=True)
        ]
    assert float(parts.ramped.detach()) == pytest.approx(
        oracle.urpc([step.logits_u.numpy(), *pyramid["unlabelled"]]), rel=1e-4
    )
    label = step.labelled.label.numpy()
    own = [0.5 * (losses.cross_entropy(x, label) + losses.dice_loss(x, label, False)) for x in pyramid["labelled"]]
    assert float(parts.fixed.detach()) == pytest.approx(2.0 * sum(own) / 2, rel=1e-5)


@pytest.mark.parametrize("network", ["vnet", "unet3d"])
def test_heads_fit_the_network(network: str) -> None:
    term = urpc(2, network)
    assert [head.in_channels for head in term.heads] == [4, 8, 16]


def test_too_many_scales_are_refused() -> None:
    with pytest.raises(ConfigError, match="scales is at most 4"):
        urpc(2, scales=5)
