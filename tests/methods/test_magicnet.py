"""MagicNet: each of its parts, on a network for which cutting and swapping changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scarceseg.engine.step import forward_step
from scarceseg.errors import ConfigError
from scarceseg.functional.cubes import CubeGrid
from scarceseg.methods import build_terms
from scarceseg.methods.magicnet import MagicNet
from scarceseg.networks import build_network
from scarceseg.networks.ema import EmaTeacher
from scarceseg.types import Step
from tests.methods.small import Pointwise, Scripted, random_step
from tests.reference import decoders as oracle
from tests.reference import losses

SIZE = (8, 12, 4)


def magicnet(classes: int = 3, channels: int = 2, **options: object) -> tuple[Pointwise, MagicNet]:
    torch.manual_seed(0)
    student = Pointwise(channels, classes)
    term = build_terms("magicnet", {"magicnet": {"cubes": [2, 3, 1], "noise_std": 0, **options}}, classes)["magicnet"]
    assert isinstance(term, MagicNet)
    term.attach(student)
    return student, term


def step_of(student: Pointwise, term: MagicNet, classes: int = 3, channels: int = 2) -> Step:
    data = random_step(classes, SIZE, channels)
    g = torch.Generator().manual_seed(3)
    return forward_step(student, {"magicnet": term}, data.labelled, data.unlabelled, 30, 100, g)


def test_mixed_images_hold_cubes_of_all_rows() -> None:
    _, term = magicnet()
    step = random_step(3, SIZE, 2)
    mixed = term.extra_inputs(step.labelled, step.unlabelled, torch.Generator().manual_seed(3))
    assert mixed is not None and step.unlabelled is not None
    images = torch.cat([step.labelled.image, step.unlabelled.image]).numpy()
    edges = [[0, 4, 8], [0, 4, 8, 12], [0, 4]]
    np.testing.assert_array_equal(mixed.numpy(), oracle.swapped(images, edges, term.order.numpy()))
    assert not np.array_equal(mixed.numpy(), images)


@pytest.mark.parametrize("classes", [2, 3])
def test_loss(classes: int) -> None:
    student, term = magicnet(classes, supervision=0.5, location=0.2)
    step = step_of(student, term, classes)
    assert step.logits_u is not None and step.unlabelled is not None
    parts = term.loss(step)
    # Voxel by voxel the network says the same of mixed images and single cubes as of the images themselves.
    logits_u = step.logits_u.detach().numpy()
    pseudo = logits_u.argmax(1)
    assert float(parts.ramped.detach()) == pytest.approx(losses.dice_loss(logits_u, pseudo, background=True), rel=1e-5)
    logits_l, label = step.logits_l.detach().numpy(), step.labelled.label.numpy()
    supervised = 0.5 * (losses.cross_entropy(logits_l, label) + losses.dice_loss(logits_l, label, background=False))
    located = []
    first, second = term.locator[2], term.locator[4]
    for image in torch.cat([step.labelled.image, step.unlabelled.image]).numpy():
        for position in range(6):
            i, j = divmod(position, 3)
            cube = image[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4, :4]
            pooled = cube.reshape(2, 2, 2, 2, 2, 2, 2).mean((2, 4, 6)).ravel()
            hidden = np.maximum(first.weight.detach().numpy() @ pooled + first.bias.detach().numpy(), 0)
            scores = second.weight.detach().numpy() @ hidden + second.bias.detach().numpy()
            located.append(-np.log(losses.softmax(scores[None])[0, position]))
    assert float(parts.fixed.detach()) == pytest.approx(0.5 * supervised + 0.2 * float(np.mean(located)), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_blend(temperature: float) -> None:
    _, term = magicnet(3, temperature=temperature, memory=0.9)
    grid = CubeGrid.fit(SIZE, (2, 3, 1), (2, 2, 2))
    g = torch.Generator().manual_seed(0)
    whole, single = (2 * torch.randn(2, 3, *SIZE, generator=g) for _ in range(2))
    term.teacher = EmaTeacher(Scripted([whole, grid.cut_windows(single)]))
    term.frequency.copy_(torch.tensor([0.8, 0.15, 0.05]))
    ours = term.blend(torch.zeros(2, 2, *SIZE), grid, torch.Generator())
    expected = oracle.blended(whole.numpy(), single.numpy(), np.array([0.8, 0.15, 0.05]), temperature)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(ours.sum(1).numpy(), 1, rtol=1e-5)
    seen = [(whole.numpy().argmax(1) == c).mean() for c in range(3)]
    expected_frequency = 0.9 * np.array([0.8, 0.15, 0.05]) + 0.1 * np.array(seen)
    np.testing.assert_allclose(term.frequency.numpy(), expected_frequency, rtol=1e-5)


def test_at_the_start_the_pseudo_label_is_the_teachers() -> None:
    _, term = magicnet(3)
    grid = CubeGrid.fit(SIZE, (2, 3, 1), (2, 2, 2))
    whole, single = torch.randn(2, 3, *SIZE), torch.randn(2, 3, *SIZE)
    term.teacher = EmaTeacher(Scripted([whole, grid.cut_windows(single)]))
    torch.testing.assert_close(term.blend(torch.zeros(2, 2, *SIZE), grid, torch.Generator()), whole.softmax(1))


def test_the_student_is_not_part_of_the_terms_state() -> None:
    student, term = magicnet()
    mine = {id(p) for p in term.parameters()}
    assert not mine & {id(p) for p in student.parameters()}
    assert {key.split(".")[0] for key in term.state_dict()} == {"teacher", "locator", "frequency"}
    assert {id(p) for p in term.trainable_parameters()} == {id(p) for p in term.locator.parameters()}


def test_location_loss_teaches_the_encoder() -> None:
    student = build_network("vnet", 1, 2, {"n_filters": 2}).train()
    term = build_terms("magicnet", {"magicnet": {"supervision": 0}}, 2)["magicnet"]
    term.attach(student)
    data = random_step(2, (32, 48, 16))
    g = torch.Generator().manual_seed(0)
    step = forward_step(student, {"magicnet": term}, data.labelled, data.unlabelled, 30, 100, g)
    parts = term.loss(step)
    assert not isinstance(parts, torch.Tensor)
    parts.fixed.backward()
    assert float(student.block_five.conv[0].weight.grad.abs().sum()) > 0  # type: ignore[union-attr,index,operator]


def test_a_patch_that_cannot_be_cut_is_refused() -> None:
    student = build_network("vnet", 1, 2, {"n_filters": 2})
    term = build_terms("magicnet", {}, 2)["magicnet"]
    term.attach(student)
    data = random_step(2, (16, 16, 16))
    with pytest.raises(ConfigError, match="16x16x16.*larger patch"):
        term.extra_inputs(data.labelled, data.unlabelled, torch.Generator())
    with pytest.raises(ConfigError, match="cubes"):
        build_terms("magicnet", {"magicnet": {"cubes": [3, 0, 3]}}, 2)
