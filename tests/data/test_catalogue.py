"""Every known dataset: its facts are complete, and tiny files in its published layout become a dataset that loads."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import SimpleITK as sitk
from rich.console import Console

from scarceseg.data.catalogue import (
    DATASETS,
    Archive,
    convert_dataset,
    get_dataset,
    list_datasets,
    print_datasets,
)
from scarceseg.data.catalogue.mact import fold_split
from scarceseg.data.dataset import load_dataset, make_split
from scarceseg.data.images import read_image
from scarceseg.errors import ConfigError, DataError, RunError
from tests.data.test_download import Server, server  # noqa: F401 - a fixture

SHAPE = (7, 5, 6)


def arrays(seed: int, classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.normal(size=SHAPE).astype(np.float32), generator.integers(0, classes, SHAPE).astype(np.uint8)


def put_h5(path: Path, seed: int, classes: int = 2, **changed: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image, label = arrays(seed, classes)
    with h5py.File(path, "w") as file:
        for key, value in ({"image": image, "label": label} | changed).items():
            if value is not None:
                file.create_dataset(key, data=value, compression="gzip")


def put_list(path: Path, names: list[str], end: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(names) + end)


def make_la(src: Path) -> None:
    put_list(src / "data" / "train.list", ["ZED", "ABE", "KAY"])
    put_list(src / "data" / "test.list", ["BOB"], end="")
    for seed, name in enumerate(("ZED", "ABE", "KAY", "BOB")):
        put_h5(src / "data" / "2018LA_Seg_Training Set" / name / "mri_norm2.h5", seed)


def make_brats(src: Path) -> None:
    for seed, (role, names) in enumerate({"train": ["B9", "B1"], "val": ["B0"], "test": ["B5"]}.items()):
        put_list(src / f"{role}.txt", [f"{name}, {name}.h5" for name in names])
        for i, name in enumerate(names):
            put_h5(src / "data" / f"{name}.h5", 10 * seed + i)


def make_btcv(src: Path) -> None:
    put_list(src / "btcv.txt", [f"case{n:04d}.npy.h5" for n in range(40, 10, -1)])
    for n in range(11, 41):
        put_h5(src / "btcv_h5" / f"{n:04d}.h5", n, 14)


def make_mact(src: Path) -> None:
    for n in range(1, 91):
        put_h5(src / "MACT_h5" / f"{n:04d}.h5", n, 9)


def make_dhc(src: Path) -> None:
    lists = {"labeled_20p": ["0002", "0023"], "unlabeled_20p": ["0001"], "eval": ["0004"], "test": ["0007"]}
    for file, names in lists.items():
        put_list(src / "synapse_data" / "splits" / f"{file}.txt", names)
        for name in names:
            image, label = arrays(int(name), 14)
            folder = src / "synapse_data" / "npy"
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / f"{name}_image.npy", image.T)
            np.save(folder / f"{name}_label.npy", label.T.astype(np.float32))


def put_nifti(path: Path, array: np.ndarray) -> None:
    """``[X, Y, Z]``, or ``[X, Y, Z, C]`` as the Decathlon stores channels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [sitk.GetImageFromArray(part.T) for part in (np.moveaxis(array, -1, 0) if array.ndim == 4 else [array])]
    for part in parts:
        part.SetSpacing((1.25, 1.25, 1.37))
        part.SetOrigin((3, -4, 5))
        part.SetDirection((0, 1, 0, 1, 0, 0, 0, 0, 1))
    sitk.WriteImage(sitk.JoinSeries(parts) if array.ndim == 4 else parts[0], str(path))


def make_decathlon(src: Path, name: str) -> None:
    dataset = DATASETS.get(name)
    root = src / "Task00_Test"
    count, names = len(dataset.channels), ["x_003", "x_001"]
    for seed, case in enumerate([*names, "x_002"]):
        image, label = arrays(seed, len(dataset.classes))
        stacked = image if count == 1 else np.stack([image + c for c in range(count)], axis=-1)
        put_nifti(root / ("imagesTr" if case in names else "imagesTs") / f"{case}.nii.gz", stacked)
        if case in names:
            put_nifti(root / "labelsTr" / f"{case}.nii.gz", label)
            (root / "imagesTr" / f"._{case}.nii.gz").write_bytes(b"hidden")
            (root / "labelsTr" / f"._{case}.nii.gz").write_bytes(b"hidden")
    facts = {
        "name": "test",
        "modality": {str(i): channel for i, channel in enumerate(dataset.channels)},
        "labels": {str(i): label for i, label in enumerate(dataset.classes)},
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names],
        "test": ["./imagesTs/x_002.nii.gz"],
    }
    (root / "dataset.json").write_text(json.dumps(facts))
    (src / "._Task00_Test").write_bytes(b"hidden")


MAKERS: dict[str, Callable[[Path], None]] = {
    "la": make_la,
    "brats19": make_brats,
    "btcv": make_btcv,
    "mact": make_mact,
    "btcv-dhc": make_dhc,
}
DECATHLON = [name for name in DATASETS.names() if name.startswith("msd-")]


def source(name: str, folder: Path) -> Path:
    folder.mkdir()
    MAKERS[name](folder) if name in MAKERS else make_decathlon(folder, name)
    return folder


def voxels(path: Path) -> np.ndarray:
    return read_image(path)[0]


@pytest.mark.parametrize("dataset", list_datasets(), ids=lambda dataset: dataset.name)
def test_facts_are_complete(dataset: Any) -> None:
    assert DATASETS.get(dataset.name) is dataset
    for key in ("title", "description", "licence", "source", "size", "citation", "layout"):
        assert getattr(dataset, key).strip()
    assert dataset.source.startswith("http") and dataset.channels
    assert dataset.classes[0] == "background" and 2 <= len(set(dataset.classes)) == len(dataset.classes)
    if dataset.archive:
        assert all(url.startswith("https://") for url in dataset.archive.urls)
        assert len(dataset.archive.md5 or "") == 32 or len(dataset.archive.sha256 or "") == 64


@pytest.mark.parametrize("name", DATASETS.names())
def test_every_layout_becomes_a_dataset(name: str, tmp_path: Path) -> None:
    src, dst = source(name, tmp_path / "src"), tmp_path / "made" / "dst"
    assert convert_dataset(name, src, dst) == dst
    loaded = load_dataset(dst)
    assert loaded.channels == DATASETS.get(name).channels and loaded.classes == DATASETS.get(name).classes
    assert loaded.warnings == () and all(case.label is not None for case in loaded.cases)
    assert json.loads((dst / "dataset.json").read_text())["numTraining"] == len(loaded.cases)
    assert [path.name for path in dst.parent.iterdir()] == ["dst"], "nothing is left over"
    written = sorted(path.name for path in (dst / "imagesTr").iterdir())
    assert written == sorted(path.name for case in loaded.cases for path in case.images)
    if name in MAKERS:
        names = json.loads((dst / "names.json").read_text())
        tests = [case for case in names if "_test_" in case]
        assert set(names) == {case.name for case in loaded.cases} | set(tests)
        assert sorted(path.name for path in (dst / "labelsTs").iterdir()) == [f"{case}.nii.gz" for case in tests]
        assert sorted(path.name for path in (dst / "imagesTs").iterdir()) == [f"{case}_0000.nii.gz" for case in tests]


def test_la_keeps_order_values_and_axes(tmp_path: Path) -> None:
    convert_dataset("la", source("la", tmp_path / "src"), tmp_path / "la")
    names = json.loads((tmp_path / "la" / "names.json").read_text())
    assert names == {"la_000": "ZED", "la_001": "ABE", "la_002": "KAY", "la_test_000": "BOB"}
    for seed, case in enumerate(names):
        part = "Ts" if "test" in case else "Tr"
        image, label = arrays(seed)
        got, geometry = read_image(tmp_path / "la" / f"images{part}" / f"{case}_0000.nii.gz")
        assert got.dtype == np.float32 and np.array_equal(got, image)
        assert geometry.spacing_mm == (0.625, 0.625, 0.625)
        assert np.array_equal(voxels(tmp_path / "la" / f"labels{part}" / f"{case}.nii.gz"), label)
    split = make_split(load_dataset(tmp_path / "la"), 2, [])
    assert [names[case.name] for case in split.labelled] == ["ZED", "ABE"]
    convert_dataset("la", tmp_path / "src" / "data" / "2018LA_Seg_Training Set", tmp_path / "again", spacing_mm=1.25)
    assert read_image(tmp_path / "again" / "imagesTr" / "la_000_0000.nii.gz")[1].spacing_mm == (1.25, 1.25, 1.25)


def test_validation_cases_come_after_the_training_cases(tmp_path: Path) -> None:
    convert_dataset("brats19", source("brats19", tmp_path / "src"), tmp_path / "b")
    assert [case.name for case in load_dataset(tmp_path / "b").cases] == ["brats_000", "brats_001", "brats_val_000"]
    names = json.loads((tmp_path / "b" / "names.json").read_text())
    assert names == {"brats_000": "B9", "brats_001": "B1", "brats_val_000": "B0", "brats_test_000": "B5"}


def test_btcv_order_is_that_of_the_published_script(tmp_path: Path) -> None:
    convert_dataset("btcv", source("btcv", tmp_path / "src"), tmp_path / "b")
    names = json.loads((tmp_path / "b" / "names.json").read_text())
    # Where np.random.seed(1337); np.random.shuffle(list) takes 18 items from, run once with NumPy 2.4.
    order = [14, 5, 13, 3, 1, 0, 11, 15, 6, 17, 4, 12, 2, 10, 16, 9, 7, 8]
    training = [f"{40 - n:04d}" for n in order]
    assert [names[f"btcv_{i:03d}"] for i in range(18)] == training
    assert [names[f"btcv_test_{i:03d}"] for i in range(12)] == [f"{n:04d}" for n in range(22, 10, -1)]
    first, geometry = read_image(tmp_path / "b" / "imagesTr" / "btcv_000_0000.nii.gz")
    assert np.array_equal(first, arrays(int(training[0]), 14)[0]) and geometry.spacing_mm == (1.5, 1.5, 2.0)


def test_dhc_labelled_cases_come_first_and_axes_are_turned(tmp_path: Path) -> None:
    convert_dataset("btcv-dhc", source("btcv-dhc", tmp_path / "src"), tmp_path / "d")
    names = json.loads((tmp_path / "d" / "names.json").read_text())
    assert list(names.values()) == ["0002", "0023", "0001", "0004", "0007"]
    image, label = arrays(2, 14)
    assert np.array_equal(voxels(tmp_path / "d" / "imagesTr" / "btcv_000_0000.nii.gz"), image)
    assert np.array_equal(voxels(tmp_path / "d" / "labelsTr" / "btcv_000.nii.gz"), label)
    with pytest.raises(DataError, match="labeled_20p.txt"):
        convert_dataset("btcv-dhc", tmp_path / "src", tmp_path / "e", labeled_percent=10)


def test_mact_folds() -> None:
    tested: list[int] = []
    for fold in range(1, 5):
        training, test = fold_split(fold)
        assert (len(training), len(test)) == (66, 22) and not set(training) & set(test)
        assert set(training) | set(test) <= set(range(1, 91)) and test == sorted(test)
        assert (training == sorted(training)) == (fold > 1)
        tested += test
    assert len(set(tested)) == 88
    # Made once with scikit-learn's KFold and the shuffle of the published script.
    training, test = fold_split(1)
    assert training[:13] == [2, 20, 9, 43, 24, 23, 60, 45, 53, 44, 85, 86, 47] and test[:6] == [1, 3, 6, 11, 12, 16]


def test_decathlon_channels_and_geometry(tmp_path: Path) -> None:
    convert_dataset("msd-prostate", source("msd-prostate", tmp_path / "src"), tmp_path / "p")
    for seed, case in enumerate(("x_003", "x_001", "x_002")):
        image, label = arrays(seed, 3)
        folder = tmp_path / "p" / ("imagesTs" if case == "x_002" else "imagesTr")
        for channel in range(2):
            got, geometry = read_image(folder / f"{case}_{channel:04d}.nii.gz")
            np.testing.assert_allclose(got, image + channel, rtol=1e-6)
            np.testing.assert_allclose(geometry.spacing_mm, (1.25, 1.25, 1.37), rtol=1e-6)
            np.testing.assert_allclose(geometry.origin, (3, -4, 5), rtol=1e-6)
            np.testing.assert_allclose(geometry.direction, (0, 1, 0, 1, 0, 0, 0, 0, 1), atol=1e-6)
        if case != "x_002":
            assert np.array_equal(voxels(tmp_path / "p" / "labelsTr" / f"{case}.nii.gz"), label)
    convert_dataset("msd-heart", source("msd-heart", tmp_path / "one"), tmp_path / "h")
    before = (tmp_path / "one" / "Task00_Test" / "imagesTr" / "x_001.nii.gz").read_bytes()
    assert (tmp_path / "h" / "imagesTr" / "x_001_0000.nii.gz").read_bytes() == before


def test_decathlon_bad_sources(tmp_path: Path) -> None:
    src = source("msd-heart", tmp_path / "src")
    with pytest.raises(DataError, match="another task: expected 2 channel"):
        convert_dataset("msd-prostate", src, tmp_path / "d")
    root = src / "Task00_Test"
    (root / "imagesTr" / "x_001.nii.gz").write_bytes(b"damaged")
    with pytest.raises(DataError, match="x_001.nii.gz: it is damaged"):
        convert_dataset("msd-heart", src, tmp_path / "d")
    (root / "imagesTr" / "x_001.nii.gz").unlink()
    with pytest.raises(DataError, match="there is no .*x_001.nii.gz"):
        convert_dataset("msd-heart", src, tmp_path / "d")
    (root / "dataset.json").write_text('{"training": 3}')
    with pytest.raises(DataError, match="dataset.json of a Decathlon task"):
        convert_dataset("msd-heart", src, tmp_path / "d")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("name", DATASETS.names())
def test_source_without_the_files(name: str, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "holiday.jpg").write_text("")
    with pytest.raises(DataError) as caught:
        convert_dataset(name, tmp_path / "src", tmp_path / "dst")
    assert DATASETS.get(name).layout in str(caught.value) and "holiday.jpg" in str(caught.value)
    with pytest.raises(DataError, match="no such folder"):
        convert_dataset(name, tmp_path / "nowhere", tmp_path / "dst")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"label": None}, "expected the keys image and label, got image"),
        ({"label": np.zeros((7, 5, 5), np.uint8)}, r"one 3D shape, got \(7, 5, 6\) and \(7, 5, 5\)"),
        ({"label": np.full(SHAPE, 2, np.uint8)}, r"labels 0 to 1 \(background, left_atrium\), found also \[2\]"),
        ({"label": np.full(SHAPE, 0.5)}, r"found also \[0.5\]"),
        ({"image": np.full(SHAPE, np.nan, np.float32)}, "finite numbers"),
        ({"image": np.zeros((2, *SHAPE), np.float32)}, "one 3D shape"),
    ],
)
def test_damaged_cases(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    src = source("la", tmp_path / "src")
    bad = src / "data" / "2018LA_Seg_Training Set" / "KAY" / "mri_norm2.h5"
    put_h5(bad, 2, **changed)
    with pytest.raises(DataError, match=message) as caught:
        convert_dataset("la", src, tmp_path / "dst")
    assert str(bad) in str(caught.value) and not (tmp_path / "dst").exists()


def test_incomplete_and_unreadable_files(tmp_path: Path) -> None:
    src = source("la", tmp_path / "src")
    bad = src / "data" / "2018LA_Seg_Training Set" / "KAY" / "mri_norm2.h5"
    bad.write_bytes(bad.read_bytes()[:100])
    with pytest.raises(DataError, match="damaged or no HDF5 file"):
        convert_dataset("la", src, tmp_path / "dst")
    bad.unlink()
    with pytest.raises(DataError, match="there is no .*KAY"):
        convert_dataset("la", src, tmp_path / "dst")
    put_list(src / "data" / "train.list", ["ZED", "ZED"])
    with pytest.raises(DataError, match="different case name a line"):
        convert_dataset("la", src, tmp_path / "dst")
    dhc = source("btcv-dhc", tmp_path / "dhc")
    (dhc / "synapse_data" / "npy" / "0002_image.npy").write_bytes(b"\x93NUMPY damaged")
    with pytest.raises(DataError, match="damaged or no NumPy file"):
        convert_dataset("btcv-dhc", dhc, tmp_path / "dst")


def test_names_options_and_destination(tmp_path: Path) -> None:
    src = source("la", tmp_path / "src")
    with pytest.raises(ConfigError, match="unknown dataset 'brats': did you mean 'brats19'"):
        convert_dataset("brats", src, tmp_path / "dst")
    with pytest.raises(ConfigError, match="dataset la: unknown setting 'spacing': did you mean 'spacing_mm'"):
        convert_dataset("la", src, tmp_path / "dst", spacing=1)
    with pytest.raises(ConfigError, match="spacing_mm.*0.01 to 100"):
        convert_dataset("la", src, tmp_path / "dst", spacing_mm=0)
    with pytest.raises(ConfigError, match="fold"):
        convert_dataset("mact", src, tmp_path / "dst", fold=5)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="exists and is not empty"):
        convert_dataset("la", src, tmp_path / "full")
    (tmp_path / "empty").mkdir()
    assert len(load_dataset(convert_dataset("la", src, tmp_path / "empty")).cases) == 3


def packed(folder: Path) -> bytes:
    text = io.BytesIO()
    with tarfile.open(fileobj=text, mode="w") as file:
        for path in sorted(folder.iterdir()):
            file.add(path, path.name)
    return text.getvalue()


def test_get_downloads_converts_and_cleans_up(
    server: Server,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import hashlib

    content = packed(source("msd-heart", tmp_path / "src"))
    server.files = {"/Task00_Test.tar": content}
    server.cut = [len(content) // 2]
    archive = Archive((server.url("/Task00_Test.tar"),), md5=hashlib.md5(content).hexdigest())
    monkeypatch.setitem(DATASETS._parts, "msd-heart", replace(DATASETS.get("msd-heart"), archive=archive))
    seen: list[int] = []
    made = get_dataset("msd-heart", tmp_path / "out", lambda done, total: seen.append(done))
    assert made == tmp_path / "out" / "msd-heart" and [path.name for path in made.parent.iterdir()] == ["msd-heart"]
    assert [case.name for case in load_dataset(made).cases] == ["x_001", "x_003"] and seen[-1] == len(content)
    assert server.requests[1] == ("/Task00_Test.tar", f"bytes={len(content) // 2}-")
    with pytest.raises(RunError, match="exists and is not empty"):
        get_dataset("msd-heart", tmp_path / "out")
    assert len(server.requests) == 2
    assert get_dataset("msd-heart", tmp_path / "with_bar").is_dir()


def test_get_refuses_a_file_with_another_hash(
    server: Server,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.files = {"/t.tar": b"something else"}
    archive = Archive((server.url("/t.tar"),), md5="0" * 32)
    monkeypatch.setitem(DATASETS._parts, "msd-heart", replace(DATASETS.get("msd-heart"), archive=archive))
    with pytest.raises(DataError, match="not the expected one"):
        get_dataset("msd-heart", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_get_of_a_dataset_behind_an_account(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="datasets convert la SRC DST"):
        get_dataset("la", tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'msd-heart'"):
        get_dataset("msd_heart", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_list_on_screen() -> None:
    console = Console(file=io.StringIO(), width=300)
    print_datasets(console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for dataset in list_datasets():
        assert dataset.name in text and dataset.title in text
    assert " get " in text and " convert " in text
