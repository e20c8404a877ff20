"""The pre-training tasks: clicks where the error is, losses that can be learnt, features at their place in the mosaic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from scarceseg.foundation.tiny_sam import GRID
from scarceseg.foundation.tiny_sam3d_net import EncodedPrompt
from scarceseg.pretrain.click_task import (
    ClickTask,
    dialogue,
    error_clicks,
    loose_boxes,
    mask_loss,
    region_loss,
    target_losses,
)
from scarceseg.pretrain.mosaic_task import QUADRANTS, MosaicTask
from tests.foundation.small import SMALL_3D, noise, small_net, small_sam

Shape = tuple[int, int, int]
SHAPE: Shape = (16, 16, 16)


def ball(shape: Shape, centre: tuple[float, ...], radius: float) -> torch.Tensor:
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in shape), indexing="ij")
    return sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True)) <= radius**2  # type: ignore[return-value]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# Clicks


@pytest.mark.parametrize("anywhere", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("shape", [(16, 16, 16), (14, 14, 49), (11, 13, 10)])
def test_clicks_lie_in_the_error_and_say_which_kind(shape: Shape, anywhere: float) -> None:
    generator = torch.Generator().manual_seed(0)
    guess, target = (torch.rand(12, *shape, generator=generator) > share for share in (0.8, 0.6))
    points, labels = error_clicks(guess, target, rng(), anywhere)
    assert points.shape == (12, 3) and labels.shape == (12,)
    for row, (point, label) in enumerate(zip(points.long(), labels, strict=True)):
        place = (row, *point.tolist())
        assert guess[place] != target[place] and int(target[place]) == int(label)
    again, _ = error_clicks(guess, target, rng(), anywhere)
    assert torch.equal(again, points)


def test_no_click_without_an_error() -> None:
    target = torch.stack([ball(SHAPE, (8, 8, 8), 5)] * 3)
    guess = target.clone()
    guess[1, 8, 8, 8] = False
    _, labels = error_clicks(guess, target, rng())
    assert labels.tolist() == [-1, 1, -1]


@pytest.mark.parametrize("shape", [(17, 16, 16), (16, 15, 16), (14, 14, 49)])
def test_an_error_in_the_last_slice_of_an_odd_size_is_seen(shape: Shape) -> None:
    target = torch.zeros(1, *shape, dtype=torch.bool)
    axis = next(a for a, n in enumerate(shape) if n % 2)
    target.select(1 + axis, shape[axis] - 1)[:] = True
    points, labels = error_clicks(torch.zeros_like(target), target, rng(), anywhere=0.0)
    assert labels.tolist() == [1] and int(points[0, axis]) == shape[axis] - 1


def test_the_click_goes_deep_into_the_larger_error() -> None:
    large, small = ball((32, 32, 32), (10, 10, 10), 7), ball((32, 32, 32), (24, 24, 24), 4)
    for target, guess, label in ((large, small, 1), (small, large, 0)):
        for seed in range(5):
            points, labels = error_clicks(guess[None], target[None], rng(seed), anywhere=0.0)
            assert labels.tolist() == [label]
            assert float((points[0] - 10).norm()) < 4.5
    anywhere = torch.stack([error_clicks(small[None], large[None], rng(s), 1.0)[0][0] for s in range(30)])
    assert float(anywhere.std(0).min()) > 2


def test_boxes_are_about_the_box_of_the_target() -> None:
    targets = torch.stack([ball((24, 20, 16), (12, 9, 8), r) for r in (1.0, 4.0, 7.0, 30.0)])
    for seed in range(5):
        boxes = loose_boxes(targets, rng(seed))
        assert boxes.shape == (4, 2, 3) and boxes.dtype == torch.float32
        for box, target in zip(boxes, targets, strict=True):
            inside = target.nonzero().float()
            low, high = inside.amin(0), inside.amax(0)
            room = ((high - low) * 0.1).clamp_min(1.0)
            limit = torch.tensor(target.shape) - 1
            assert (box[0] >= 0).all() and (box[1] <= limit).all() and (box[0] <= box[1]).all()
            assert (box[0] >= low - room - 1e-4).all() and (box[0] <= low + 0.5 * room + 1e-4).all()
            assert (box[1] <= high + room + 1e-4).all() and (box[1] >= high - 0.5 * room - 1e-4).all()


# Dialogues and losses


class Recorder:
    """Answers with a fixed logit and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[EncodedPrompt, bool]] = []
        self.weight = nn.Parameter(torch.tensor(0.3))

    def __call__(self, prompt: EncodedPrompt) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked.append((prompt, torch.is_grad_enabled()))
        value = self.weight * len(self.asked)
        return value.expand(2, *SHAPE) * torch.ones(2, *SHAPE), torch.sigmoid(self.weight).expand(2)


@pytest.mark.parametrize("start", ["click", "box", "mask"])
def test_a_dialogue_gathers_clicks_and_shows_the_last_mask(start: str) -> None:
    target = torch.stack([ball(SHAPE, (8, 8, 8), 5), ball(SHAPE, (6, 9, 8), 4)])
    recorder = Recorder()
    answers = dialogue(recorder, target, rng(), {start: 1.0}, {5: 1.0})
    assert len(answers) == 2 and len(recorder.asked) == 5
    assert [grad for _, grad in recorder.asked] == [False, False, False, True, True]
    assert answers[0][0].requires_grad and answers[1][0].requires_grad
    for turn, (prompt, _) in enumerate(recorder.asked):
        assert prompt.points.shape == (2, turn + 1, 3) and prompt.labels.shape == (2, turn + 1)
        assert bool(prompt.boxes.isnan().all()) == (start != "box")
        if turn:
            assert torch.equal(prompt.points[:, :turn], recorder.asked[turn - 1][0].points)
            expected = torch.sigmoid(torch.tensor(0.3 * turn)).expand(2, 1, *SHAPE)
            assert prompt.mask is not None and prompt.has_mask.tolist() == [1, 1]
            torch.testing.assert_close(prompt.mask, expected)
            # Everything is painted, so the errors lie outside.
            assert prompt.labels[:, turn].tolist() == [0, 0]
    first = recorder.asked[0][0]
    assert (first.mask is not None) == (start == "mask")
    assert first.has_mask.tolist() == [float(start == "mask")] * 2
    if start == "click":
        assert first.labels.tolist() == [[1], [1]]
        assert all(target[(row, *p[0].long().tolist())] for row, p in enumerate(first.points))
    if start == "box":
        assert first.labels.tolist() == [[-1], [-1]]


def test_mask_loss_is_dice_and_cross_entropy() -> None:
    logits, target = noise((5, 6, 7), 3)[:, 0], noise((5, 6, 7), 3, seed=1)[:, 0] > 0.4
    p, t = 1 / (1 + np.exp(-logits.numpy().astype(np.float64))), target.numpy()
    dice = [1 - (2 * (a * b).sum() + 1) / (a.sum() + b.sum() + 1) for a, b in zip(p, t, strict=True)]
    entropy = -(np.log(p) * t + np.log(1 - p) * ~t).mean()
    assert float(mask_loss(logits, target)) == pytest.approx(np.mean(dice) + entropy, rel=1e-5)


def test_a_perfect_answer_costs_nothing_and_a_wrong_estimate_does() -> None:
    target = torch.stack([ball(SHAPE, (8, 8, 8), 5)] * 2)
    logits = torch.where(target, 20.0, -20.0)
    perfect = target_losses([(logits, torch.ones(2))], target)
    assert float(perfect["mask"]) < 1e-4 and float(perfect["quality"]) == 0 and float(perfect["dice"]) == 1
    unsure = target_losses([(logits, torch.zeros(2)), (-logits, torch.ones(2))], target)
    assert float(unsure["quality"]) == 1 and float(unsure["dice"]) == 0 and float(unsure["mask"]) > 5


def test_features_that_tell_regions_apart_cost_less() -> None:
    region = np.zeros((8, 8, 8), np.uint8)
    region[4:] = 1
    region[:, 4:] += 2
    code = torch.nn.functional.one_hot(torch.from_numpy(region.astype(np.int64)), 4).permute(3, 0, 1, 2).float()
    good = torch.cat([code, code])[None]  # two heads of width 4
    bad = noise((8, 8, 8), 1, 8).requires_grad_(True)
    told, mixed = (region_loss(features, [region], rng(), heads=2) for features in (good, bad))
    mixed.backward()
    assert float(told) < 0.6 * float(mixed.detach())
    assert bad.grad is not None and float(bad.grad.abs().sum()) > 0
    assert float(region_loss(bad.detach(), [np.zeros((8, 8, 8), np.uint8)], rng(), heads=2)) == 0


# The task of tiny-sam3d


def click_task(**changes: object) -> ClickTask:
    return ClickTask(small_net(), **{"batch": 1, "targets": 2, "sizes": ((1.0, SHAPE),), **changes})  # type: ignore[arg-type]


def test_volumes_grow_with_the_training_and_lie_in_any_direction() -> None:
    task = click_task(sizes=((0.5, (16, 16, 32)), (1.0, (32, 32, 48))))
    sizes = {done: {task._size(rng(seed), done) for seed in range(12)} for done in (0.0, 0.49, 0.5, 0.99)}
    assert sizes[0.0] == sizes[0.49] == {(16, 16, 32), (16, 32, 16), (32, 16, 16)}
    assert sizes[0.5] == sizes[0.99] == {(32, 32, 48), (32, 48, 32), (48, 32, 32)}


def test_each_volume_has_its_targets() -> None:
    task = click_task(batch=3, targets=2)
    volumes, target = task.draw(rng(), (24, 16, 16))
    assert len(volumes) == 3 and target.shape == (6, 24, 16, 16) and target.dtype == torch.bool
    for row, mask in enumerate(target.numpy()):
        inside = np.unique(volumes[row // 2].region[mask])
        assert mask.any() and not np.isin(volumes[row // 2].region[~mask], inside).all()


def test_a_fixed_click_task_can_be_learnt() -> None:
    task = click_task()
    optimiser = torch.optim.Adam(task.network.parameters(), lr=2e-2)
    before = {name: p.detach().clone() for name, p in task.network.named_parameters()}
    seen = []
    for _ in range(24):
        losses = task.loss(rng(2), 0.0)  # the same volume, targets and course each time
        assert all(torch.isfinite(value) for value in losses.values())
        optimiser.zero_grad()
        losses["loss"].backward()
        optimiser.step()
        seen.append({key: float(value.detach()) for key, value in losses.items()})
    for key, most in (("loss", 0.85), ("mask", 0.8), ("similar", 0.95)):
        first, last = (np.mean([row[key] for row in part]) for part in (seen[:3], seen[-3:]))
        assert last < most * first, (key, first, last)
    unmoved = [name for name, p in task.network.named_parameters() if torch.equal(p, before[name])]
    assert not unmoved


# The task of tiny-sam


def mosaic_task() -> MosaicTask:
    return MosaicTask(small_sam(), small_net())


def standard(values: np.ndarray) -> np.ndarray:
    return (values - values.mean((1, 2), keepdims=True)) / (values.std((1, 2), ddof=1, keepdims=True) + 1e-3)


def test_features_lie_at_their_place_in_the_mosaic() -> None:
    """Maps of chance, read off at the place of each token and pixel by another interpolation."""
    task = mosaic_task()
    assert task.shape == (8, 8, 49) and task.tokens == 2
    maps: dict[str, np.ndarray] = {}

    def teacher(seen: torch.Tensor) -> dict[str, torch.Tensor]:
        for name, factor in (("similar", 2), ("quarter", 4), ("eighth", 8)):
            maps[name] = rng(factor).standard_normal((3, *(n // factor for n in seen.shape[2:])), dtype=np.float32)
        return {name: torch.from_numpy(values)[None] for name, values in maps.items()}

    task.teacher = teacher  # type: ignore[assignment]
    tokens, pixels = task.features(noise(task.shape))
    assert tokens.shape == (1, 3 * 6, 14, 14) and pixels.shape == (1, 3, 56, 56)

    def at(name: str, *place: np.ndarray) -> np.ndarray:
        """Values at places from 0 to 1 along x, y, z."""
        index = [p * n - 0.5 for p, n in zip(place, maps[name].shape[1:], strict=True)]
        return np.stack([ndimage.map_coordinates(v, index, order=1, mode="nearest") for v in maps[name]])

    row, column = np.indices((14, 14))
    x, y, z = column % 2, row % 2, (row // 2 * GRID + column // 2 + 0.5) / 49
    expected = [at("quarter", (2 * x + i + 0.5) / 4, (2 * y + j + 0.5) / 4, z) for i, j in QUADRANTS]
    expected += [at(name, (x + 0.5) / 2, (y + 0.5) / 2, z) for name in ("quarter", "eighth")]
    np.testing.assert_allclose(tokens[0].numpy(), standard(np.concatenate(expected)), atol=1e-4)
    row, column = np.indices((56, 56))
    z = (row // 8 * GRID + column // 8 + 0.5) / 49
    fine = at("similar", (column % 8 + 0.5) / 8, (row % 8 + 0.5) / 8, z)
    np.testing.assert_allclose(pixels[0].numpy(), standard(fine), atol=1e-4)


def test_the_mosaic_is_the_stitching_of_the_library() -> None:
    task = mosaic_task()
    volume = noise(task.shape)
    canvas = task.stitch.stitch(volume)
    assert canvas.shape == (1, 1, 56, 56)
    for z in range(49):
        row, column = 8 * (z // GRID), 8 * (z % GRID)
        assert torch.equal(canvas[0, 0, row : row + 8, column : column + 8], volume[0, 0, :, :, z].T)
    assert torch.equal(task.stitch.unstitch(canvas), volume)


def test_the_student_learns_and_the_teacher_does_not() -> None:
    task = mosaic_task()
    taught = {name: value.clone() for name, value in task.teacher.state_dict().items()}
    losses = task.loss(rng(), 0.3)
    assert all(value.shape == () and torch.isfinite(value) for value in losses.values())
    for key, value in task.loss(rng(), 0.3).items():
        torch.testing.assert_close(value, losses[key])
    losses["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in task.teacher.parameters())
    silent = {
        name
        for name, p in task.network.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.abs().sum())
    }
    # What makes masks out of features, and prompts, has no say in the features; keys know no bias.
    assert not {name for name in silent if "vision_encoder" in name}
    assert not {name for name in silent if name.startswith(("tokens", "pixels")) or "upscale_conv" in name}
    assert not any(id(p) == id(q) for p in task.network.parameters() for q in task.teacher.parameters())
    optimiser = torch.optim.Adam(task.network.parameters(), lr=3e-3)
    seen = []
    for _ in range(15):
        optimiser.zero_grad()
        loss = task.loss(rng(), 0.0)["loss"]
        loss.backward()
        optimiser.step()
        seen.append(float(loss.detach()))
    assert seen[-1] < 0.9 * seen[0]
    assert all(torch.equal(value, taught[name]) for name, value in task.teacher.state_dict().items())


def test_a_batch_of_mosaics() -> None:
    task = MosaicTask(small_sam(), small_net(), batch=2)
    assert torch.isfinite(task.loss(rng(), 0.0)["loss"])
    assert SMALL_3D.similarities * SMALL_3D.similarity_width == task.network["pixels"].out_channels
