"""Image files in every supported format come back with their values and their place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from scarceseg.data.geometry import same_geometry
from scarceseg.data.images import list_images, output_suffix, read_image, read_label, read_volume, write_image
from scarceseg.errors import DataError, RunError
from tests.data.volumes import OBLIQUE, RAS, SAGITTAL, TILTED, Array, grid, smooth, write_dicom

DIRECTIONS = [RAS, OBLIQUE, SAGITTAL, TILTED]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_write_and_read_keep_values_and_place(tmp_path: Path, suffix: str, direction: tuple[float, ...]) -> None:
    geometry = grid((7, 5, 3), (0.7, 1.1, 2.5), (-31.5, 12.25, 80.0), direction)
    array = smooth(geometry.size)
    write_image(array, geometry, tmp_path / f"x{suffix}")
    back, found = read_image(tmp_path / f"x{suffix}")
    np.testing.assert_array_equal(back, array)
    assert same_geometry(found, geometry)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"x{suffix}"]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.bool_])
def test_write_keeps_type(tmp_path: Path, dtype: type) -> None:
    geometry = grid((4, 3, 5))
    array: Array = (smooth(geometry.size) > 100).astype(dtype)
    write_image(array, geometry, tmp_path / "x.nii.gz")
    back, _ = read_image(tmp_path / "x.nii.gz")
    np.testing.assert_array_equal(back, array)
    assert back.dtype == (np.uint8 if dtype is np.bool_ else dtype)


def test_index_order_agrees_with_nibabel(tmp_path: Path) -> None:
    array = smooth((6, 5, 4))
    affine = np.diag([0.5, 1.5, 2.0, 1.0])
    affine[:3, 3] = 10, 20, 30
    nibabel.Nifti1Image(array, affine).to_filename(tmp_path / "x.nii.gz")
    back, geometry = read_image(tmp_path / "x.nii.gz")
    np.testing.assert_array_equal(back, array)
    assert geometry.spacing_mm == (0.5, 1.5, 2.0)
    assert geometry.direction == RAS
    np.testing.assert_allclose(geometry.origin, (-10, -20, 30))  # RAS to LPS


def test_four_axes_are_written_class_last(tmp_path: Path) -> None:
    geometry = grid((4, 3, 5), direction=OBLIQUE)
    array = np.random.default_rng(0).random((2, 4, 3, 5), dtype=np.float32)
    write_image(array, geometry, tmp_path / "p.nii.gz")
    loaded = nibabel.load(tmp_path / "p.nii.gz")
    np.testing.assert_array_equal(np.moveaxis(np.asarray(loaded.dataobj), -1, 0), array)  # type: ignore[attr-defined]


def test_singleton_fourth_axis_is_dropped(tmp_path: Path) -> None:
    geometry = grid((4, 3, 5), (1, 2, 3), (5, 6, 7), OBLIQUE)
    array = smooth(geometry.size)
    write_image(array[None], geometry, tmp_path / "x.nrrd")
    back, found = read_image(tmp_path / "x.nrrd")
    np.testing.assert_array_equal(back, array)
    assert same_geometry(found, geometry)


@pytest.mark.parametrize("direction", [RAS, OBLIQUE])
def test_dicom_series(tmp_path: Path, direction: tuple[float, ...]) -> None:
    geometry = grid((8, 6, 5), (0.75, 0.75, 2.5), (-10, 5, 30), direction)
    array = np.rint(smooth(geometry.size)).astype(np.int16)
    write_dicom(tmp_path / "scan", array, geometry)
    back, found = read_image(tmp_path / "scan")
    np.testing.assert_array_equal(back, array)
    assert same_geometry(found, geometry)


def test_several_dicom_series_must_be_chosen_from(tmp_path: Path) -> None:
    first, second = grid((8, 6, 5)), grid((4, 4, 3))
    write_dicom(tmp_path, np.ones(first.size), first, "1.2.3.4")
    write_dicom(tmp_path, np.full(second.size, 7), second, "1.2.3.5")
    with pytest.raises(DataError, match=r"found 2: 1\.2\.3\.4.*1\.2\.3\.5"):
        read_image(tmp_path)
    identifier = next(uid for uid in _series(tmp_path) if "1.2.3.5" in uid)
    assert read_image(tmp_path, identifier)[0].shape == (4, 4, 3)
    with pytest.raises(DataError, match="no series 'other'"):
        read_image(tmp_path, "other")


def _series(folder: Path) -> tuple[str, ...]:
    from scarceseg.data.formats import series_in

    return series_in(folder)


def test_dicom_series_with_a_missing_slice_is_refused(tmp_path: Path) -> None:
    geometry = grid((8, 6, 7), (1, 1, 2))
    write_dicom(tmp_path, smooth(geometry.size), geometry, skip=[3])
    with pytest.raises(DataError, match="slices are missing"):
        read_image(tmp_path)


def test_volume_stacks_channels(tmp_path: Path) -> None:
    geometry = grid((4, 3, 5))
    arrays = [smooth(geometry.size, seed) for seed in range(2)]
    paths = [tmp_path / "a.nii.gz", tmp_path / "b.mha"]
    for array, path in zip(arrays, paths, strict=True):
        write_image(array, geometry, path)
    volume, found = read_volume(paths)
    np.testing.assert_array_equal(volume, np.stack(arrays))
    assert volume.dtype == np.float32 and same_geometry(found, geometry)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_label_of_whole_numbers_is_read_from_any_type(tmp_path: Path, dtype: type) -> None:
    geometry = grid((4, 3, 5))
    label = np.arange(60).reshape(4, 3, 5) % 3
    write_image(label.astype(dtype), geometry, tmp_path / "l.nii.gz")
    back = read_label(tmp_path / "l.nii.gz", range(3), geometry)
    np.testing.assert_array_equal(back, label)
    assert back.dtype == np.uint8


def test_failed_write_leaves_the_old_file_and_no_scrap(tmp_path: Path) -> None:
    code = """
import resource, signal, sys, numpy as np
from pathlib import Path
from scarceseg.data.images import write_image
from scarceseg.errors import RunError
from scarceseg.types import Geometry
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
array = np.random.default_rng(0).random((20, 20, 20))
geometry = Geometry((20, 20, 20), (1.0,) * 3, (0.0,) * 3, (1.0, 0, 0, 0, 1, 0, 0, 0, 1))
for path in sys.argv[1:]:
    try:
        write_image(array, geometry, Path(path))
    except RunError as error:
        print(error)
"""
    if sys.platform == "win32":
        pytest.skip("a file-size limit is not available")
    paths = [tmp_path / f"x{suffix}" for suffix in (".nii.gz", ".nii", ".nrrd", ".mha")]
    for path in paths:
        path.write_text("old")
    done = subprocess.run([sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True, check=True)
    for path in paths:
        assert f"cannot write {path} (" in done.stdout
        assert path.read_text() == "old"
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_unwritable_places(tmp_path: Path) -> None:
    geometry = grid((2, 2, 2))
    array = np.zeros(geometry.size)
    with pytest.raises(RunError, match="check that the folder exists"):
        write_image(array, geometry, tmp_path / "none" / "x.nii.gz")
    for name in ("x.png", "x.mhd", "x"):
        with pytest.raises(RunError, match="ends in"):
            write_image(array, geometry, tmp_path / name)


def test_output_suffix() -> None:
    names = {"a.nii.gz": ".nii.gz", "a.NII": ".nii", "a.mhd": ".mha", "a.nhdr": ".nrrd", "folder": ".nii.gz"}
    assert {name: output_suffix(Path(name)) for name in names} == names


def _touch(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")


def test_list_strips_the_channel_of_a_whole_folder_only(tmp_path: Path) -> None:
    _touch(tmp_path / "n", "a_0000.nii.gz", "b_0000.nii.gz", ".hidden.nii.gz", "notes.txt")
    assert [name for name, _ in list_images([tmp_path / "n"], 1)] == ["a", "b"]
    _touch(tmp_path / "p", "scan_0000.nrrd", "scan_0001.nrrd")
    assert [name for name, _ in list_images([tmp_path / "p"], 1)] == ["scan_0000", "scan_0001"]


def test_list_groups_channels(tmp_path: Path) -> None:
    _touch(tmp_path, "b_0001.nii.gz", "a_0001.nii.gz", "a_0000.nii.gz", "b_0000.nii.gz")
    found = list_images([tmp_path], 2)
    assert [(name, [path.name for path in paths]) for name, paths in found] == [
        ("a", ["a_0000.nii.gz", "a_0001.nii.gz"]),
        ("b", ["b_0000.nii.gz", "b_0001.nii.gz"]),
    ]
    with pytest.raises(DataError, match="expected the channels _0000 to _0002"):
        list_images([tmp_path], 3)
    with pytest.raises(DataError, match="found _0000, _0001"):
        list_images([tmp_path], 3)


def test_list_finds_dicom(tmp_path: Path) -> None:
    geometry = grid((4, 4, 3))
    for name in ("p1", "p2"):
        write_dicom(tmp_path / name, smooth(geometry.size), geometry)
    assert list_images([tmp_path / "p1"], 1) == [("p1", (tmp_path / "p1",))]
    assert [name for name, _ in list_images([tmp_path], 1)] == ["p1", "p2"]
    with pytest.raises(DataError, match="reads 2 channels"):
        list_images([tmp_path], 2)


def test_list_refuses_what_is_no_image(tmp_path: Path) -> None:
    _touch(tmp_path / "a", "x.nii.gz")
    _touch(tmp_path / "b", "x.nrrd")
    _touch(tmp_path / "c", "x.txt")
    with pytest.raises(DataError, match="two inputs give the case name 'x'"):
        list_images([tmp_path / "a", tmp_path / "b"], 1)
    with pytest.raises(DataError, match="found neither"):
        list_images([tmp_path / "c"], 1)
    with pytest.raises(DataError, match="ends in"):
        list_images([tmp_path / "c" / "x.txt"], 1)
    with pytest.raises(DataError, match="there is no file or folder"):
        list_images([tmp_path / "d"], 1)
