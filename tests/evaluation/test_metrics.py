"""Metrics of two masks: stored values of the reference implementation, the slow oracle, and the edges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from scarceseg.errors import DataError
from scarceseg.evaluation import metrics
from scarceseg.evaluation.metrics import METRICS, binary_metrics, surface, surface_distances
from tests.reference import metrics as oracle

CASES = (
    "anisotropic",
    "anisotropic_coarse_z",
    "both_empty",
    "ellipsoids",
    "empty_prediction",
    "empty_reference",
    "identical",
    "scattered",
    "shifted",
    "single_voxel_vs_blob",
    "single_voxels",
    "touching_border",
)


def blob(shape: tuple[int, int, int], centre: tuple[float, ...], radius: tuple[float, ...]) -> np.ndarray:
    grid = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij", sparse=True)
    return (
        np.sum([np.broadcast_to(((x - c) / r) ** 2, shape) for x, c, r in zip(grid, centre, radius, strict=True)], 0)
        < 1
    )


def same(got: dict[str, float], expected: dict[str, float], rtol: float = 1e-9) -> None:
    for metric in METRICS:
        np.testing.assert_allclose(got[metric], expected[metric], rtol=rtol, atol=1e-12, err_msg=metric)


@pytest.fixture(params=["chosen", "tree", "transform"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of finding distances, whichever the masks would choose."""
    if request.param != "chosen":
        monkeypatch.setattr(metrics, "_TREE_VOXELS_PER_POINT", 0 if request.param == "tree" else 10**9)
    return request.param


@pytest.mark.parametrize("name", CASES)
def test_stored_values(shared: Path, name: str, way: str) -> None:
    with np.load(shared / "conformance" / "metrics" / f"m_{name}.npz") as file:
        data = dict(file)
    spacing = data["spacing"].ravel()
    got = binary_metrics(data["prediction"], data["reference"], spacing)
    for metric in METRICS:
        expected = float(data[metric].ravel()[0])
        if name == "both_empty":  # the stored NaN is a fault of the reference implementation
            expected = 1.0 if metric in {"dice", "jaccard"} else 0.0
        np.testing.assert_allclose(got[metric], expected, rtol=1e-9, err_msg=metric)
    if name not in {"both_empty", "empty_prediction", "empty_reference"}:
        there, back = surface_distances(data["prediction"], data["reference"], spacing)
        np.testing.assert_allclose(back.mean(), float(data["asd_reverse"].ravel()[0]), rtol=1e-9)
        np.testing.assert_allclose(max(there.max(), back.max()), float(data["hd"].ravel()[0]), rtol=1e-9)


@pytest.mark.parametrize(
    ("shape", "share", "spacing"),
    [
        ((7, 5, 9), 0.3, (1.0, 1.0, 1.0)),
        ((5, 9, 4), 0.03, (0.7, 1.3, 5.0)),
        ((1, 8, 3), 0.5, (2.0, 0.5, 1.0)),
        ((6, 6, 6), 0.9, (0.625, 0.625, 1.25)),
    ],
)
def test_random_masks_equal_oracle(
    shape: tuple[int, int, int], share: float, spacing: tuple[float, float, float], way: str
) -> None:
    generator = np.random.default_rng(3)
    p, r = generator.random(shape) < share, generator.random(shape) < share
    p[0, 0, 0] = r[-1, -1, -1] = True
    same(binary_metrics(p, r, spacing), oracle.metrics(p, r, spacing))
    there, back = surface_distances(p, r, spacing)
    np.testing.assert_allclose(there, oracle.distances(p, r, spacing), rtol=1e-12)
    np.testing.assert_allclose(back, oracle.distances(r, p, spacing), rtol=1e-12)


sizes = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))


@settings(max_examples=60, deadline=None)
@given(
    masks=sizes.flatmap(lambda shape: st.tuples(arrays(bool, shape), arrays(bool, shape))),
    spacing=st.tuples(*[st.floats(0.1, 6.0)] * 3),
)
def test_any_masks_equal_oracle(masks: tuple[np.ndarray, np.ndarray], spacing: tuple[float, float, float]) -> None:
    p, r = masks
    same(binary_metrics(p, r, spacing), oracle.metrics(p, r, spacing))
    forward, backward = binary_metrics(p, r, spacing), binary_metrics(r, p, spacing)
    for metric in ("dice", "jaccard", "assd", "hd95"):
        np.testing.assert_allclose(forward[metric], backward[metric], rtol=1e-12)
    np.testing.assert_array_equal(np.argwhere(surface(p)), np.array(sorted(oracle.surface_points(p))).reshape(-1, 3))


def test_asd_has_a_direction() -> None:
    small, large = blob((20, 20, 20), (10, 10, 10), (3, 3, 3)), blob((20, 20, 20), (10, 10, 10), (8, 4, 4))
    there, back = binary_metrics(small, large, (1, 1, 1)), binary_metrics(large, small, (1, 1, 1))
    assert there["asd"] < 0.8 * back["asd"]


def test_box_and_scale_change_nothing() -> None:
    p, r = blob((19, 23, 17), (9, 11, 8), (6, 5, 4)), blob((19, 23, 17), (10, 10, 9), (5, 6, 4))
    plain = binary_metrics(p, r, (1, 2, 3))
    same(binary_metrics(np.pad(p, 5), np.pad(r, 5), (1, 2, 3)), plain)
    doubled = binary_metrics(p, r, (2, 4, 6))
    for metric in ("asd", "assd", "hd95"):
        np.testing.assert_allclose(doubled[metric], 2 * plain[metric], rtol=1e-12)
    integers = binary_metrics(p.astype(np.uint8) * 7, r.astype(np.int64), (1, 2, 3))
    assert integers == plain


def test_ragged_masks_take_the_transform_and_smooth_ones_the_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def noted(name: str) -> None:
        original = getattr(metrics, name)

        def call(*arguments: object) -> object:
            called.append(name)
            return original(*arguments)

        monkeypatch.setattr(metrics, name, call)

    noted("_tree_distances")
    noted("_transform_distances")
    smooth = blob((60, 60, 60), (30, 30, 30), (25, 25, 25))
    binary_metrics(smooth, np.roll(smooth, 2, 0), (1, 1, 1))
    ragged = np.random.default_rng(0).random((20, 20, 20)) < 0.5
    binary_metrics(ragged, np.roll(ragged, 3, 0), (1, 1, 1))
    assert called == ["_tree_distances"] * 2 + ["_transform_distances"] * 2


def test_empty_masks() -> None:
    nothing, thing = np.zeros((4, 5, 6), bool), blob((4, 5, 6), (2, 2, 3), (2, 2, 2))
    assert binary_metrics(nothing, nothing, (1, 1, 1)) == {"dice": 1, "jaccard": 1, "asd": 0, "assd": 0, "hd95": 0}
    for p, r in ((nothing, thing), (thing, nothing)):
        got = binary_metrics(p, r, (1, 1, 1))
        assert got["dice"] == got["jaccard"] == 0
        assert all(np.isnan(got[metric]) for metric in ("asd", "assd", "hd95"))
        zero = binary_metrics(p, r, (1, 1, 1), empty="zero")
        assert zero == {"dice": 0, "jaccard": 0, "asd": 0, "assd": 0, "hd95": 0}
    there, back = surface_distances(thing, nothing, (1, 1, 1))
    assert there.size == surface(thing).sum() and np.isnan(there).all() and back.size == 0


def test_wrong_shapes_and_spacings() -> None:
    with pytest.raises(DataError, match=r"\(3, 3, 3\).*\(3, 3, 4\)"):
        binary_metrics(np.ones((3, 3, 3)), np.ones((3, 3, 4)), (1, 1, 1))
    for spacing in ((1, 1), (1, 1, 0), (1, -1, 1), (1, 1, float("nan"))):
        with pytest.raises(DataError, match="spacing"):
            binary_metrics(np.ones((3, 3, 3)), np.ones((3, 3, 3)), spacing)
