"""Prepared volumes: right values at the right place, back again, cached, and blind to hidden labels."""

from __future__ import annotations

import errno
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from scarceseg.data.cache import entry_path, load
from scarceseg.data.dataset import load_dataset, make_split
from scarceseg.data.formats import detached
from scarceseg.data.geometry import matrix, orient_geometry, respace
from scarceseg.data.images import read_image, read_label, read_volume, write_image
from scarceseg.data.plan import Normalisation, Plan
from scarceseg.data.prepare import (
    PreparedCase,
    normalise,
    prepare_cases,
    prepare_label,
    prepare_volume,
    prepared_geometry,
    restore,
    restore_label,
)
from scarceseg.errors import DataError, RunError
from scarceseg.types import Geometry
from tests.data.volumes import OBLIQUE, RAS, SAGITTAL, TILTED, Array, ball, grid, planned, smooth, write_dataset

DIRECTIONS = [RAS, OBLIQUE, SAGITTAL, TILTED]


def plan_for(spacing: tuple[float, float, float], classes: int = 2, *kinds: str) -> Plan:
    return Plan(
        dataset="made",
        channels=tuple(f"channel {n}" for n in range(len(kinds or "1"))),
        classes=tuple(f"class {n}" for n in range(classes)),
        file_ending=".nii.gz",
        spacing_mm=spacing,
        patch=(16, 16, 16),
        normalisation=tuple(Normalisation(kind=kind) for kind in kinds or ("none",)),  # type: ignore[arg-type]
        batch_labeled=2,
        batch_unlabeled=2,
        median_shape=(16, 16, 16),
        windows=(1, 1, 1),
        memory_estimate_mb=1,
    )


def world(geometry: Geometry) -> Array:
    """World position of every voxel ``[3, X, Y, Z]``."""
    index = np.indices(geometry.size) * np.array(geometry.spacing_mm)[:, None, None, None]
    return np.tensordot(matrix(geometry), index, axes=1) + np.array(geometry.origin)[:, None, None, None]


def blocks(array: Array) -> Array:
    """Mean over 2x2x2 blocks of even-sized ``[X, Y, Z]``."""
    x, y, z = (side // 2 for side in array.shape)
    return array[: 2 * x, : 2 * y, : 2 * z].reshape(x, 2, y, 2, z, 2).mean((1, 3, 5))


def test_file_with_positive_diagonal_affine_is_not_turned() -> None:
    geometry = grid((7, 5, 3), (1, 2, 3), (4, 5, 6))
    volume = smooth((1, 7, 5, 3))
    prepared, found = prepare_volume(volume, geometry, plan_for((1, 2, 3)))
    np.testing.assert_array_equal(prepared, volume)
    assert found == geometry


@pytest.mark.parametrize("direction", [*DIRECTIONS, (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0)])
def test_turning_moves_no_voxel(direction: tuple[float, ...]) -> None:
    """A volume that holds its own world position must still hold it after turning, along nearly canonical axes."""
    geometry = grid((7, 5, 3), (1, 2, 3), (4, -5, 6), direction)
    volume = world(geometry).astype(np.float32)
    plan = plan_for(orient_geometry(geometry).spacing_mm, 2, "none", "none", "none")
    prepared, found = prepare_volume(volume, geometry, plan)
    np.testing.assert_allclose(prepared, world(found), atol=1e-5)
    assert (np.diag(matrix(found)) * (-1, -1, 1) > 0.8).all()
    np.testing.assert_array_equal(restore(prepared, found, geometry), volume)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("spacing", [(1.7, 1.3, 2.0), (0.6, 0.9, 1.1)])
def test_resampling_keeps_a_linear_field_in_place(
    direction: tuple[float, ...], spacing: tuple[float, float, float]
) -> None:
    """Linear interpolation of a function linear in world coordinates is exact, away from the border."""
    geometry = grid((19, 15, 13), (0.9, 1.1, 1.4), (4, -5, 6), direction)
    volume = world(geometry).astype(np.float32)
    prepared, found = prepare_volume(volume, geometry, plan_for(spacing, 2, "none", "none", "none"))
    inner = (slice(None), *[slice(2, -2)] * 3)
    np.testing.assert_allclose(prepared[inner], world(found)[inner], atol=1e-4)
    back = restore(prepared, found, geometry)
    inner = (slice(None), *[slice(4, -4)] * 3)
    np.testing.assert_allclose(back[inner], volume[inner], atol=1e-4)


def test_halving_is_block_mean() -> None:
    volume = smooth((1, 12, 10, 8), sigma=0.5)
    prepared, found = prepare_volume(volume, grid((12, 10, 8)), plan_for((2, 2, 2)))
    np.testing.assert_allclose(prepared[0], blocks(volume[0]), rtol=1e-5)
    assert found.spacing_mm == (2, 2, 2) and found.origin == (-0.5, -0.5, 0.5)


def test_halving_an_odd_size_keeps_the_last_row() -> None:
    volume = smooth((1, 13, 10, 8), sigma=0.5)
    prepared, _ = prepare_volume(volume, grid((13, 10, 8)), plan_for((2, 2, 2)))
    assert prepared.shape == (1, 7, 5, 4)
    np.testing.assert_allclose(prepared[0, :6], blocks(volume[0]), rtol=1e-5)
    np.testing.assert_allclose(prepared[0, 6], blocks(volume[0][[12, 12]])[0], rtol=1e-5)


def test_resampling_agrees_with_scipy() -> None:
    volume = smooth((1, 9, 8, 7), sigma=0.5)
    prepared, found = prepare_volume(volume, grid((9, 8, 7)), plan_for((0.7, 1.6, 0.45)))
    assert found.size == (13, 5, 16)
    scale = np.array(found.spacing_mm)[:, None, None, None]
    at = (np.indices(found.size) + 0.5) * scale - 0.5
    expected = ndimage.map_coordinates(volume[0], at, order=1, mode="nearest")
    np.testing.assert_allclose(prepared[0], expected, rtol=1e-4)


def test_strong_reduction_is_smoothed_first() -> None:
    """A pattern finer than the new grid must average out instead of showing up as a coarse pattern."""
    size = (60, 60, 60)
    stripes = np.broadcast_to((np.arange(60) % 5 < 2).astype(np.float32)[:, None, None], size)[None]
    prepared, _ = prepare_volume(stripes, grid(size), plan_for((6, 6, 6)))
    np.testing.assert_allclose(prepared[:, 1:-1], 0.4, atol=0.1)


def test_constant_volume_has_no_dark_border() -> None:
    prepared, _ = prepare_volume(np.full((1, 9, 8, 7), 5, np.float32), grid((9, 8, 7)), plan_for((1.3, 0.7, 2.9)))
    np.testing.assert_allclose(prepared, 5, rtol=1e-6)


def test_nearly_equal_spacing_is_not_resampled() -> None:
    volume = smooth((1, 7, 5, 3))
    prepared, found = prepare_volume(volume, grid((7, 5, 3), (1.0005, 1, 1)), plan_for((1, 1, 1)))
    np.testing.assert_array_equal(prepared, volume)
    assert found.spacing_mm == (1.0005, 1, 1)


def test_at_least_one_voxel_is_left() -> None:
    assert respace(grid((9, 8, 1)), (1, 1, 5)).size == (9, 8, 1)


def test_input_is_left_unchanged() -> None:
    volume = smooth((1, 7, 5, 3))
    copy = volume.copy()
    for kind in ("none", "zscore", "ct"):
        prepare_volume(volume, grid((7, 5, 3)), plan_for((1, 1, 1), 2, kind))
    np.testing.assert_array_equal(volume, copy)


def test_wrong_number_of_channels() -> None:
    with pytest.raises(DataError, match=r"expected 1 channels \(channel 0\), got 2"):
        prepare_volume(smooth((2, 7, 5, 3)), grid((7, 5, 3)), plan_for((1, 1, 1)))


def test_zscore() -> None:
    channel = smooth((9, 8, 7))
    scaled = normalise(channel, Normalisation(kind="zscore"))
    np.testing.assert_allclose(scaled, (channel - channel.mean()) / channel.std(), atol=1e-4)
    np.testing.assert_array_equal(normalise(np.full((3, 3, 3), 7, np.float32), Normalisation(kind="zscore")), 0)


def test_zscore_of_a_stripped_volume_uses_the_inside() -> None:
    channel = np.zeros((10, 10, 10), np.float32)
    channel[2:6, 2:8, 2:8] = 50 + smooth((4, 6, 6))
    inside = channel[channel != 0]
    scaled = normalise(channel, Normalisation(kind="zscore"))
    np.testing.assert_allclose(scaled[channel != 0].mean(), 0, atol=1e-5)
    np.testing.assert_allclose(scaled[channel != 0].std(), 1, rtol=1e-5)
    np.testing.assert_allclose(np.unique(scaled[channel == 0]), [-inside.mean() / inside.std()], rtol=1e-5)


def test_ct_window() -> None:
    channel = np.array([-2000.0, -100, 0, 100, 3000], np.float32).reshape(5, 1, 1)
    how = Normalisation(kind="ct", low=-100, high=200, mean=50, std=10)
    np.testing.assert_allclose(normalise(channel, how).ravel(), [-15, -15, -5, 5, 15])


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.0), (0.6, 0.8, 1.3), (3.1, 2.5, 2.9)])
def test_label_stays_a_ball_of_the_same_size_and_centre(
    direction: tuple[float, ...], spacing: tuple[float, float, float]
) -> None:
    geometry = grid((31, 29, 33), (1, 1, 1), (3, 4, 5), direction)
    label = ball(geometry.size, 9) * np.uint8(2)
    label[ball(geometry.size, 5) > 0] = 1
    plan = plan_for(spacing, 3)
    prepared, found = prepare_label(label, geometry, plan), prepared_geometry(geometry, plan)
    assert prepared.shape == found.size and prepared.dtype == np.uint8
    for value in (1, 2):
        old, new = (label > 0) & (label <= value), (prepared > 0) & (prepared <= value)
        radius = np.cbrt(new.sum() * np.prod(found.spacing_mm) / old.sum()) * (5, 9)[value - 1]
        assert radius == pytest.approx((5, 9)[value - 1], abs=0.15 * max(spacing))
        np.testing.assert_allclose(world(found)[:, new].mean(1), world(geometry)[:, old].mean(1), atol=0.4)


def test_halved_label_is_the_block_majority() -> None:
    label = (smooth((12, 10, 8), sigma=1) > 100).astype(np.uint8)
    share = blocks(label.astype(np.float64))
    prepared = prepare_label(label, grid((12, 10, 8)), plan_for((2, 2, 2)))
    sure = share != 0.5
    np.testing.assert_array_equal(prepared[sure], share[sure] > 0.5)


def test_ties_do_not_shave_a_structure() -> None:
    """A slab whose two faces both cut blocks in half keeps its thickness, whatever way the ties go."""
    label = np.zeros((16, 4, 4), np.uint8)
    label[3:11] = 1
    prepared = prepare_label(label, grid((16, 4, 4)), plan_for((2, 2, 2)))
    assert prepared[:, 0, 0].sum() == 4
    assert (prepared == prepared[:, :1, :1]).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.0), (1.3, 0.8, 0.5), (1.0, 1.0, 1.0)])
def test_restored_probabilities_fill_the_original_grid(
    direction: tuple[float, ...], spacing: tuple[float, float, float]
) -> None:
    geometry = grid((23, 17, 15), (1, 1, 1), (3, 4, 5), direction)
    plan = plan_for(spacing)
    found = prepared_geometry(geometry, plan)
    foreground = prepare_volume(ball(geometry.size, 6)[None].astype(np.float32), geometry, plan)[0]
    probability = np.concatenate([1 - foreground, foreground])
    back = restore(probability, found, geometry)
    assert back.shape == (2, *geometry.size) and back.dtype == np.float32
    np.testing.assert_allclose(back.sum(0), 1, atol=1e-5)
    np.testing.assert_array_equal(restore_label(probability, found, geometry), back.argmax(0))
    expected = ball(geometry.size, 6) > 0
    overlap = 2 * (back.argmax(0).astype(bool) & expected).sum() / (back.argmax(0).sum() + expected.sum())
    assert overlap > 0.93


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_file_to_prediction_file_round_trip(tmp_path: Path, suffix: str) -> None:
    """Threshold a bright ball on the prepared grid: the mask file lies on the ball of the input file."""
    geometry = grid((25, 21, 17), (0.8, 1.0, 1.5), (-40, 25, 60), TILTED)
    bright = ball(geometry.size, 6)
    write_image(bright.astype(np.float32), geometry, tmp_path / f"in{suffix}")
    volume, original = read_volume([tmp_path / f"in{suffix}"])
    prepared, found = prepare_volume(volume, original, plan_for((1, 1, 1)))
    mask = restore_label(np.concatenate([1 - prepared, prepared]), found, original)
    write_image(mask, original, tmp_path / f"out{suffix}")
    back = read_label(tmp_path / f"out{suffix}", range(2), geometry)
    assert 2 * (back & bright).sum() / (int(back.sum()) + int(bright.sum())) > 0.93


# ---- the cache


def _entries(cache: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in cache.iterdir()}


def test_cases_are_mapped_and_made_once(tmp_path: Path) -> None:
    split, plan = planned(write_dataset(tmp_path / "d"), 2, spacing_mm=1.5)
    cache = tmp_path / "cache"
    seen: list[tuple[int, int]] = []
    first = prepare_cases(split.labelled, split.unlabelled, plan, cache, lambda n, of, name: seen.append((n, of)))
    assert list(first) == ["a", "b", "c", "d", "e"] and seen == [(n, 5) for n in range(1, 6)]
    before = _entries(cache)
    assert not [name for name in before if name.endswith(".tmp")]
    second = prepare_cases(split.labelled, split.unlabelled, plan, cache)
    assert _entries(cache) == before
    for name, case in first.items():
        assert isinstance(case.image, np.memmap) and not case.image.flags.writeable
        np.testing.assert_array_equal(case.image, second[name].image)
        assert (case.geometry, case.original) == (second[name].geometry, second[name].original)
        assert (case.label is not None) == (name in "ab")
    volume, geometry = read_volume(split.labelled[0].images)
    expected, found = prepare_volume(volume, geometry, plan)
    np.testing.assert_array_equal(first["a"].image, expected)
    assert first["a"].geometry == found and first["a"].original == geometry


def test_image_entry_serves_labelled_and_unlabelled_runs(tmp_path: Path) -> None:
    folder, cache = write_dataset(tmp_path / "d"), tmp_path / "cache"
    for labeled in (1, 3):
        split, plan = planned(folder, labeled)
        prepare_cases(split.labelled, split.unlabelled, plan, cache)
    names = [path.name for path in cache.glob("*.npy")]
    assert len([n for n in names if "-image-" in n]) == 5 and len([n for n in names if "-label-" in n]) == 3


def test_changed_source_or_plan_is_prepared_again(tmp_path: Path) -> None:
    folder, cache = write_dataset(tmp_path / "d"), tmp_path / "cache"
    split, plan = planned(folder, 1)
    old = prepare_cases(split.labelled, [], plan, cache)["a"]
    write_image(smooth(grid().size, seed=99), grid(), split.labelled[0].images[0])
    new = prepare_cases(split.labelled, [], plan, cache)["a"]
    assert not np.array_equal(old.image, new.image)
    other = plan.model_copy(update={"spacing_mm": (2.0, 2.0, 2.0)})
    assert prepare_cases(split.labelled, [], other, cache)["a"].image.shape == (1, 6, 6, 5)
    write_image(np.zeros(grid().size, np.uint8), grid(), folder / "labelsTr" / "a.nii.gz")
    label = prepare_cases(split.labelled, [], plan, cache)["a"].label
    assert label is not None and not label.any()


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "notes", "no notes", "other shape"])
def test_damaged_entry_is_made_again(tmp_path: Path, damage: str) -> None:
    split, plan = planned(write_dataset(tmp_path / "d"), 1)
    cache = tmp_path / "cache"
    expected = {n: np.array(c.image) for n, c in prepare_cases(split.labelled, split.unlabelled, plan, cache).items()}
    for path in list(cache.glob("*.npy")):
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:-5])
        elif damage == "empty":
            path.write_bytes(b"")
        elif damage == "text":
            path.write_text("garbage")
        elif damage == "notes":
            path.with_suffix(".json").write_text("{")
        elif damage == "no notes":
            path.with_suffix(".json").unlink()
        else:
            np.save(path, np.zeros((1, 2, 3)))
    again = prepare_cases(split.labelled, split.unlabelled, plan, cache)
    for name, case in again.items():
        np.testing.assert_array_equal(case.image, expected[name])
    assert again["a"].label is not None and again["a"].label.shape == again["a"].image.shape[1:]


def _prepare_in_process(folder: Path, cache: Path, barrier, results) -> None:  # type: ignore[no-untyped-def]
    split, plan = planned(folder, 2, spacing_mm=0.5)
    barrier.wait()
    cases = prepare_cases(split.labelled, split.unlabelled, plan, cache)
    results.put({name: float(np.asarray(case.image, np.float64).sum()) for name, case in cases.items()})


def test_two_processes_prepare_at_once(tmp_path: Path) -> None:
    folder, cache = write_dataset(tmp_path / "d"), tmp_path / "cache"
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_prepare_in_process, args=(folder, cache, barrier, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    sums = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    split, plan = planned(folder, 2, spacing_mm=0.5)
    alone = prepare_cases(split.labelled, split.unlabelled, plan, tmp_path / "other")
    expected = {name: float(np.asarray(case.image, np.float64).sum()) for name, case in alone.items()}
    assert sums == [expected, expected]
    assert not list(cache.glob("*.tmp"))


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    split, plan = planned(write_dataset(tmp_path / "d"), 1)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="SCARCESEG_CACHE"):
        prepare_cases(split.labelled, [], plan, tmp_path / "file" / "cache")


def test_default_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split, plan = planned(write_dataset(tmp_path / "d"), 1)
    monkeypatch.setenv("SCARCESEG_CACHE", str(tmp_path / "mine"))
    prepare_cases(split.labelled, [], plan, None)
    assert len(list((tmp_path / "mine").glob("*.npy"))) == 2


# ---- the leak guard


def test_label_files_of_other_cases_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Split, fingerprint, plan and prepare with unreadable garbage in place of every label that is not to be seen."""
    folder = write_dataset(tmp_path / "d", labelled=("a", "b", "c", "d", "e"), unlabelled=())
    for number, name in enumerate("cde"):
        path = folder / "labelsTr" / f"{name}.nii.gz"
        path.unlink()
        if number == 0:
            path.mkdir()  # cannot be opened by anybody
        else:
            path.write_bytes(b"garbage")
            path.chmod(0)
    hidden = {str(folder / "labelsTr" / f"{name}.nii.gz") for name in "cde"}
    touched: list[str] = []
    real = os.stat

    def watch(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        touched.append(str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", watch)

    dataset = load_dataset(folder)
    split = make_split(dataset, 2, ["e"])
    assert split.to_json() == {"labelled": ["a", "b"], "unlabelled": ["c", "d"], "val": ["e"]}
    split, plan = planned(folder, 2, spacing_mm=1.5)
    cases = prepare_cases(split.labelled, split.unlabelled, plan, tmp_path / "cache")

    assert [name for name, case in cases.items() if case.label is not None] == ["a", "b"]
    assert not hidden & set(touched)
    assert any(path.endswith("a.nii.gz") for path in touched)  # the watch works


def test_reading_a_hidden_label_would_fail(tmp_path: Path) -> None:
    """The garbage of the test above is such that a reader of it is found out."""
    folder = write_dataset(tmp_path / "d")
    (folder / "labelsTr" / "c.nii.gz").write_bytes(b"garbage")
    with pytest.raises(DataError, match=r"c\.nii\.gz"):
        planned(folder, 3)


# ---- real volumes


def test_real_volume_halves_to_block_means(shared: Path, tmp_path: Path) -> None:
    dataset = load_dataset(shared / "la")
    case = dataset.cases[0]
    assert len(dataset.cases) == 80 and case.name == "la_000"
    plan = plan_for((1.25, 1.25, 1.25), 2, "zscore")
    prepared: PreparedCase = prepare_cases([case], [], plan, tmp_path)["la_000"]
    array = read_image(case.images[0])[0].astype(np.float64)
    expected = blocks((array - array.mean()) / array.std())
    inner = tuple(slice(side) for side in expected.shape)
    assert prepared.image.shape == (1, 92, 70, 44)
    np.testing.assert_allclose(prepared.image[0][inner], expected, atol=1e-5)
    assert case.label is not None and prepared.label is not None
    share = blocks(read_image(case.label)[0].astype(np.float64))
    np.testing.assert_array_equal(prepared.label[inner][share != 0.5], share[share != 0.5] > 0.5)


@pytest.mark.parametrize("suffix", [".mhd", ".nhdr"])
def test_voxels_beside_their_header_are_watched_too(tmp_path: Path, suffix: str) -> None:
    header = tmp_path / f"a{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5, 6), np.int16)), str(header))
    (voxels,) = detached(header)
    assert voxels.parent == tmp_path and voxels.stat().st_size == 240
    before = entry_path(tmp_path, "a", [header], {})
    assert entry_path(tmp_path, "a", [header], {}) == before
    voxels.write_bytes(np.full(120, 7, np.int16).tobytes())
    os.utime(voxels, ns=(1, 1))
    assert entry_path(tmp_path, "a", [header], {}) != before


def test_rows_of_files_and_headers_that_hold_their_voxels(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"s{number:02d}.raw").touch()
    texts = {
        "a.mhd": "ElementDataFile = s%02d.raw 1 2 1",
        "b.mhd": "ElementDataFile = LIST\ns01.raw\ns02.raw\n",
        "c.nhdr": "NRRD0004\ndata file: s01.raw\n",
        "d.mha": "ElementDataFile = LOCAL",
        "e.mhd": f"ElementDataFile = {tmp_path}/s%02d.raw 1 2 1",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    found = {name: [path.name for path in detached(tmp_path / name)] for name in texts}
    assert found == {
        "a.mhd": ["s01.raw", "s02.raw"],
        "b.mhd": ["s01.raw", "s02.raw"],
        "c.nhdr": ["s01.raw"],
        "d.mha": [],
        "e.mhd": ["s01.raw", "s02.raw"],
    }


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_too_many_open_files_are_told_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    split, plan = planned(write_dataset(tmp_path / "d"), 2)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0] // 2, 128), limits[1]))
    kept = prepare_cases(split.labelled, split.unlabelled, plan, tmp_path / "cache")
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(limits[1] if limits[1] > 0 else 10240, 10240)
    (entry,) = (tmp_path / "cache").glob("a-image*.npy")
    refuse = OSError(errno.EMFILE, "Too many open files")
    monkeypatch.setattr("numpy.load", lambda *_, **__: (_ for _ in ()).throw(refuse))
    with pytest.raises(RunError, match="ulimit -n"):
        load(entry)
    assert kept["a"].image.size
