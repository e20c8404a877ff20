"""The commands as a user types them, in a process of their own or through the same entry point."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from scarceseg import cli
from tests.tiny import tiny_dataset

QUICK = ["--iterations", "2", "--patch", "16,16,16", "--spacing", "1", "--device", "cpu", "--precision", "fp32"]
QUICK += ["--set", "network.args.n_filters=1", "--set", "memory_format=contiguous"]


def scarceseg(*arguments: object, capsys: pytest.CaptureFixture[str] | None = None) -> tuple[int, str, str]:
    """Exit status, standard output and error of one command."""
    try:
        cli.main([str(a) for a in arguments])
        status: object = 0
    except SystemExit as stop:
        status = stop.code or 0
    captured = capsys.readouterr() if capsys else None
    assert isinstance(status, int)
    return status, captured.out if captured else "", captured.err if captured else ""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("data"))


def test_train_predict_evaluate_report(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, masks, scores = tmp_path / "run", tmp_path / "masks", tmp_path / "scores.json"
    train = ["train", data, "--labeled", 2, "--method", "mean-teacher", "--out", run, *QUICK]
    status, out, err = scarceseg(*train, capsys=capsys)
    assert status == 0, err
    assert (run / "model.safetensors").exists() and "report" in out
    status, out, err = scarceseg("predict", run, data / "imagesTr", "--out", masks, "--uncertainty", capsys=capsys)
    assert status == 0, err
    names = sorted(p.name for p in masks.glob("case_0?.nii.gz"))
    assert names == [f"case_{i:02d}.nii.gz" for i in range(5)]
    mask, image = sitk.ReadImage(str(masks / names[0])), sitk.ReadImage(str(data / "imagesTr" / "case_00_0000.nii.gz"))
    assert mask.GetSize() == image.GetSize() and mask.GetOrigin() == image.GetOrigin()
    uncertainty = sitk.GetArrayFromImage(sitk.ReadImage(str(masks / "case_00_uncertainty.nii.gz")))
    assert uncertainty.min() >= 0 and uncertainty.max() <= 1
    again = ["predict", run, data / "imagesTr", "--out", masks]
    status, out, err = scarceseg(*again, "--existing", "skip", capsys=capsys)
    assert status == 0 and "5 of 5 cases are done" in err and "0 files" in out
    for wrong, words in (
        (["--existing", "refuse"], "exist already"),
        (["--largest-component-of", "box1,liver"], "'liver'"),
    ):
        status, _, err = scarceseg(*again, *wrong, capsys=capsys)
        assert status == 2 and words in err and len(err.splitlines()) == 1
    assert scarceseg(*again, "--largest-component-of", "box1", "--with", run, "--with", run, capsys=capsys)[0] == 0
    for extra in masks.glob("*_uncertainty*"):
        extra.unlink()
    status, out, err = scarceseg(
        "evaluate", masks, data / "labelsTr", "--json", scores, "--csv", tmp_path / "s.csv", capsys=capsys
    )
    assert status == 0, err
    result = json.loads(scores.read_text())
    assert set(result) == {"units", "cases", "mean", "failed", "absent", "missing"} and len(result["cases"]) == 5
    assert set(result["cases"]["case_00"]["box1"]) == {"dice", "jaccard", "asd", "assd", "hd95"}
    assert scarceseg("report", run, capsys=capsys)[0] == 0
    assert scarceseg(*train, capsys=capsys)[0] == 2  # the folder is taken
    status, out, err = scarceseg("train", "--out", run, "--resume", capsys=capsys)
    assert status == 0, err  # everything else is read from the run


def test_plan(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = scarceseg("plan", data, "--labeled", 2, "--patch", "16,16,16", "--json", capsys=capsys)
    assert status == 0
    plan = json.loads(out)
    assert plan["patch"] == [16, 16, 16] and plan["classes"] == ["background", "box1"]
    status, out, _ = scarceseg("plan", data, capsys=capsys)
    assert status == 0 and "patch" in out
    rows = ["plan", data, "--labeled", 2, "--patch", "16,16,16", "--method", "mean-teacher", "--json"]
    more = json.loads(scarceseg(*rows, capsys=capsys)[1])["memory_estimate_mb"]
    most = json.loads(scarceseg(*rows, "--set", "batch_unlabeled=4", capsys=capsys)[1])["memory_estimate_mb"]
    assert plan["memory_estimate_mb"] < more < most
    for wrong in (["--method", "mean-techer"], ["--set", "terms.semisam.weight=1"]):
        status, _, err = scarceseg("plan", data, *wrong, capsys=capsys)
        assert status == 2 and err.startswith("error:") and len(err.splitlines()) == 1


def test_plan_says_what_is_odd_about_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_dataset(tmp_path / "data")
    facts = json.loads((folder / "dataset.json").read_text())
    facts["labels"] = {"background": 0, "box [/b]": 1}
    (folder / "dataset.json").write_text(json.dumps(facts))
    (folder / "labelsTr" / "case_04.nii.gz").rename(folder / "labelsTr" / "Case_04.nii.gz")
    (folder / "labelsTr" / "case_03.nii.gz").rename(folder / "labelsTr" / "case_03.nii")
    status, out, err = scarceseg("plan", folder, capsys=capsys)
    told = " ".join((out + err).split())
    assert status == 0 and "box [/b]" in told
    assert "labels without an image" in told and "Case_04" in told
    assert "case_03.nii" in told and "no labels" in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "mean-techer"], ["mean-teacher"]),
        (["--network", "vnett"], ["vnet"]),
        (["--recipe", "laa"], ["la"]),
        (["--patch", "16,16"], ["X,Y,Z", "16,16"]),
        (["--patch", "15,16,16"], ["15", "16"]),
        (["--spacing", "abc"], ["--spacing", "abc"]),
        (["--spacing", "0"], ["spacing"]),
        (["--labeled", "0"], ["labeled", "got 0"]),
        (["--labeled", "99"], ["99"]),
        (["--labeled", "case_00,case_77"], ["case_77"]),
        (["--val", "case_7*"], ["case_7*"]),
        (["--labeled", "case_00", "--val", "case_00"], ["case_00"]),
        (["--iterations", "0"], ["iterations"]),
        (["--set", "optim.lrr=1"], ["optim.lrr", "lr"]),
        (["--set", "optim.lr"], ["KEY=VALUE"]),
        (["--set", "terms.ua-mt.weight=1"], ["ua-mt"]),
        (["--device", "tpu"], ["device", "tpu"]),
        (["--set", "optim.momentum=-0.1"], ["momentum", "-0.1"]),
        (["--set", "optim.weight_decay=-1"], ["weight_decay"]),
        (["--set", "optim.step=-5"], ["step", "-5"]),
        (["--set", "iterations=2020-13-45"], ["iterations"]),
        (["--set", "select=best"], ["--val"]),
        (["--labeled", "--3"], ["--3"]),
        (["--labeled", "002"], ["002"]),
    ],
)
def test_bad_usage_is_one_message_and_status_2(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    status, _, err = scarceseg("train", data, "--out", tmp_path / "run", *QUICK, *arguments, capsys=capsys)
    assert status == 2
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and all(word in lines[0] for word in words), err
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "config.yaml").exists(), "the folder is free for the mended command"


def test_missing_dataset_and_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        ["train", tmp_path / "nowhere", "--out", tmp_path / "run"],
        ["train", "--out", tmp_path / "run"],
        ["plan", tmp_path / "nowhere"],
        ["predict", tmp_path / "nowhere", tmp_path, "--out", tmp_path / "masks"],
        ["evaluate", tmp_path / "nowhere", tmp_path],
        ["report", tmp_path / "nowhere"],
        ["datasets", "get", "hart"],
    ):
        status, _, err = scarceseg(*command, capsys=capsys)
        assert status == 2 and "Traceback" not in err, command
        assert err.startswith("error:") and len(err.splitlines()) == 1, (command, err)


def test_unknown_option_is_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert scarceseg("train", "--lable", capsys=capsys)[0] == 2


def test_bad_data_stops_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_dataset(tmp_path / "data")
    image = sitk.ReadImage(str(folder / "imagesTr" / "case_03_0000.nii.gz"))
    array = sitk.GetArrayFromImage(image)
    array[0, 0, 0] = np.nan
    sitk.WriteImage(sitk.GetImageFromArray(array), str(folder / "imagesTr" / "case_03_0000.nii.gz"))
    status, _, err = scarceseg("train", folder, "--labeled", 2, "--out", tmp_path / "run", *QUICK, capsys=capsys)
    assert status == 2 and "case_03" in err and "Traceback" not in err


def test_datasets_list(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = scarceseg("datasets", "list", capsys=capsys)
    assert status == 0 and "la" in out and "brats19" in out


def test_help_does_not_load_torch() -> None:
    code = "import sys, scarceseg.cli as c\ntry:\n c.main(['--help'])\nexcept SystemExit:\n sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    for command in ("demo", "plan", "train", "predict", "evaluate", "datasets", "report"):
        assert command in done.stdout


def test_python_names() -> None:
    from scarceseg import Config, compare, evaluate, predict, train

    assert all(callable(f) for f in (train, predict, evaluate, compare)) and Config().method == "supervised"
