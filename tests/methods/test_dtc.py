"""DTC: the distance maps, and the agreement of the two tasks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scarceseg.functional.distance import signed_distance
from scarceseg.methods import build_terms
from scarceseg.methods.dtc import Dtc
from scarceseg.networks import build_network
from tests.methods.small import SIZE, random_features, random_step
from tests.reference import decoders as oracle


def dtc(classes: int, **options: object) -> Dtc:
    term = build_terms("dtc", {"dtc": options}, classes)["dtc"]
    assert isinstance(term, Dtc)
    term.attach(build_network("vnet", 1, classes, {"n_filters": 2}))
    # Small distances: the steep sigmoid is then not yet one of its ends.
    torch.nn.init.normal_(term.head.weight, std=1e-3)
    torch.nn.init.zeros_(term.head.bias)
    return term


def test_distance_maps_against_a_search() -> None:
    g = torch.Generator().manual_seed(0)
    label = torch.zeros(3, 9, 7, 8, dtype=torch.long)
    label[0, 2:8, 1:6, :5] = 1  # touches the edge of the patch
    label[0, 5:, 4:, 6:] = 2
    label[0, 0, 0, 7] = 255
    label[1] = torch.randint(0, 4, (9, 7, 8), generator=g)
    label[2] = 3
    ours = signed_distance(label, 4)
    assert ours.shape == (3, 3, 9, 7, 8) and ours.dtype == torch.float32
    for b in range(3):
        for c in range(1, 4):
            np.testing.assert_allclose(
                ours[b, c - 1].numpy(), oracle.signed_distance((label[b] == c).numpy()), atol=1e-6
            )
    assert float(ours.min()) == -1 and float(ours.max()) == 1


@pytest.mark.parametrize("seed", range(5))
def test_distance_maps_of_random_boxes(seed: int) -> None:
    g = np.random.default_rng(seed)
    label = np.zeros((1, 7, 5, 6), np.int64)
    for _ in range(2):
        low = g.integers(0, (7, 5, 6))
        high = low + g.integers(1, 6, 3)
        label[0, low[0] : high[0], low[1] : high[1], low[2] : high[2]] = 1
    ours = signed_distance(torch.from_numpy(label), 2)[0, 0].numpy()
    np.testing.assert_allclose(ours, oracle.signed_distance(label[0] == 1), atol=1e-6)
    assert bool(((ours < 0) <= (label[0] == 1)).all()) and bool(((ours > 0) == (label[0] != 1)).all())


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("samples", ["all", "unlabelled"])
def test_equation(classes: int, samples: str) -> None:
    term, step = dtc(classes, samples=samples), random_step(classes)
    step.decoded = random_features(2, SIZE, 2)
    weight, bias = term.head.weight.detach().numpy(), term.head.bias.detach().numpy()
    z = {rows: np.tanh(oracle.conv_1x1(step.decoded[rows][0].numpy(), weight, bias)) for rows in step.decoded}
    assert step.logits_u is not None
    distances, logits = [z["unlabelled"]], [step.logits_u.numpy()]
    if samples == "all":
        distances.append(z["labelled"])
        logits.append(step.logits_l.numpy())
    parts = term.loss(step)
    assert float(parts.ramped.detach()) == pytest.approx(oracle.dtc(distances, logits), rel=1e-3)
    label = step.labelled.label.numpy()
    errors = [
        (z["labelled"][(0, c - 1, *v)] - oracle.signed_distance(label[0] == c)[v]) ** 2
        for c in range(1, classes)
        for v in np.ndindex(*SIZE)
        if label[(0, *v)] != 255
    ]
    assert float(parts.fixed.detach()) == pytest.approx(0.3 * sum(errors) / len(errors), rel=1e-4)


def test_a_right_distance_map_agrees_with_a_right_segmentation() -> None:
    term = dtc(3)
    label = torch.zeros(1, 9, 8, 7, dtype=torch.long)
    label[0, 1:6, 2:7, 1:6] = 1
    label[0, 6:, :, 5:] = 2
    distances = signed_distance(label, 3)
    logits = 50.0 * torch.nn.functional.one_hot(label, 3).permute(0, 4, 1, 2, 3)
    boundary = distances == 0  # the sigmoid is 1/2 there
    error = term.disagreement(distances, logits)
    assert float(error[~boundary].max()) < 1e-6
    torch.testing.assert_close(error[boundary], torch.full_like(error[boundary], 0.25))


def test_weight_is_the_papers() -> None:
    term = build_terms("dtc", {}, 2)["dtc"]
    assert term.weight(0, 6000) == pytest.approx(np.exp(-5))
    assert term.weight(5999, 6000) == pytest.approx(np.exp(-5 * (1 / 40) ** 2))
