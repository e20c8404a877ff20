"""`scarceseg compare` as a user types it, on runs of a few steps."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from tests.cli.test_commands import QUICK, scarceseg
from tests.tiny import tiny_dataset


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two seeds of one method and one of another, measured on two cases."""
    folder = tmp_path_factory.mktemp("runs")
    data = tiny_dataset(folder / "data")
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scarceseg.engine.run.build_report", lambda folder: None)  # most of the time, and not looked at
        for method, seed in (("supervised", 0), ("supervised", 1), ("mean-teacher", 0)):
            run = made[f"{method}-{seed}"] = folder / f"{method}-{seed}"
            command = ["train", data, "--labeled", 2, "--val", "case_03,case_04", "--method", method, "--seed", seed]
            assert scarceseg(*command, "--out", run, *QUICK)[0] == 0
    return made


def test_runs_of_train_are_compared(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    files = ["--json", tmp_path / "c.json", "--csv", tmp_path / "c.csv", "--html", tmp_path / "c.html"]
    status, out, err = scarceseg("compare", *runs.values(), "--baseline", "supervised", *files, capsys=capsys)
    assert status == 0 and not err, err
    assert "tiny: 2 cases" in out and "2 cases are too few" in out
    groups = {group["method"]: group for group in json.loads((tmp_path / "c.json").read_text())["groups"]}
    assert groups["supervised"]["seeds"] == [0, 1] and groups["mean-teacher"]["seeds"] == [0]
    dice = [
        json.loads((runs[f"supervised-{seed}"] / "evaluation.json").read_text())["mean"]["box1"]["dice"]
        for seed in (0, 1)
    ]
    found = groups["supervised"]["overall"]["dice"]
    assert found["mean"] == pytest.approx(sum(dice) / 2)
    assert found["std"] == pytest.approx(abs(dice[0] - dice[1]) / 2**0.5)
    rows = list(csv.DictReader((tmp_path / "c.csv").open(encoding="utf-8")))
    assert {row["method"] for row in rows} == {"supervised", "mean-teacher"}
    page = (tmp_path / "c.html").read_text(encoding="ascii")
    assert "Comparison on tiny" in page and 'aria-label="mean-teacher of case_03"' in page


def test_other_scores_and_units(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = runs["supervised-0"]
    references = run.parent / "data" / "labelsTr"
    command = ["evaluate", run / "validation", references, "--units", "voxel", "--json", run / "voxel.json"]
    assert scarceseg(*command, capsys=capsys)[0] == 0
    status, out, _ = scarceseg("compare", run, "--scores", "voxel.json", capsys=capsys)
    assert status == 0 and "[voxel]" in out
    status, _, err = scarceseg("compare", run, "--units", "voxel", capsys=capsys)  # voxels of 1 x 1 x 1.5 mm
    assert status == 2 and "not cubes" in err


def test_wrong_use_is_one_message_and_status_2(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs["supervised-0"]
    training = shutil.copytree(run, tmp_path / "training")
    for name in ("model.safetensors", "evaluation.json"):
        (training / name).unlink()
    for arguments, word in (
        ([tmp_path / "nowhere"], "nowhere is no run folder"),
        ([run.parent / "data"], "data is no run folder"),
        ([training], "has not come to its end"),
        ([run, "--baseline", "ua-mt"], "'ua-mt'"),
        ([run, "--units", "cm"], "'cm'"),
        ([run, "--scores", "test.json"], "test.json"),
    ):
        status, _, err = scarceseg("compare", *arguments, capsys=capsys)
        assert status == 2 and word in err, (arguments, err)
        assert err.startswith("error:") and len(err.splitlines()) == 1, err
    status, out, _ = scarceseg("compare", run, training, capsys=capsys)
    assert status == 0 and "warning:" in out and str(training) in out
    assert scarceseg("compare", capsys=capsys)[0] == 2
