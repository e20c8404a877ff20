"""The arithmetic of a suggestion against slow, obvious versions of it, and what the greedy choice promises."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from scarceseg.active.features import Watched, standardised, volume_statistics
from scarceseg.active.measure import Measured
from scarceseg.active.scores import (
    class_uncertainty,
    disagreement,
    entropy_map,
    greedy,
    informativeness,
    novelty,
    rank_share,
    volume_uncertainty,
)
from scarceseg.active.suggest import rank
from scarceseg.networks import build_network


def softmax(seed: int, classes: int, shape: tuple[int, ...]) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(classes, *shape)) * 2
    share = np.exp(logits)
    return (share / share.sum(0)).astype(np.float32)


@pytest.mark.parametrize("classes", [2, 4])
def test_entropy_is_one_where_all_classes_are_alike(classes: int) -> None:
    p = softmax(0, classes, (3, 4, 2))
    p[:, 0, 0, 0] = 1 / classes
    p[:, 1, 0, 0] = np.eye(classes)[1]
    expected = np.zeros(p.shape[1:])
    for at in np.ndindex(*expected.shape):
        expected[at] = -sum(v * math.log(v) for v in map(float, p[(slice(None), *at)]) if v > 0) / math.log(classes)
    np.testing.assert_allclose(entropy_map(p), expected, atol=1e-6)
    assert entropy_map(p)[0, 0, 0] == pytest.approx(1) and entropy_map(p)[1, 0, 0] == 0


@pytest.mark.parametrize("rim", [0, 1, 2])
def test_uncertainty_is_the_mean_over_structure_and_rim(rim: int) -> None:
    g = np.random.default_rng(3)
    entropy = g.random((9, 7, 8)).astype(np.float32)
    label = np.zeros(entropy.shape, np.uint8)
    label[0:2, 1:3, 0] = 1  # at the border, and once more elsewhere
    label[6, 5, 5] = 1
    label[4:7, 2:4, 3:6] = 3
    for index, value in enumerate(class_uncertainty(entropy, label, 4, rim), start=1):
        inside = np.argwhere(label == index)
        near = [
            entropy[at]
            for at in np.ndindex(*entropy.shape)
            if any(np.abs(np.array(at) - v).sum() <= rim for v in inside)
        ]
        assert value is None if not near else value == pytest.approx(float(np.mean(near)), abs=1e-6)


def test_easy_background_does_not_swamp_a_structure() -> None:
    small, large = np.full((5, 5, 5), 0.02, np.float32), np.full((25, 25, 25), 0.02, np.float32)
    values = []
    for entropy in (small, large):
        entropy[2, 2, 2] = 0.9
        label = (entropy > 0.5).astype(np.uint8)
        values.append(class_uncertainty(entropy, label, 2)[0])
    assert values[0] == pytest.approx(values[1]) and small.mean() > 1.3 * large.mean()


def test_a_structure_that_must_be_there_and_is_not_found_is_most_uncertain() -> None:
    assert volume_uncertainty([0.2, None], {1, 2}, 0.1) == pytest.approx(0.6)
    assert volume_uncertainty([0.2, None], {1}, 0.1) == pytest.approx(0.2)
    assert volume_uncertainty([None, None], {1}, 0.1) == 1.0
    assert volume_uncertainty([None, None], set(), 0.1) == 0.1


def test_disagreement_is_one_minus_the_mean_dice() -> None:
    g = np.random.default_rng(5)
    mine, theirs = g.integers(0, 3, (6, 5, 4)).astype(np.uint8), g.integers(0, 3, (6, 5, 4)).astype(np.uint8)
    theirs[0] = 255
    dice = []
    for c in (1, 2):
        a = {tuple(v) for v in np.argwhere(mine == c) if v[0] != 0}
        b = {tuple(v) for v in np.argwhere(theirs == c)}
        dice.append(2 * len(a & b) / (len(a) + len(b)))
    assert disagreement(mine, theirs, 4) == pytest.approx(1 - np.mean(dice))  # nobody finds class 3
    nothing = np.zeros_like(mine)
    assert disagreement(mine, mine, 4) == 0 and disagreement(nothing, nothing, 4) == 0
    assert disagreement(mine, nothing, 4) == 1
    assert disagreement(mine, np.full_like(mine, 255), 4) is None


def test_ranks_within_the_pool() -> None:
    np.testing.assert_allclose(rank_share(np.array([5.0, 1.0, 5.0, 9.0])), [2.5 / 4, 1 / 4, 2.5 / 4, 1])
    np.testing.assert_allclose(rank_share(np.array([np.nan, 2.0, 1.0])), [np.nan, 1, 0.5])
    inform = informativeness(np.array([0.1, 0.2, 0.3]), np.array([0.9, np.nan, 0.1]))
    np.testing.assert_allclose(inform, [(1 / 3 + 1) / 2, 2 / 3, (1 + 1 / 2) / 2])


def test_one_odd_scan_does_not_stretch_the_scale() -> None:
    pool = np.array([1.0, 2.0, 3.0, 4.0])
    odd = np.array([1.0, 2.0, 3.0, 4000.0])
    np.testing.assert_allclose(novelty(pool, pool), [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(novelty(odd, odd), novelty(pool, pool))
    np.testing.assert_allclose(novelty(np.array([0.0, 0.5, 2.5, 9.0]), pool), [0, 0.125, 0.625, 1])
    np.testing.assert_allclose(novelty(np.zeros(3), np.zeros(3)), 1)


def distances(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.array([[np.linalg.norm(a - b) for b in others] for a in points])


def test_greedy_is_the_slow_version_of_itself() -> None:
    g = np.random.default_rng(11)
    points, labelled, inform = g.normal(size=(12, 3)), g.normal(size=(2, 3)), g.random(12)
    between, start = distances(points, points), distances(points, labelled).min(1)
    taken: list[int] = []
    for pick in greedy(inform, start, between):
        best, at = -1.0, -1
        for i in range(12):
            if i not in taken:
                d = min([start[i], *(between[i, j] for j in taken)])
                places = [0.0, *sorted(start)]
                score = inform[i] * float(np.interp(d, places, np.arange(13) / 12))
                best, at = max((best, at), (score, i))
        assert (pick.index, pick.score) == (at, pytest.approx(best))
        taken.append(at)
    assert sorted(taken) == list(range(12))
    scores = [pick.score for pick in greedy(inform, start, between)]
    assert scores == sorted(scores, reverse=True)


def test_of_two_equal_volumes_the_second_waits() -> None:
    points = np.array([[5.0, 0.0], [5.0, 0.0], [0.0, 1.0]])
    order = greedy(np.array([1.0, 1.0, 0.1]), distances(points, np.zeros((1, 2))).min(1), distances(points, points))
    assert [pick.index for pick in order] == [0, 2, 1]
    assert order[2].score == 0 and order[2].after == 0 and order[0].after is None


def test_a_copy_of_a_labelled_volume_comes_last() -> None:
    points = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    order = greedy(np.array([1.0, 0.2, 0.2]), distances(points, np.zeros((1, 2))).min(1), distances(points, points))
    assert [pick.index for pick in order] == [1, 2, 0]


def test_features_are_the_mean_of_the_coarsest_level_over_all_windows() -> None:
    network = build_network("vnet", 1, 2, {"n_filters": 1}).eval()
    watched = Watched(network)
    x = torch.randn(5, 1, 16, 16, 32)
    with torch.no_grad():
        assert torch.equal(watched(x), network(x))
        watched.reset()
        watched(x[:2])
        watched(x[2:])
        expected = torch.stack([network.encode(x[i : i + 1])[-1][0].flatten(1).mean(1) for i in range(5)]).mean(0)
    found = watched.features()
    assert found is not None
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-6)
    watched.reset()
    assert watched.features() is None


def test_a_network_that_shows_no_encoder_gives_no_features() -> None:
    network = build_network("UNet", 1, 2, {"channels": [2, 4], "strides": [2], "num_res_units": 0}).eval()
    watched = Watched(network)
    with torch.no_grad():
        assert watched(torch.zeros(1, 1, 16, 16, 16)).shape == (1, 2, 16, 16, 16)
    assert watched.features() is None and watched.divisor == network.divisor


def test_statistics_tell_intensity_and_shape_apart() -> None:
    g = np.random.default_rng(0)
    image = g.normal(size=(2, 6, 5, 4)).astype(np.float32)
    label = np.zeros((6, 5, 4), np.uint8)
    label[1:4, 2:4, 1] = 1
    row = volume_statistics(image, label, (2.0, 1.0, 3.0), 3)
    assert row[0] == pytest.approx(image[0].mean()) and row[4] == pytest.approx(np.median(image[0]))
    np.testing.assert_allclose(row[14:17], [12, 5, 12])
    np.testing.assert_allclose(row[17:], [math.log1p(6 * 6 / 1000), 6, 2, 3, 0, 0, 0, 0], rtol=1e-6)
    rows = standardised(np.stack([row, row, row + 0.5]))
    np.testing.assert_allclose(rows.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(rows.std(0), 1)
    assert not standardised(np.stack([row, row])).any()


def measured(case: str, features: list[float], uncertainty: float | None, other: float | None = None) -> Measured:
    present = (1,) if case.startswith("labelled") else None
    doubt = {} if other is None else {"atlas": other}
    return Measured(case, (uncertainty,), 0.01, doubt, present, "encoder", np.array(features, np.float32))


def test_the_ranking_says_why() -> None:
    labelled = [measured("labelled_a", [0, 0], 0.1), measured("labelled_b", [9, 9], 0.1)]
    pool = [
        measured("dull", [0.1, 0], 0.2, 0.1),
        measured("hard", [5, 5], 0.6, 0.5),
        measured("empty", [-9, -9], None, 1.0),
        measured("twin", [5, 5], 0.6, 0.5),
    ]
    result = rank(Path("run"), 9, labelled, pool, ("background", "heart"), "abc")
    assert result.count == 4 and len(result.suggestions) == 4 and result.teachers == ("atlas",)
    assert "only 4 volumes are unlabelled" in result.notes[0] and len(result.notes) == 1
    by_name = {one.case: one for one in result.ranking}
    assert result.ranking[0].case == "empty" and by_name["empty"].uncertainty == 1.0
    assert "finds no heart in it, which every labelled volume has" in by_name["empty"].why
    assert "(Dice 0 %) is the lowest of 4" in by_name["empty"].why
    assert "uncertainty is the lowest of 4" in by_name["dull"].why and by_name["dull"].nearest == "labelled_a"
    assert "2nd highest of 4 (shared with 1 more)" in by_name["hard"].why
    assert "resembles hard, suggested before it" in by_name["twin"].why
    assert by_name["hard"].distance == pytest.approx(math.hypot(4, 4)) and by_name["hard"].nearest == "labelled_b"


def test_without_another_teacher_and_with_equal_features() -> None:
    labelled, pool = [measured("labelled_a", [1, 1], 0.1)], [measured("x", [1, 1], 0.2), measured("y", [1, 1], 0.4)]
    result = rank(Path("run"), 1, labelled, pool, ("background", "heart"), "abc")
    assert [one.case for one in result.ranking] == ["y", "x"] and result.suggestions[0].disagreement is None
    assert "counts alone" in result.notes[0] and "do not tell the volumes apart" in result.notes[1]
    only = rank(Path("run"), 1, labelled, pool[:1], ("background", "heart"), "abc")
    assert only.suggestions[0].why.startswith("It is the only unlabelled volume.")
