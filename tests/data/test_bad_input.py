"""Every kind of bad data gives one clear message (or, where it can be lived with, a warning)."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from scarceseg.data.dataset import load_dataset, make_split
from scarceseg.data.geometry import to_sitk
from scarceseg.data.images import read_image, read_label, read_volume, write_image
from scarceseg.data.prepare import prepare_cases, prepare_volume
from scarceseg.errors import DataError
from tests.data.volumes import OBLIQUE, Array, grid, planned, smooth, write_dataset, write_facts

GRID = grid((6, 5, 4))


def test_no_labelled_case(tmp_path: Path) -> None:
    dataset = load_dataset(write_dataset(tmp_path / "d", labelled=(), unlabelled=("a", "b")))
    with pytest.raises(DataError, match="no labelled case to train on"):
        make_split(dataset, None, [])
    with pytest.raises(DataError, match="no labelled case to train on"):
        make_split(dataset, 4, [])


def test_no_unlabelled_case_is_a_warning(tmp_path: Path) -> None:
    split = make_split(load_dataset(write_dataset(tmp_path / "d", unlabelled=())), None, [])
    assert any("no unlabelled case" in warning for warning in split.warnings)


def test_label_on_another_grid(tmp_path: Path) -> None:
    path = tmp_path / "l.nii.gz"
    write_image(np.zeros((6, 5, 3), np.uint8), grid((6, 5, 3)), path)
    with pytest.raises(DataError, match=r"size 6x5x3.*size 6x5x4"):
        read_label(path, range(2), GRID)
    for other in (
        grid(GRID.size, spacing_mm=(1, 1, 1.01)),
        grid(GRID.size, origin=(0, 0, 0.05)),
        grid(GRID.size, direction=OBLIQUE),
    ):
        write_image(np.zeros(GRID.size, np.uint8), other, path)
        with pytest.raises(DataError, match="does not lie on its image"):
            read_label(path, range(2), GRID)


def test_channels_on_different_grids(tmp_path: Path) -> None:
    write_image(smooth(GRID.size), GRID, tmp_path / "a.nii.gz")
    write_image(smooth((5, 5, 4)), grid((5, 5, 4)), tmp_path / "b.nii.gz")
    with pytest.raises(DataError, match=r"a\.nii\.gz has size 6x5x4.*b\.nii\.gz has size 5x5x4"):
        read_volume([tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"])


@pytest.mark.parametrize(("dtype", "value"), [(np.uint8, 7), (np.int16, -1), (np.float32, 300.0)])
def test_label_values_outside_the_classes(tmp_path: Path, dtype: type, value: float) -> None:
    label: Array = np.zeros(GRID.size, dtype)
    label[:2, 0, 0] = value
    write_image(label, GRID, tmp_path / "l.nii.gz")
    with pytest.raises(DataError, match=rf"\[0, 1\] of dataset.json, found also {value:g} \(2 voxels\)"):
        read_label(tmp_path / "l.nii.gz", range(2), GRID)


def test_floats_as_labels(tmp_path: Path) -> None:
    write_image(np.full(GRID.size, 0.5, np.float32), GRID, tmp_path / "l.nii.gz")
    with pytest.raises(DataError, match=r"floats as labels such as 0\.5 \(120 voxels\)"):
        read_label(tmp_path / "l.nii.gz", range(2), GRID)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".nii", ".nii.gz"])
def test_not_finite(tmp_path: Path, value: float, ending: str) -> None:
    array = smooth(GRID.size)
    array[0, 0, :3] = value
    path = tmp_path / f"x{ending}"
    sitk.WriteImage(to_sitk(array, GRID), str(path))
    with pytest.raises(DataError, match="3 NaN or infinite voxels of 120"):
        read_image(path)


@pytest.mark.parametrize("kind", ["<f4", ">f4", "<f8"])
def test_not_finite_in_a_large_nifti_of_any_byte_order(tmp_path: Path, kind: str) -> None:
    array = np.ones((80, 70, 90), kind)
    array[3, 4, 5] = array[79, 69, 89] = np.nan
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "x.nii.gz")
    with pytest.raises(DataError, match="2 NaN or infinite voxels of 504000"):
        read_image(tmp_path / "x.nii.gz")


def test_values_beyond_float32(tmp_path: Path) -> None:
    write_image(np.full(GRID.size, 1e300), GRID, tmp_path / "x.nrrd")
    with pytest.raises(DataError, match="120 NaN or infinite"):
        read_volume([tmp_path / "x.nrrd"])


def test_empty_label_is_kept_with_a_warning(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d")
    write_image(np.zeros(grid().size, np.uint8), grid(), folder / "labelsTr" / "a.nii.gz")
    split, plan = planned(folder)
    assert any("empty label" in warning and "a" in warning for warning in plan.warnings)
    label = prepare_cases(split.labelled, [], plan, tmp_path / "cache")["a"].label
    assert label is not None and not label.any()


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.95])
@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_truncated(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"x{suffix}"
    geometry = grid((20, 20, 20))
    write_image(smooth(geometry.size), geometry, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(DataError, match=f"cannot read {path}"):
        read_image(path)


def test_compressed_file_that_ends_early_inside(tmp_path: Path) -> None:
    """A whole gzip stream around a cut image."""
    write_image(smooth(GRID.size), GRID, tmp_path / "x.nii")
    (tmp_path / "x.nii.gz").write_bytes(gzip.compress((tmp_path / "x.nii").read_bytes()[:-7]))
    with pytest.raises(DataError, match="truncated, expected 832 bytes and got 825"):
        read_image(tmp_path / "x.nii.gz")


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd"])
def test_not_an_image(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"x{suffix}").write_text("this is no image " * 100)
    with pytest.raises(DataError, match="cannot read"):
        read_image(tmp_path / f"x{suffix}")


def test_a_nifti_of_a_type_that_does_not_exist(tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    write_image(np.zeros((6, 5, 4), np.float32), GRID, path)
    raw = bytearray(path.read_bytes())
    raw[70:72] = struct.pack("<h", 9999)
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.nii"):
        read_volume((path,))


def test_a_spacing_that_makes_a_volume_huge(tmp_path: Path) -> None:
    _, plan = planned(write_dataset(tmp_path / "d"))
    with pytest.raises(DataError, match="check the spacing in its header"):
        prepare_volume(
            np.zeros((1, 20, 20, 16), np.float32), grid((20, 20, 16), spacing_mm=(100.0, 100.0, 100.0)), plan
        )


def test_missing_file_and_other_endings(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no image"):
        read_image(tmp_path / "x.nii.gz")
    (tmp_path / "x.png").touch()
    with pytest.raises(DataError, match="expected a file that ends in"):
        read_image(tmp_path / "x.png")
    with pytest.raises(DataError, match="found no DICOM image"):
        read_image(tmp_path)


def _set_pixdim(value: float) -> Callable[[bytes], bytes]:
    return lambda data: data[:80] + struct.pack("<f", value) + data[84:]


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e-4, 1e4])
@pytest.mark.parametrize("packed", [False, True])
def test_absurd_spacing_in_nifti(tmp_path: Path, value: float, packed: bool) -> None:
    write_image(smooth(GRID.size), GRID, tmp_path / "x.nii")
    data = _set_pixdim(value)((tmp_path / "x.nii").read_bytes())
    path = tmp_path / ("y.nii.gz" if packed else "y.nii")
    path.write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(DataError, match=r"expected a voxel spacing of 0.01 to 100 mm"):
        read_image(path)


def test_zero_spacing_in_metaimage(tmp_path: Path) -> None:
    write_image(smooth(GRID.size), GRID, tmp_path / "x.mha")
    data = (tmp_path / "x.mha").read_bytes().replace(b"ElementSpacing = 1 1 1", b"ElementSpacing = 0 1 1")
    (tmp_path / "x.mha").write_bytes(data)
    with pytest.raises(DataError, match="spacing"):
        read_image(tmp_path / "x.mha")


def test_skewed_grid(tmp_path: Path) -> None:
    affine = np.eye(4)
    affine[0, 1] = 0.5
    nibabel.Nifti1Image(smooth(GRID.size), affine).to_filename(tmp_path / "x.nii.gz")
    with pytest.raises(DataError, match="axes at right angles"):
        read_image(tmp_path / "x.nii.gz")
    image = sitk.GetImageFromArray(smooth(GRID.size))
    sitk.WriteImage(image, str(tmp_path / "x.nrrd"))
    text = (tmp_path / "x.nrrd").read_bytes()
    (tmp_path / "x.nrrd").write_bytes(text.replace(b"(1,0,0) (0,1,0)", b"(1,0.5,0) (0,1,0)"))
    with pytest.raises(DataError, match="axes at right angles"):
        read_image(tmp_path / "x.nrrd")


def test_other_dimensions_and_vectors(tmp_path: Path) -> None:
    write_image(np.zeros((3, *GRID.size)), GRID, tmp_path / "x.nii.gz")
    with pytest.raises(DataError, match="got 4D of size 6x5x4x3; split it"):
        read_image(tmp_path / "x.nii.gz")
    nibabel.Nifti1Image(np.zeros((4, 5)), np.eye(4)).to_filename(tmp_path / "flat.nii")
    with pytest.raises(DataError, match="got 2D of size 4x5"):
        read_image(tmp_path / "flat.nii")
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5, 6, 3)), isVector=True), str(tmp_path / "rgb.mha"))
    with pytest.raises(DataError, match="one real number per voxel"):
        read_image(tmp_path / "rgb.mha")


def test_two_voxels_thin_is_fine(tmp_path: Path) -> None:
    write_image(smooth((9, 8, 2)), grid((9, 8, 2)), tmp_path / "x.nii.gz")
    assert read_image(tmp_path / "x.nii.gz")[0].shape == (9, 8, 2)


def test_missing_channel(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", channels=2)
    (folder / "imagesTr" / "b_0001.nii.gz").unlink()
    with pytest.raises(DataError, match=r"case 'b' needs the channels _0000 to _0001.*found _0000;"):
        load_dataset(folder)
    (folder / "imagesTr" / "b.nii.gz").touch()
    with pytest.raises(DataError, match="expected a name like case_0000"):
        load_dataset(folder)


def test_a_channel_too_many(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", channels=2)
    write_facts(folder)
    with pytest.raises(DataError, match=r"found _0000, _0001"):
        load_dataset(folder)


def test_duplicate_case_names(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d")
    (folder / "imagesTr" / "a.nii.gz").touch()
    with pytest.raises(DataError, match="case 'a' is there twice"):
        load_dataset(folder)
    (folder / "imagesTr" / "a.nii.gz").unlink()
    (folder / "imagesTr" / "A_0000.nii.gz").touch()
    if len(list((folder / "imagesTr").iterdir())) == 5:
        pytest.skip("this file system does not tell capitals apart")
    with pytest.raises(DataError, match="more than capitals: A, a"):
        load_dataset(folder)


def test_volume_smaller_than_the_patch_works(tmp_path: Path) -> None:
    split, plan = planned(write_dataset(tmp_path / "d"), patch=(16, 16, 16))
    assert any("smaller than the patch" in warning for warning in plan.warnings)
    cases = prepare_cases(split.labelled, split.unlabelled, plan, tmp_path / "cache")
    assert cases["a"].image.shape == (1, 12, 11, 9)


def test_missing_or_invalid_dataset_json(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no dataset folder"):
        load_dataset(tmp_path / "none")
    with pytest.raises(DataError, match=r"no dataset\.json"):
        load_dataset(tmp_path)
    for text in ("{", "[1]", '"text"', "\xff"):
        (tmp_path / "dataset.json").write_text(text, encoding="latin-1")
        with pytest.raises(DataError, match=r"dataset\.json"):
            load_dataset(tmp_path)
    write_facts(tmp_path)
    with pytest.raises(DataError, match="expected a folder imagesTr"):
        load_dataset(tmp_path)
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "imagesTr" / "a_0000.nrrd").touch()
    with pytest.raises(DataError, match=r"expected images that end in .nii.gz, found none; there are .nrrd files"):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channel_names": None}, "expected channel_names"),
        ({"labels": {"background": 0, "organ": 1.7}}, "whole number"),
        ({"labels": {"background": 0, "organ": float("inf")}}, "whole number"),
        ({"channel_names": ["MRI"]}, "expected channel_names"),
        ({"channel_names": {"1": "MRI"}}, "numbered from 0"),
        ({"labels": None}, "expected labels"),
        ({"labels": {"organ": 1}}, "numbered 0"),
        ({"labels": {"background": 0, "a": 2}}, "without gaps"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "without gaps or repeats"),
        ({"labels": {"background": 0, "a": 1, "b": 3, "c": 7}}, "renumber the classes, .*own-data.md shows how"),
        ({"labels": {"background": 0, "a": "x"}}, "whole number"),
        ({"labels": {"background": 0}}, "2 to 255 classes"),
        ({"labels": {"background": 0, "whole": [1, 2], "core": 2}}, "region-based"),
        ({"labels": {"background": 0, "a": 1, "ignore": 2}}, "'ignore'"),
        ({"file_ending": ".png"}, "file_ending"),
        ({"file_ending": 3}, "file_ending"),
    ],
)
def test_wrong_facts(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "imagesTr" / "a_0000.nii.gz").touch()
    write_facts(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        load_dataset(tmp_path)
