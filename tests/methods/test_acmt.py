"""AC-MT against slow versions of its four criteria."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from scarceseg.errors import ConfigError
from scarceseg.functional.ambiguity import confident_class, confident_joint, label_issues, nearest_prototype
from scarceseg.methods import build_terms
from scarceseg.methods.acmt import AcMt
from scarceseg.networks import build_network
from scarceseg.networks.base import EncoderDecoder
from scarceseg.networks.ema import EmaTeacher
from scarceseg.types import Labelled, Step, Unlabelled
from tests.reference import consistency as oracle
from tests.reference.losses import softmax

SHAPE = (4, 3, 5)


class Scripted(EncoderDecoder):
    """Returns prepared logits and features, one after the other."""

    divisor = (1, 1, 1)

    def __init__(self, outputs: list[torch.Tensor], features: torch.Tensor | None = None) -> None:
        super().__init__()
        self.outputs, self.features = list(outputs), features

    def encode(self, image: torch.Tensor) -> list[torch.Tensor]:
        return [image]

    def decode_stages(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        return features if self.features is None else [self.features, features[0]]

    def head(self, features: torch.Tensor) -> torch.Tensor:
        return self.outputs.pop(0)


def term_of(classes: int, outputs: list[torch.Tensor], features: torch.Tensor | None = None, **options: Any) -> AcMt:
    term = build_terms("acmt", {"acmt": options}, classes)["acmt"]
    assert isinstance(term, AcMt)
    term.teacher = EmaTeacher(Scripted(outputs, features))
    return term


def logits_of(classes: int, seed: int, rows: int = 2, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(rows, classes, *SHAPE, generator=torch.Generator().manual_seed(seed))


def step_of(student: torch.Tensor, t: int = 30) -> Step:
    return Step(
        iteration=t,
        total=100,
        labelled=Labelled(torch.zeros(1, 1, *SHAPE), torch.zeros(1, *SHAPE, dtype=torch.long), ("a",)),
        unlabelled=Unlabelled(torch.zeros(2, 1, *SHAPE), ("b", "c")),
        logits_l=student[:1],
        logits_u=student,
        generator=torch.Generator(),
    )


def probability(logits: torch.Tensor) -> np.ndarray:
    return softmax(logits.double().numpy())


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("t", [0, 60, 99])
def test_entropy(classes: int, t: int) -> None:
    student, teacher = logits_of(classes, 0), logits_of(classes, 1)
    mask = oracle.entropy_share(probability(student)) >= oracle.ramped(0.75, 0.95, t, 100)
    assert 0 < mask.mean() < 1
    ours = term_of(classes, [teacher]).loss(step_of(student, t))
    assert float(ours) == pytest.approx(oracle.masked(student.numpy(), teacher.numpy(), mask), rel=1e-5)


def test_the_threshold_ramps_both_ways() -> None:
    student, teacher = logits_of(2, 0), logits_of(2, 1)
    for t in (0, 60, 99):
        mask = oracle.entropy_share(probability(student)) >= oracle.ramped(0.75, 0.6, t, 100)
        ours = term_of(2, [teacher], entropy_threshold=[0.75, 0.6]).loss(step_of(student, t))
        assert float(ours) == pytest.approx(oracle.masked(student.numpy(), teacher.numpy(), mask), rel=1e-5)


@pytest.mark.parametrize("t", [0, 99])
def test_uncertainty_is_the_teachers(t: int) -> None:
    student, teacher = logits_of(3, 0, scale=9.0), logits_of(3, 1)
    base = logits_of(3, 7, scale=2.0).repeat(2, 1, 1, 1, 1)
    passes = [base + logits_of(3, seed, rows=4) for seed in range(2, 6)]
    mean = np.mean([probability(half) for output in passes for half in output.split(2)], axis=0)
    mask = oracle.entropy_share(mean) >= oracle.ramped(0.75, 0.9, t, 100)
    assert 0 < mask.mean() < 1
    ours = term_of(3, [teacher, *passes], criteria=["uncertainty"]).loss(step_of(student, t))
    assert float(ours) == pytest.approx(oracle.masked(student.numpy(), teacher.numpy(), mask), rel=1e-5)


@pytest.mark.parametrize("classes", [2, 4])
def test_prototype(classes: int) -> None:
    student, noisy, clean = (logits_of(classes, seed) for seed in (0, 1, 2))
    features = torch.randn(2, 6, *SHAPE, generator=torch.Generator().manual_seed(3))
    features[:, :classes] += clean
    clean[1, classes - 1] = -50  # a class without a prototype
    nearest = oracle.nearest_prototype(features.double().numpy(), probability(clean))
    assert set(np.unique(nearest[1])) == set(range(classes - 1))
    np.testing.assert_array_equal(nearest_prototype(features, clean.softmax(1)).numpy(), nearest)
    mask = nearest != student.argmax(1).numpy()
    ours = term_of(classes, [noisy, clean], features, criteria=["prototype"]).loss(step_of(student))
    assert float(ours) == pytest.approx(oracle.masked(student.numpy(), noisy.numpy(), mask), rel=1e-5)


def flat(label: torch.Tensor, logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    p = logits.softmax(1).double().numpy()
    return label.numpy().ravel(), np.moveaxis(p, 1, -1).reshape(-1, p.shape[1])


@pytest.mark.parametrize("prune", ["joint", "class", "noise-rate", "both"])
@pytest.mark.parametrize("classes", [2, 4])
def test_label_noise(classes: int, prune: str) -> None:
    student, noisy, clean = logits_of(classes, 0), logits_of(classes, 1), logits_of(classes, 2)
    student = student + clean  # they agree more often than not
    label = student.argmax(1)
    mask = oracle.label_issues(*flat(label, clean), prune).reshape(label.shape)
    assert 0 < mask.mean() < 0.6
    np.testing.assert_array_equal(label_issues(label, clean.softmax(1), prune).numpy(), mask)  # type: ignore[arg-type]
    ours = term_of(classes, [noisy, clean], criteria=["label-noise"], prune=prune).loss(step_of(student))
    assert float(ours) == pytest.approx(oracle.masked(student.numpy(), noisy.numpy(), mask), rel=1e-5)


def test_confident_joint() -> None:
    label = torch.randint(0, 2, (2, *SHAPE), generator=torch.Generator().manual_seed(0))  # class 2 is never given
    logits = logits_of(3, 1)
    expected, classes = oracle.confident_joint(*flat(label, logits))
    p = logits.softmax(1).movedim(1, 0).flatten(1)
    confident = confident_class(label.flatten(), p)
    assert confident.tolist() == classes
    joint = confident_joint(label.flatten(), confident, 3)
    np.testing.assert_allclose(joint.numpy(), expected)
    assert joint.sum() == pytest.approx(label.numel()) and joint[2].sum() == 0 and joint[:, 2].sum() == 0


def test_planted_errors_are_found() -> None:
    truth = torch.zeros(1, 10, 10, 10, dtype=torch.long)
    truth[:, 3:8, 3:8, 3:8] = 1
    g = torch.Generator().manual_seed(0)
    right = 0.7 + 0.29 * torch.rand(truth.shape, generator=g)
    p = torch.where((truth == 1)[:, None], torch.stack([1 - right, right], 1), torch.stack([right, 1 - right], 1))
    given = truth.clone()
    given[:, 3, 3:8, 3:8] = 0
    found = label_issues(given, p)
    assert found.any() and not found[given == truth].any()
    assert not label_issues(truth, p).any()


def test_criteria_are_joined() -> None:
    student, noisy, clean = logits_of(3, 0), logits_of(3, 1), logits_of(3, 2)
    unsure = oracle.entropy_share(probability(student)) >= oracle.ramped(0.75, 0.95, 30, 100)
    wrong = oracle.label_issues(*flat(student.argmax(1), clean), "both").reshape(unsure.shape)
    for combine, mask in (("any", unsure | wrong), ("all", unsure & wrong)):
        criteria = ["entropy", "label-noise"]
        ours = term_of(3, [noisy, clean], criteria=criteria, combine=combine).loss(step_of(student))
        assert mask.any()
        assert float(ours) == pytest.approx(oracle.masked(student.numpy(), noisy.numpy(), mask), rel=1e-5)


@pytest.mark.parametrize("criterion", ["entropy", "uncertainty", "prototype", "label-noise"])
def test_nothing_ambiguous_is_zero_and_finite(criterion: str) -> None:
    student = torch.zeros(2, 3, *SHAPE)
    student[:, 1] = 60
    student.requires_grad_()
    sure = student.detach()
    outputs = [sure, *[sure.repeat(2, 1, 1, 1, 1)] * 4] if criterion == "uncertainty" else [sure, sure]
    loss = term_of(3, outputs, torch.zeros(2, 4, *SHAPE), criteria=[criterion]).loss(step_of(student))
    loss.backward()
    assert float(loss.detach()) == 0
    assert student.grad is not None and torch.isfinite(student.grad).all()


def test_features_are_those_the_head_sees() -> None:
    student = build_network("vnet", 1, 3, {"n_filters": 2})
    teacher = EmaTeacher(student, norm="running")
    x = torch.randn(1, 1, 16, 16, 16)
    logits, decoded = teacher.features(x)
    assert torch.allclose(logits, teacher(x)) and not logits.requires_grad
    assert [level.shape[2] for level in decoded] == [16, 8, 4, 2]
    assert torch.allclose(teacher.network.head(decoded[0]), logits)  # type: ignore[operator]


def test_all_four_at_once_on_a_network() -> None:
    student = build_network("vnet", 2, 3, {"n_filters": 2}).train()
    criteria = ["entropy", "uncertainty", "prototype", "label-noise"]
    term = build_terms("acmt", {"acmt": {"criteria": criteria, "samples": "all"}}, 3)["acmt"]
    term.attach(student)
    x = torch.randn(3, 2, 16, 16, 16)
    logits = student(x)
    label = torch.zeros(1, 16, 16, 16, dtype=torch.long)
    step = Step(
        0, 10, Labelled(x[:1], label, ("a",)), Unlabelled(x[1:], ("b", "c")), logits[:1], logits[1:], torch.Generator()
    )
    loss = term.loss(step)
    assert isinstance(loss, torch.Tensor) and torch.isfinite(loss) and float(loss.detach()) > 0


def test_wrong_options_are_told() -> None:
    wrongs: list[dict[str, Any]] = [
        {"criteria": []},
        {"criteria": ["entropie"]},
        {"entropy_threshold": [0.75, 1.2]},
        {"uncertainty_threshold": [0.75]},
    ]
    for wrong in wrongs:
        with pytest.raises(ConfigError, match="terms.acmt"):
            build_terms("acmt", {"acmt": wrong}, 2)
    term = build_terms("acmt", {"acmt": {"criteria": ["prototype"]}}, 2)["acmt"]
    with pytest.raises(ConfigError, match="prototype.*vnet"):
        term.attach(nn.Conv3d(1, 2, 1))
