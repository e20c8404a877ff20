"""The dataset folder and the split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scarceseg.data.dataset import Split, UnlabelledCase, load_dataset, make_split
from scarceseg.errors import ConfigError, DataError
from tests.data.volumes import write_dataset, write_facts


def _listing(folder: Path, cases: int = 6, labels: int = 4, suffix: str = "_0000") -> Path:
    """A dataset of empty files: listing it must not need their content."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir()
    write_facts(folder)
    for number in range(cases):
        (folder / "imagesTr" / f"c{number}{suffix}.nii.gz").touch()
        if number < labels:
            (folder / "labelsTr" / f"c{number}.nii.gz").touch()
    return folder


def test_load_reads_facts_and_cases(tmp_path: Path) -> None:
    dataset = load_dataset(_listing(tmp_path))
    assert dataset.name == "Made" and dataset.channels == ("MRI",) and dataset.classes == ("background", "organ")
    assert [case.name for case in dataset.cases] == [f"c{n}" for n in range(6)]
    assert dataset.cases[3].label == tmp_path / "labelsTr" / "c3.nii.gz"
    assert dataset.cases[4].label is None


def test_former_keys(tmp_path: Path) -> None:
    _listing(tmp_path)
    write_facts(
        tmp_path, channel_names=None, file_ending=None, modality={"0": "CT"}, labels={"0": "bg", "1": "a", "2": "b"}
    )
    dataset = load_dataset(tmp_path)
    assert (dataset.channels, dataset.classes, dataset.file_ending) == (("CT",), ("bg", "a", "b"), ".nii.gz")


def test_one_channel_may_have_plain_names(tmp_path: Path) -> None:
    assert [c.name for c in load_dataset(_listing(tmp_path, suffix="")).cases] == [f"c{n}" for n in range(6)]


def test_channels_are_grouped(tmp_path: Path) -> None:
    dataset = load_dataset(write_dataset(tmp_path / "d", channels=2, ending=".mha"))
    assert [path.name for path in dataset.cases[0].images] == ["a_0000.mha", "a_0001.mha"]


def test_no_labels_folder_means_all_unlabelled(tmp_path: Path) -> None:
    folder = _listing(tmp_path, labels=0)
    (folder / "labelsTr").rmdir()
    dataset = load_dataset(folder)
    assert all(case.label is None for case in dataset.cases)


def test_label_without_image_is_a_warning(tmp_path: Path) -> None:
    (_listing(tmp_path) / "labelsTr" / "stray.nii.gz").touch()
    dataset = load_dataset(tmp_path)
    assert "stray" in dataset.warnings[0]
    assert "stray" in make_split(dataset, 1, []).warnings[0]


def test_files_of_another_ending_are_told_of_images_and_labels(tmp_path: Path) -> None:
    _listing(tmp_path)
    for name in ("imagesTr/c8_0000.nrrd", "imagesTr/notes.txt", "labelsTr/c8.nrrd"):
        (tmp_path / name).touch()
    dataset = load_dataset(tmp_path)
    assert len(dataset.cases) == 6
    images, labels = dataset.warnings
    assert "imagesTr" in images and "are no images therefore: c8_0000.nrrd" in images
    assert "labelsTr" in labels and "are no labels therefore: c8.nrrd" in labels


def test_cases_numbered_like_channels_are_told_apart(tmp_path: Path) -> None:
    _listing(tmp_path, cases=0)
    for number in range(8):
        (tmp_path / "imagesTr" / f"patient_{number:04d}.nii.gz").touch()
    with pytest.raises(
        DataError, match=r"_0000 alone.*and 3 more; .*number your cases.*patient_0001 becomes patient_0001_0000"
    ):
        load_dataset(tmp_path)


def test_first_n_are_labelled_and_every_other_case_is_not(tmp_path: Path) -> None:
    split = make_split(load_dataset(_listing(tmp_path)), 2, ["c0"])
    assert split.to_json() == {"labelled": ["c1", "c2"], "unlabelled": ["c3", "c4", "c5"], "val": ["c0"]}


def test_all_or_named_labels(tmp_path: Path) -> None:
    dataset = load_dataset(_listing(tmp_path))
    assert make_split(dataset, None, []).to_json()["labelled"] == ["c0", "c1", "c2", "c3"]
    assert make_split(dataset, ["c3", "c1"], []).to_json()["labelled"] == ["c1", "c3"]


def test_unlabelled_cases_cannot_hold_a_label(tmp_path: Path) -> None:
    split = make_split(load_dataset(_listing(tmp_path)), 1, [])
    assert all(type(case) is UnlabelledCase and not hasattr(case, "label") for case in split.unlabelled)


def test_split_survives_saving(tmp_path: Path) -> None:
    dataset = load_dataset(_listing(tmp_path))
    split = make_split(dataset, 2, ["c3"])
    split.save(tmp_path / "split.json")
    assert json.loads((tmp_path / "split.json").read_text()) == split.to_json()
    assert Split.load(tmp_path / "split.json", dataset) == split
    (tmp_path / "split.json").write_text('{"labelled": ["zz"], "unlabelled": [], "val": []}')
    with pytest.raises(DataError, match="zz"):
        Split.load(tmp_path / "split.json", dataset)
    (tmp_path / "split.json").write_text("[]")
    with pytest.raises(DataError, match="expected case names"):
        Split.load(tmp_path / "split.json", dataset)


@pytest.mark.parametrize("number", [0, -1, 5])
def test_impossible_number_of_labels(tmp_path: Path, number: int) -> None:
    with pytest.raises(ConfigError, match=f"from 1 to 4 .* got {number}"):
        make_split(load_dataset(_listing(tmp_path)), number, [])


def test_wrong_names(tmp_path: Path) -> None:
    dataset = load_dataset(_listing(tmp_path))
    with pytest.raises(ConfigError, match=r"no case 'c9'.*did you mean"):
        make_split(dataset, ["c9"], [])
    with pytest.raises(ConfigError, match="val: there is no case"):
        make_split(dataset, 1, ["nope"])
    with pytest.raises(ConfigError, match="both labelled and for validation: c1"):
        make_split(dataset, ["c1"], ["c1"])
    with pytest.raises(ConfigError, match="named twice: c1"):
        make_split(dataset, ["c1", "c1"], [])
    with pytest.raises(DataError, match="'c4' has no file in labelsTr"):
        make_split(dataset, ["c4"], [])
    with pytest.raises(DataError, match="'c5' has no file in labelsTr"):
        make_split(dataset, 1, ["c5"])
