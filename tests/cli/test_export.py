"""``scarceseg export`` as a user types it, and ``predict`` from what it wrote."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import SimpleITK as sitk

from tests.cli.test_commands import QUICK, scarceseg
from tests.tiny import tiny_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("data"), cases=3)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert scarceseg("train", data, "--labeled", 2, "--method", "supervised", "--out", out, *QUICK)[0] == 0
    return out


def test_predict_from_the_bundle_alone_is_predict_from_the_run(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = scarceseg("export", run, "--out", tmp_path / "bundle", capsys=capsys)
    assert (status, err) == (0, "") and out.startswith("bundle:") and len(out.splitlines()) == 1
    for source, masks in ((run, "from-run"), (tmp_path / "bundle", "from-bundle")):
        words = ["predict", source, data / "imagesTr", "--out", tmp_path / masks, "--probabilities", "--device", "cpu"]
        assert scarceseg(*words, capsys=capsys)[0] == 0
    written = sorted(path.name for path in (tmp_path / "from-run").iterdir())
    assert len(written) == 9 and written == sorted(path.name for path in (tmp_path / "from-bundle").iterdir())
    for name in written:
        a, b = (sitk.ReadImage(str(tmp_path / masks / name)) for masks in ("from-run", "from-bundle"))
        assert sitk.Hash(a) == sitk.Hash(b)
        assert a.GetOrigin() == b.GetOrigin() and a.GetDirection() == b.GetDirection()


@pytest.mark.parametrize(("to", "name"), [("torchscript", "net.ts"), ("onnx", "net.onnx")])
def test_one_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str, name: str) -> None:
    if to == "onnx":
        pytest.importorskip("onnxscript", reason="the extra 'export' is not installed")
    status, out, err = scarceseg("export", run, "--to", to, "--out", tmp_path / name, capsys=capsys)
    assert (status, err) == (0, "") and out.startswith(f"{to}:") and len(out.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]
    status, _, err = scarceseg("export", run, "--to", to, "--out", tmp_path / name, capsys=capsys)
    assert status == 2 and "exists already" in err


def test_refusals_are_one_message_and_status_2(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text("method: supervised\n")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    for words, expected in (
        ([tmp_path / "nowhere", "--out", tmp_path / "x"], "there is no run folder"),
        ([tmp_path, "--out", tmp_path / "x"], "holds no model.json"),
        ([unfinished, "--out", tmp_path / "x"], "has not finished"),
        ([run, "--to", "onxx", "--out", tmp_path / "x"], "did you mean 'onnx'"),
        ([run, "--to", "onnx", "--out", tmp_path / "x.onnx"], ".[export]"),
        ([run, "--to", "torchscript", "--out", tmp_path / "x"], ".ts"),
    ):
        status, out, err = scarceseg("export", *words, capsys=capsys)
        assert (status, out) == (2, "") and err.startswith("error:") and len(err.splitlines()) == 1, (words, err)
        assert expected in err, (words, err)
    assert [path.name for path in tmp_path.iterdir()] == ["unfinished"]


def test_help_does_not_load_torch() -> None:
    code = "import sys, scarceseg.cli as c\ntry:\n c.main(['export', '--help'])\nexcept SystemExit:\n"
    done = subprocess.run(
        [sys.executable, "-c", code + " sys.exit('torch' in sys.modules)"],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "torchscript" in done.stdout and "bundle" in done.stdout
