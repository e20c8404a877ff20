"""`scarceseg-pretrain` as a user types it, on networks and volumes of a toy's size."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from scarceseg.foundation import tiny_sam, tiny_sam3d_net
from scarceseg.foundation.tiny_sam import read_tiny_sam
from scarceseg.foundation.tiny_sam3d import read_tiny_sam3d, save_tiny_sam3d
from scarceseg.pretrain import click_task
from scarceseg.pretrain.click_task import ClickTask
from scarceseg.pretrain.command import main
from tests.foundation.small import SMALL_3D, small_net, small_sam

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setattr(tiny_sam3d_net, "TinySam3DNet", small_net)
    monkeypatch.setattr(click_task, "ClickTask", partial(ClickTask, batch=1, targets=1, sizes=((1.0, (16, 16, 16)),)))
    monkeypatch.setattr(tiny_sam, "start_tiny_sam", small_sam)

    def typed(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        captured = capsys.readouterr()
        assert stop.value.code is None or isinstance(stop.value.code, int)
        return stop.value.code or 0, captured.out, captured.err

    return typed


def test_tiny_sam3d(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    status, text, err = run("tiny-sam3d", "--out", out, "--iterations", 2, "--threads", 1)
    assert status == 0, err
    path = out / "tiny_sam3d.safetensors"
    assert f"weights: {path}" in text
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint.pt", "metrics.jsonl", "tiny_sam3d.safetensors"]
    with safe_open(path, "pt") as file:
        assert {"iterations": "2", "seed": "0"}.items() <= file.metadata().items()
    # The averaged weights are the result, and not the last ones.
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    written = read_tiny_sam3d(path).state_dict()
    for name, value in state["average"].items():
        torch.testing.assert_close(written[name], value, rtol=1e-3, atol=1e-6)
    assert any(not torch.allclose(written[n], v, rtol=1e-3, atol=1e-6) for n, v in state["network"].items())
    # A second start is refused and leaves everything as it is.
    before = path.read_bytes()
    status, _, err = run("tiny-sam3d", "--out", out, "--iterations", 3)
    assert status == 2 and "add --resume" in err and len(err.strip().splitlines()) == 1
    assert path.read_bytes() == before
    status, _, err = run("tiny-sam3d", "--out", out, "--iterations", 3, "--resume")
    assert status == 0, err
    assert path.read_bytes() != before
    again = tmp_path / "again"
    assert run("tiny-sam3d", "--out", again, "--iterations", 1, "--start", path)[0] == 0
    assert read_tiny_sam3d(again / "tiny_sam3d.safetensors").config == SMALL_3D


def test_tiny_sam(run: Run, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher.safetensors"
    save_tiny_sam3d(teacher, small_net(3))
    out = tmp_path / "run"
    status, text, err = run("tiny-sam", "--out", out, "--teacher", teacher, "--iterations", 2, "--seed", 5)
    assert status == 0, err
    path = out / "tiny_sam.safetensors"
    assert f"weights: {path}" in text
    # The network alone: what foretold the teacher's features stays in the checkpoint.
    assert load_file(path).keys() == small_sam().state_dict().keys()
    average = torch.load(out / "checkpoint.pt", weights_only=True)["average"]
    written = read_tiny_sam(path).state_dict()
    for name, value in written.items():
        torch.testing.assert_close(value, average[f"sam.{name}"], rtol=1e-3, atol=1e-6)
    started = small_sam(5).state_dict()
    assert any(not torch.allclose(value, started[name], atol=1e-4) for name, value in written.items())


def test_interrupted_and_resumed_is_the_same(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    command = ("tiny-sam3d", "--iterations", 3, "--seed", 1, "--out")
    assert run(*command, tmp_path / "straight")[0] == 0
    calls: list[int] = []
    whole = ClickTask.loss

    def loss(self: ClickTask, *arguments: object) -> dict[str, torch.Tensor]:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ClickTask, "loss", loss)
    status, _, err = run(*command, tmp_path / "cut")
    assert status == 130 and "stopped after step 2 of 3" in err
    assert not (tmp_path / "cut" / "tiny_sam3d.safetensors").exists()
    status, _, err = run(*command, tmp_path / "cut", "--resume")
    assert status == 0, err
    one, other = (load_file(tmp_path / name / "tiny_sam3d.safetensors") for name in ("straight", "cut"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_bad_input_gives_one_clear_message(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    out = tmp_path / "out"
    for arguments, message in (
        (("tiny-sam3d", "--out", file), "is a file: choose a folder"),
        (("tiny-sam3d", "--out", out, "--resume"), "holds no checkpoint to resume"),
        (("tiny-sam", "--out", out, "--teacher", tmp_path / "none.safetensors"), "there is no file"),
        (("tiny-sam", "--out", out, "--teacher", "sam-vit-b"), "not on this machine"),
        (("tiny-sam", "--out", out, "--teacher", file), "is no file of weights"),
    ):
        status, _, err = run(*arguments)
        assert status == 2 and message in err.replace("\n", " "), (arguments, err)
        assert err.startswith("error: ") and len(err.strip().splitlines()) == 1
    assert not (out / "checkpoint.pt").exists()
    for arguments in (
        ("tiny-sam3d", "--out", out, "--iterations", 0),
        ("tiny-sam3d",),
        ("tiny-sam3d", "--out", out, "--start", tmp_path / "none"),
        ("tiny-sam4d", "--out", out),
    ):
        assert run(*arguments)[0] == 2


def test_the_name_of_the_teacher_goes_before_a_folder_called_so(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier ``--out tiny-sam3d`` must not hide the packaged weights."""
    from scarceseg.foundation import weights

    monkeypatch.chdir(tmp_path)
    Path("tiny-sam3d").mkdir()
    monkeypatch.setattr(weights, "PACKAGED", tmp_path)
    save_tiny_sam3d(tmp_path / "tiny_sam3d.safetensors", small_net())
    status, _, err = run("tiny-sam", "--out", "run", "--iterations", 1)
    assert status == 0, err


def test_help_loads_no_network() -> None:
    code = "import sys; from scarceseg.pretrain.command import main\n"
    code += "try: main(['tiny-sam', '--help'])\nexcept SystemExit as stop: assert not stop.code\n"
    code += "heavy = {'torch', 'transformers'} & set(sys.modules)\nassert not heavy, heavy"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert "--teacher" in re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)


def test_the_command_is_installed_under_its_name() -> None:
    project = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert 'scarceseg-pretrain = "scarceseg.pretrain.command:main"' in project
