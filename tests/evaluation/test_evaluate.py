"""Folders of label files: pairing, names, JSON form, failures, bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scarceseg.data.images import write_image
from scarceseg.errors import ConfigError, DataError, RunError
from scarceseg.evaluation.evaluate import evaluate
from scarceseg.evaluation.metrics import METRICS, binary_metrics
from scarceseg.evaluation.result import IncompleteEvaluation
from scarceseg.types import Geometry
from tests.reference import metrics as oracle

SPACING = (1.5, 0.75, 2.5)


def geometry(shape: tuple[int, int, int], spacing: tuple[float, float, float] = SPACING, x: float = 4.0) -> Geometry:
    return Geometry(shape, spacing, (x, -2.0, 7.5), (0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0))


def labels(seed: int, shape: tuple[int, int, int] = (9, 7, 5), classes: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, classes, shape).astype(np.uint8)


def put(folder: Path, name: str, array: np.ndarray, **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_image(array, geometry(array.shape, **options), folder / name)
    return folder / name


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for seed, case in enumerate(("a", "b", "c")):
        put(tmp_path / "predictions", f"{case}.nii.gz", labels(seed))
        put(tmp_path / "data" / "labelsTs", f"{case}.nrrd", labels(seed + 10))
    return tmp_path / "predictions", tmp_path / "data" / "labelsTs"


def test_equals_oracle_in_both_units(folders: tuple[Path, Path]) -> None:
    for units, spacing in (("mm", SPACING), ("voxel", (1.0, 1.0, 1.0))):
        result = evaluate(*folders, units=units)  # type: ignore[arg-type]
        assert result.units == units and list(result.cases) == ["a", "b", "c"]
        for seed, case in enumerate(result.cases):
            assert list(result.cases[case]) == ["1", "2"]
            for value, got in result.cases[case].items():
                expected = oracle.metrics(labels(seed) == int(value), labels(seed + 10) == int(value), spacing)
                assert got == pytest.approx(expected, rel=1e-9)
        for value, mean in result.mean.items():
            for metric in METRICS:
                assert mean[metric] == pytest.approx(np.mean([c[value][metric] for c in result.cases.values()]))
        assert result.failed == () and result.warnings == ()


def test_json_and_csv_have_the_promised_form(folders: tuple[Path, Path], tmp_path: Path) -> None:
    put(folders[0], "b.nii.gz", np.minimum(labels(1), 1))  # no class 2
    result = evaluate(*folders, json=tmp_path / "out" / "r.json", csv=tmp_path / "r.csv", workers=2)
    text = (tmp_path / "out" / "r.json").read_text()
    values = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert values == result.to_json()
    assert list(values) == ["units", "cases", "mean", "failed", "absent", "missing"]
    assert values["cases"]["b"]["2"] == {"dice": 0.0, "jaccard": 0.0, "asd": None, "assd": None, "hd95": None}
    assert values["failed"] == [{"case": "b", "class": "2", "reason": "empty prediction"}]
    others = [values["cases"][case]["2"]["hd95"] for case in ("a", "c")]
    assert values["mean"]["2"]["hd95"] == pytest.approx(np.mean(others))
    assert values["mean"]["2"]["dice"] == pytest.approx(np.mean([values["cases"][c]["2"]["dice"] for c in "abc"]))
    rows = (tmp_path / "r.csv").read_text().splitlines()
    assert rows[0] == "case,class,dice,jaccard,asd,assd,hd95" and len(rows) == 7
    assert rows[4] == "b,2,0.0,0.0,,,"
    assert float(rows[1].split(",")[2]) == values["cases"]["a"]["1"]["dice"]


@pytest.mark.parametrize("named", [True, False])
def test_classes_in_neither_mask_are_counted(tmp_path: Path, named: bool) -> None:
    empty, one = np.zeros((4, 4, 4), np.uint8), np.ones((4, 4, 4), np.uint8)
    for case, predicted, expected in (("a", empty, empty), ("b", one, empty), ("c", one, one), ("d", empty, empty)):
        put(tmp_path / "p", f"{case}.mha", predicted)
        put(tmp_path / "data" / "labelsTr", f"{case}.mha", expected)
    if named:
        (tmp_path / "data" / "dataset.json").write_text('{"labels": {"background": 0, "1": 1, "tumour": 2}}')
    result = evaluate(tmp_path / "p", tmp_path / "data" / "labelsTr")
    assert result.absent == ({"1": 2, "tumour": 4} if named else {"1": 2}) == result.to_json()["absent"]
    assert result.cases["a"]["1"]["dice"] == 1 and result.mean["1"]["dice"] == 0.75


def test_references_may_be_named_one_by_one(folders: tuple[Path, Path]) -> None:
    named = {case: folders[1] / f"{case}.nrrd" for case in "abc"}
    put(folders[1], "a.nii.gz", labels(3))  # a second file of one name, in the folder alone
    result = evaluate(folders[0], named)
    assert list(result.cases) == ["a", "b", "c"] and not result.warnings
    with pytest.raises(DataError, match="twice"):
        evaluate(*folders)
    with pytest.raises(DataError, match="1 of 3 predictions have no reference of the same name: c;"):
        evaluate(folders[0], {case: named[case] for case in "ab"})
    with pytest.raises(DataError, match="there are no references"):
        evaluate(folders[0], {})


def test_folders_may_be_texts(folders: tuple[Path, Path], tmp_path: Path) -> None:
    assert evaluate(*map(str, folders), json=str(tmp_path / "r.json"), csv=str(tmp_path / "r.csv")) == evaluate(
        *folders
    )
    assert (tmp_path / "r.json").is_file() and (tmp_path / "r.csv").is_file()


def test_workers_change_nothing(folders: tuple[Path, Path]) -> None:
    assert evaluate(*folders, workers=1) == evaluate(*folders, workers=3) == evaluate(*folders)


def test_empty_as_zero_is_still_listed(folders: tuple[Path, Path]) -> None:
    put(folders[0], "a.nii.gz", np.zeros((9, 7, 5), np.uint8))
    undefined, zero = evaluate(*folders), evaluate(*folders, empty="zero")
    assert math.isnan(undefined.cases["a"]["1"]["asd"]) and zero.cases["a"]["1"]["asd"] == 0
    assert zero.failed == undefined.failed and len(zero.failed) == 2
    assert zero.mean["1"]["asd"] == pytest.approx(undefined.mean["1"]["asd"] * 2 / 3)


def test_no_finite_case_gives_null_mean(tmp_path: Path) -> None:
    put(tmp_path / "p", "a.mha", np.zeros((4, 4, 4), np.uint8))
    put(tmp_path / "r", "a.mha", np.ones((4, 4, 4), np.uint8))
    values = evaluate(tmp_path / "p", tmp_path / "r").to_json()
    assert values["mean"]["1"] == {"dice": 0.0, "jaccard": 0.0, "asd": None, "assd": None, "hd95": None}


@pytest.mark.parametrize(
    "written",
    [
        {"background": 0, "left kidney": 1, "spleen": 2, "tumour": 3},
        {"0": "bg", "1": "left kidney", "2": "spleen", "3": "tumour"},
    ],
)
def test_names_of_dataset_json(folders: tuple[Path, Path], written: dict[str, Any]) -> None:
    (folders[1].parent / "dataset.json").write_text(json.dumps({"labels": written}))
    result = evaluate(*folders)
    assert list(result.mean) == ["left kidney", "spleen", "tumour"]
    assert result.cases["a"]["tumour"] == {"dice": 1, "jaccard": 1, "asd": 0, "assd": 0, "hd95": 0}
    chosen = evaluate(*folders, classes={"S": 2})
    assert chosen.cases["b"] == {"S": result.cases["b"]["spleen"]}


def test_class_of_some_cases_counts_as_empty_in_the_others(folders: tuple[Path, Path]) -> None:
    put(folders[0], "c.nii.gz", labels(2, classes=4))
    result = evaluate(*folders)
    assert [list(classes) for classes in result.cases.values()] == [["1", "2", "3"]] * 3
    assert result.cases["a"]["3"]["dice"] == 1 and result.cases["c"]["3"]["dice"] == 0
    assert [(f.case, f.class_name, f.reason) for f in result.failed] == [("c", "3", "empty reference")]


def test_value_outside_dataset_json(folders: tuple[Path, Path]) -> None:
    (folders[1].parent / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "heart": 1}}))
    with pytest.raises(IncompleteEvaluation, match=r"heart.*found also 2"):
        evaluate(*folders)
    (folders[1].parent / "dataset.json").write_text("{")
    with pytest.raises(DataError, match="dataset.json: expected labels"):
        evaluate(*folders)


def test_two_files_need_no_common_name(tmp_path: Path) -> None:
    p, r = put(tmp_path, "mine.nii.gz", labels(0)), put(tmp_path, "truth.mha", labels(1))
    result = evaluate(p, r)
    assert list(result.cases) == ["mine"]
    assert result.cases["mine"]["1"] == binary_metrics(labels(0) == 1, labels(1) == 1, SPACING)
    put(tmp_path / "many", "mine.nrrd", labels(1))
    put(tmp_path / "many", "other.nrrd", labels(2))
    against_folder = evaluate(p, tmp_path / "many")
    assert against_folder == result and against_folder.warnings == ()
    with pytest.raises(DataError, match="two folders or two files"):
        evaluate(tmp_path / "many", r)


def test_unpaired_cases(folders: tuple[Path, Path]) -> None:
    put(folders[1], "d.nii", labels(5))
    result = evaluate(*folders)
    assert (
        len(result.cases) == 3
        and "1 of 4 references have no prediction" in result.warnings[0]
        and "d" in result.warnings[0]
    )
    assert result.missing == ("d",) and result.to_json()["missing"] == ["d"]
    put(folders[0], "x.nii.gz", labels(5))
    with pytest.raises(DataError, match=r"1 of 4 predictions have no reference.*: x;"):
        evaluate(*folders)


def test_maps_beside_the_masks_are_passed_over(folders: tuple[Path, Path]) -> None:
    plain = evaluate(*folders)
    for name in ("a_uncertainty.nii.gz", "b_prob_heart.nii.gz"):
        put(folders[0], name, np.full((9, 7, 5), 0.3, np.float32))
    assert evaluate(*folders) == plain
    put(folders[0], "x_uncertainty.nii.gz", labels(0))
    with pytest.raises(DataError, match="1 of 4 predictions.*x_uncertainty"):
        evaluate(*folders)


def test_maps_alone_and_a_prediction_that_is_not_there_are_told(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, references = folders
    (tmp_path / "maps").mkdir()
    (predictions / "a.nii.gz").rename(tmp_path / "maps" / "a_uncertainty.nii.gz")
    with pytest.raises(DataError, match="no masks"):
        evaluate(tmp_path / "maps", references)
    with pytest.raises(DataError, match=r"nofile\.nii"):
        evaluate(tmp_path / "nofile.nii", references / "a.nrrd")


def test_one_bad_pair_keeps_the_others(folders: tuple[Path, Path], tmp_path: Path) -> None:
    good = evaluate(*folders)
    (folders[0] / "b.nii.gz").write_bytes(b"not an image")
    put(folders[0], "c.nii.gz", labels(2, shape=(9, 7, 6)))
    with pytest.raises(IncompleteEvaluation) as caught:
        evaluate(*folders, json=tmp_path / "r.json", csv=tmp_path / "r.csv")
    message = str(caught.value)
    assert "2 of 3 cases" in message and "b.nii.gz" in message and "9x7x6" in message and "9x7x5" in message
    values = json.loads((tmp_path / "r.json").read_text())
    assert (
        values["cases"] == {"a": good.to_json()["cases"]["a"]}
        and values["mean"]["1"] == good.to_json()["cases"]["a"]["1"]
    )
    assert [(f["case"], f["class"]) for f in values["failed"]] == [("b", None), ("c", None)]
    assert caught.value.result.to_json() == values
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("change", [{"spacing": (1.5, 0.75, 2.0)}, {"x": 5.0}])
def test_other_grid_of_the_same_size(tmp_path: Path, change: dict[str, Any]) -> None:
    p, r = put(tmp_path, "p.nii.gz", labels(0), **change), put(tmp_path, "r.nii.gz", labels(0))
    with pytest.raises(IncompleteEvaluation, match="one grid") as caught:
        evaluate(p, r)
    assert str(p) in str(caught.value) and str(r) in str(caught.value)


@pytest.mark.parametrize(
    "array", [np.full((4, 4, 4), 0.5, np.float32), np.full((4, 4, 4), 300, np.int16), np.full((4, 4, 4), -1, np.int16)]
)
def test_values_that_are_no_class(tmp_path: Path, array: np.ndarray) -> None:
    p, r = put(tmp_path, "p.nii.gz", array), put(tmp_path, "r.nii.gz", labels(0, (4, 4, 4)))
    with pytest.raises(IncompleteEvaluation, match="whole class numbers from 0 to 255"):
        evaluate(p, r)
    whole = put(tmp_path, "w.nii.gz", labels(0, (4, 4, 4)).astype(np.float32))
    assert evaluate(whole, r).mean["1"]["dice"] == 1


def test_bad_arguments(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="units.*'cm'"):
        evaluate(*folders, units="cm")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="empty.*'skip'"):
        evaluate(*folders, empty="skip")  # type: ignore[arg-type]
    for value in (0, 300, -1):
        with pytest.raises(ConfigError, match=f"1 to 255, got y: {value}"):
            evaluate(*folders, classes={"x": 1, "y": value})
    with pytest.raises(DataError, match="no predictions at"):
        evaluate(tmp_path / "nowhere", folders[1])
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="found none"):
        evaluate(tmp_path / "bare", folders[1])
    put(folders[0], "a.mha", labels(0))
    with pytest.raises(DataError, match="twice"):
        evaluate(*folders)
    (folders[0] / "a.mha").unlink()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError):
        evaluate(*folders, json=tmp_path / "file" / "r.json")
