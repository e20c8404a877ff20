"""Parts in files outside the package: they are found by their names, and what cannot be imported is one message."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from scarceseg import cli
from scarceseg.config import NetworkConfig
from scarceseg.errors import ConfigError
from scarceseg.inference.model import save_model
from scarceseg.methods import METHODS, build_terms
from scarceseg.networks import NETWORKS, build_network
from scarceseg.networks.base import divisor_of
from scarceseg.plugins import VARIABLE
from tests.inference.scans import plan

NETWORK = """
from __future__ import annotations

from dataclasses import dataclass

import torch

from scarceseg.networks import NETWORKS, SegmentationNetwork

assert "vnet" in NETWORKS.names()
ONE = torch.ones(1)


@dataclass
class Width:
    value: int = 3


@NETWORKS.register("plain-file")
class PlainFile(SegmentationNetwork):
    divisor = (2, 2, 2)

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        assert ONE.device.type == "cpu"
        self.layer = torch.nn.Conv3d(channels, classes, Width().value, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layer(image)
"""
TERM = """
import torch

from scarceseg.methods.base import METHODS, Term


@METHODS.register("plain-term")
class PlainTerm(Term):
    def loss(self, step):
        return step.logits_l.square().mean()
"""


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers does not stay."""
    for registry in (NETWORKS, METHODS):
        registry.names()
        monkeypatch.setattr(registry, "_parts", dict(registry._parts))
    monkeypatch.setattr("scarceseg.plugins._loaded", set())
    yield
    for name in [name for name in sys.modules if name.startswith(("scarceseg_plugin_", "own_parts", "own_term"))]:
        del sys.modules[name]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_files_and_modules_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "modules" / "own_term.py", TERM)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    entries = [str(write(tmp_path / "my network.py", NETWORK)), "", "own_term"]
    monkeypatch.setenv(VARIABLE, os.pathsep.join(entries))
    assert divisor_of("plain-file") == (2, 2, 2)
    assert "plain-file" in NETWORKS.names() and "plain-term" in METHODS.names()
    assert list(build_terms("plain-term", {}, 2)) == ["supervised", "plain-term"]
    with pytest.raises(ConfigError, match="did you mean 'plain-file'"):
        build_network("plain-fil", 1, 2)


def test_predict_knows_the_network_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "net.py", NETWORK)
    with monkeypatch.context() as here:
        here.setattr(NETWORKS, "_parts", dict(NETWORKS._parts))
        here.setattr("scarceseg.plugins._loaded", set())
        here.setenv(VARIABLE, str(file))
        save_model(tmp_path / "run", build_network("plain-file", 1, 2), NetworkConfig(name="plain-file"), plan(), {})
    sys.modules.pop("scarceseg_plugin_1_net")
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((8, 9, 10), np.float32)), str(tmp_path / "a.nrrd"))
    arguments = [
        "predict",
        str(tmp_path / "run"),
        str(tmp_path / "a.nrrd"),
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and f"name its file in {VARIABLE}" in capsys.readouterr().err
    monkeypatch.setenv(VARIABLE, str(file))
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert not stop.value.code and (tmp_path / "out" / "a.nrrd").exists()


def test_a_file_that_is_running_or_imported_already_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "own_parts.py", f"{NETWORK}\nCOUNT = []\n")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("own_parts")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "." / "own_parts.py"))
    assert NETWORKS.get("plain-file") is sys.modules["own_parts"].PlainFile


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import torch\nx = nothing\n", "(NameError: name 'nothing' is not defined (bad.py, line 2)): correct it"),
        ("def f(:\n", "(SyntaxError: invalid syntax (bad.py, line 1)): correct it"),
        ("import not_there_at_all\n", "(ModuleNotFoundError: No module named 'not_there_at_all' (bad.py, line 1))"),
        ("raise SystemExit(3)\n", "(SystemExit: 3 (bad.py, line 1))"),
        (NETWORK.replace("plain-file", "vnet"), "(ConfigError: network 'vnet' is registered twice"),
        (None, "there is no Python file"),
    ],
)
def test_what_cannot_be_imported_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str | None, words: str
) -> None:
    path = tmp_path / "bad.py"
    if text is not None:
        write(path, text)
    monkeypatch.setenv(VARIABLE, str(path))
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", str(tmp_path)])
    told = capsys.readouterr().err
    assert stop.value.code == 2 and len(told.splitlines()) == 1
    assert told.startswith(f"error: {VARIABLE}: ") and str(path) in told and words in told
    with pytest.raises(ConfigError, match=VARIABLE):  # and it is not forgotten
        METHODS.names()


def test_a_module_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "not_there.at_all")
    with pytest.raises(ConfigError, match=r"cannot import not_there\.at_all \(ModuleNotFoundError: No module named"):
        NETWORKS.names()
