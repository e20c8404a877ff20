"""`scarceseg foundations list | get | check` as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scarceseg import cli
from scarceseg.foundation.catalogue import CATALOGUE
from scarceseg.foundation.weights import weights_folder
from tests.data.test_download import CONTENT, SHA, Server
from tests.foundation.test_load import KINDS, made, write
from tests.foundation.test_weights import enter, server

__all__ = ["server"]


def run(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status: object = 0
    try:
        cli.main(["foundations", *[str(a) for a in arguments]])
    except SystemExit as stop:
        status = stop.code or 0
    captured = capsys.readouterr()
    assert isinstance(status, int)
    return status, captured.out, captured.err


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run("list", capsys=capsys)
    assert status == 0
    lines = {line.split()[0]: line for line in out.splitlines() if line and line.split()[0] in CATALOGUE}
    assert list(lines) == list(CATALOGUE)
    assert "Apache-2.0" in lines["sam-vit-b"] and "375 MB" in lines["sam-vit-b"] and "get" in lines["sam-vit-b"]
    assert "about 402 MB" in lines["sam-med3d-turbo"] and "by hand" in lines["sam-med3d"]
    assert "github.com" in lines["sam-vit-b"] and "huggingface.co" in lines["medsam"]


def test_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    weights_folder().mkdir(parents=True)
    (weights_folder() / "sam_vit_b_01ec64.pth").write_bytes(b"123")
    status, out, _ = run("list", "--json", capsys=capsys)
    rows = {row["name"]: row for row in json.loads(out)}
    assert status == 0 and list(rows) == list(CATALOGUE)
    keys = {"name", "description", "kind", "licence", "size_bytes", "source", "citation", "sha256", "present", "path"}
    assert all(keys <= row.keys() for row in rows.values())
    assert rows["sam-vit-b"]["present"] and rows["sam-vit-b"]["path"].endswith("sam_vit_b_01ec64.pth")
    assert not rows["sam-vit-h"]["present"] and rows["sam-vit-h"]["path"] is None
    assert rows["sam-vit-h"]["size_bytes"] == 2_564_550_879 and rows["medsam"]["sha256"] is None


def test_get(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    enter(monkeypatch, urls=(server.url(),), sha256=SHA)
    status, out, _ = run("get", "test", capsys=capsys)
    assert status == 0 and f"weights: {weights_folder() / 'test.pth'}" in out.replace("\n", "")
    status, _, _ = run("get", "test", "--out", tmp_path / "here", capsys=capsys)
    assert status == 0 and (tmp_path / "here" / "test.pth").read_bytes() == CONTENT
    for name, message in (("tset", "did you mean 'test'"), ("sam-med3d", "cannot be fetched by a program")):
        status, _, err = run("get", name, capsys=capsys)
        assert status == 2 and message in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_check_of_a_whole_file(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run("check", made(tmp_path, kind), capsys=capsys)
    assert status == 0 and "all names and shapes fit" in out


def test_check_names_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = made(tmp_path, "sam-official")
    state = torch.load(path, weights_only=True)["model_state_dict"]
    value = state.pop("mask_decoder.transformer.norm_final_attn.bias")
    write(path, {**state, "mask_decoder.transformer.norm_final.bias": value})
    status, out, err = run("check", path, capsys=capsys)
    assert status == 2 and not err
    assert "1 missing:\n    mask_decoder.transformer.norm_final_attn.bias" in out
    assert "1 unexpected:\n    mask_decoder.transformer.norm_final.bias" in out
    status, out, _ = run("check", made(tmp_path, "unknown"), capsys=capsys)
    assert status == 2 and "none of the architectures known here" in out
    status, _, err = run("check", tmp_path / "none.pth", capsys=capsys)
    assert status == 2 and "there is no file or folder" in err


def test_help_is_quick_and_loads_no_network() -> None:
    code = "import sys; sys.argv = ['scarceseg', 'foundations', 'get', '--help']\n"
    code += "from scarceseg.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "heavy = {'torch', 'transformers', 'huggingface_hub', 'peft'} & set(sys.modules)\nassert not heavy, heavy"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert "Download weights" in done.stdout
