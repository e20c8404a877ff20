"""Weights: what the catalogue promises, downloads from a local server and a local Hub, and files that must not run."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from scarceseg.data import download as downloads
from scarceseg.errors import ConfigError, DataError, RunError
from scarceseg.foundation import weights
from scarceseg.foundation.catalogue import CATALOGUE, HubFiles, Weights
from scarceseg.foundation.weights import find, get, list_weights, read_tensors, weights_folder
from tests.data.test_download import CONTENT, MD5, SHA, Handler, Server

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = b'{"model_type": "sam"}'


class HubHandler(Handler):
    """The part of the Hub's answers that its library asks for."""

    def do_HEAD(self) -> None:
        self.server.requests.append((f"HEAD {self.path}", None))
        body = self.server.files.get(self.path)
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        large = len(body) > 1000  # small files of the Hub carry the hash of git, large ones SHA-256
        etag = hashlib.sha256(body).hexdigest() if large else hashlib.sha1(body).hexdigest()
        for name, value in (("X-Repo-Commit", COMMIT), ("ETag", f'"{etag}"'), ("Content-Length", str(len(body)))):
            self.send_header(name, value)
        self.end_headers()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(downloads, "BLOCK", 4096)
    made = Server()
    made.RequestHandlerClass = HubHandler
    made.files |= {
        f"/owner/model/resolve/{COMMIT}/config.json": CONFIG,
        f"/owner/model/resolve/{COMMIT}/model.bin": CONTENT,
    }
    monkeypatch.setenv("HF_ENDPOINT", made.url("").rstrip("/"))
    threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def enter(monkeypatch: pytest.MonkeyPatch, **facts: Any) -> Weights:
    """Put an entry called ``test`` into the catalogue."""
    base = Weights("test", "for a test", "sam", "none", len(CONTENT), "https://example.org/test", "nobody", "test.pth")
    entry = replace(base, **facts)
    monkeypatch.setitem(CATALOGUE, "test", entry)
    return entry


def test_catalogue_is_complete_and_consistent() -> None:
    assert list(CATALOGUE) == [
        "tiny-sam", "tiny-sam3d", "sam-vit-b", "sam-vit-l", "sam-vit-h", "medsam", "sam-med3d", "sam-med3d-turbo",
    ]  # fmt: skip
    for name, entry in CATALOGUE.items():
        assert entry.name == name and entry.licence and entry.citation and entry.description and entry.source
        assert sum((entry.packaged, bool(entry.urls), entry.hub is not None)) <= 1
        assert all(url.startswith("https://") and url.endswith(f"/{entry.filename}") for url in entry.urls)
        for value, length in ((entry.sha256, 64), (entry.md5, 32)):
            assert value is None or re.fullmatch(f"[0-9a-f]{{{length}}}", value)
    # Meta's file names carry the first digits of the MD5 of the file.
    for letter in "blh":
        entry = CATALOGUE[f"sam-vit-{letter}"]
        assert entry.md5 and entry.filename == f"sam_vit_{letter}_{entry.md5[:6]}.pth" and entry.sha256 and entry.exact
    assert CATALOGUE["sam-vit-b"].filename == "sam_vit_b_01ec64.pth"
    assert CATALOGUE["sam-vit-l"].filename == "sam_vit_l_0b3195.pth"
    assert CATALOGUE["sam-vit-h"].filename == "sam_vit_h_4b8939.pth"
    # 93,735,728 values of four bytes, and the names.
    assert 93_735_728 * 4 < (CATALOGUE["sam-vit-b"].size_bytes or 0) < 93_735_728 * 4 * 1.001


def test_plain_address(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    enter(monkeypatch, urls=(server.url("/gone"), server.url()), sha256=SHA, md5=MD5, exact=True)
    with pytest.raises(DataError, match="not on this machine: run 'scarceseg foundations get test'"):
        find("test")
    assert server.requests == []
    seen: list[tuple[int, int | None]] = []
    path = get("test", progress=lambda done, total: seen.append((done, total)))
    assert path == weights_folder() / "test.pth" == find("test") and path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    asked = len(server.requests)
    assert get("test") == path and len(server.requests) == asked
    row = next(row for row in list_weights() if row["name"] == "test")
    assert row["present"] and row["path"] == str(path) and row["size_bytes"] == len(CONTENT)
    elsewhere = get("test", tmp_path / "new")
    assert elsewhere == tmp_path / "new" / "test.pth" and elsewhere.read_bytes() == CONTENT


def test_interrupted_download_goes_on(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(monkeypatch, urls=(server.url(),), sha256=SHA)
    server.cut = [9_000, 0, 0, 0]
    with pytest.raises(DataError, match="9000 bytes are kept, call again"):
        get("test")
    with pytest.raises(DataError, match="not on this machine"):
        find("test")
    assert get("test").read_bytes() == CONTENT and server.requests[-1] == ("/file", "bytes=9000-")


def test_another_file_under_the_address_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(monkeypatch, urls=(server.url(),), sha256="0" * 64)
    with pytest.raises(DataError, match="not the expected one and was removed"):
        get("test")
    assert not weights_folder().exists() or list(weights_folder().iterdir()) == []


def test_cut_file_in_the_cache_is_seen(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(monkeypatch, urls=(server.url(),), exact=True)
    get("test").write_bytes(CONTENT[:100])
    with pytest.raises(DataError, match=r"expected 50000 bytes, got 100; remove it and run 'scarceseg foundations get"):
        find("test")


def test_folder_from_the_hub(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = HubFiles("owner/model", ("config.json", "model.bin"), COMMIT)
    enter(monkeypatch, hub=hub, filename="model-folder", size_bytes=50_000)
    server.cut = [None, 20_000, 0, 0, 0]
    with pytest.raises(DataError, match="20000 bytes are kept"):
        get("test")
    with pytest.raises(DataError, match="not on this machine"):
        find("test")  # a folder with one of two files is not there yet
    path = get("test")
    assert path == weights_folder() / "model-folder" == find("test")
    assert {p.name: p.read_bytes() for p in path.iterdir()} == {"config.json": CONFIG, "model.bin": CONTENT}
    assert server.requests[-1] == (f"/owner/model/resolve/{COMMIT}/model.bin", "bytes=20000-")
    server.shutdown()
    server.server_close()
    assert get("test") == path


def test_hub_file_is_checked_against_the_hash_the_hub_states(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"/owner/model/resolve/{COMMIT}/model.bin"
    enter(monkeypatch, hub=HubFiles("owner/model", ("model.bin",), COMMIT), filename="model.bin")

    class Lying(HubHandler):
        def do_GET(self) -> None:
            honest = self.server.files[name]
            self.server.files[name] = bytes(len(honest))
            super().do_GET()
            self.server.files[name] = honest

    server.RequestHandlerClass = Lying
    with pytest.raises(DataError, match=f"not the expected one.*{SHA}"):
        get("test")
    server.RequestHandlerClass = HubHandler
    assert get("test").read_bytes() == CONTENT
    enter(monkeypatch, hub=HubFiles("owner/model", ("model.bin",), COMMIT), filename="other.bin", sha256="0" * 64)
    with pytest.raises(DataError, match="not the expected one"):  # the catalogue's own hash comes first
        get("test")


def test_hub_that_cannot_be_reached(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(monkeypatch, hub=HubFiles("owner/none", ("model.bin",), COMMIT), filename="model.bin")
    with pytest.raises(DataError, match="cannot ask the Hugging Face Hub for .*owner/none.*404") as caught:
        get("test")
    assert "\n" not in str(caught.value) and "https://huggingface.co/owner/none" in str(caught.value)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match="cannot ask the Hugging Face Hub"):
        get("test")


def test_weights_only_a_person_can_fetch(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"sam-med3d cannot be fetched by a program: get sam_med3d.pth by hand from https"
    ):
        get("sam-med3d")
    with pytest.raises(DataError, match="put it at .*sam_med3d.pth, or give the file"):
        find("sam-med3d")
    weights_folder().mkdir(parents=True)
    (weights_folder() / "sam_med3d.pth").write_bytes(b"x")
    assert get("sam-med3d") == find("sam-med3d") == weights_folder() / "sam_med3d.pth"


def test_packaged_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(weights, "PACKAGED", tmp_path / "package")
    with pytest.raises(DataError, match="belongs to the package and is missing"):
        find("tiny-sam")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "tiny_sam.safetensors").write_bytes(b"tiny")
    assert find("tiny-sam") == get("tiny-sam") == tmp_path / "package" / "tiny_sam.safetensors"
    assert get("tiny-sam", tmp_path / "out").read_bytes() == b"tiny"
    with pytest.raises(RunError, match="cannot write into"):
        get("tiny-sam", tmp_path / "package" / "tiny_sam.safetensors")


def test_unknown_name() -> None:
    for call in (find, get):
        with pytest.raises(ConfigError, match="unknown weights 'sam-vitb': did you mean 'sam-vit-b'"):
            call("sam-vitb")


STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.zeros(2, dtype=torch.float16)}


@pytest.mark.parametrize("wrapper", [None, "model_state_dict", "state_dict", "model"])
def test_tensors_of_pickled_files(wrapper: str | None, tmp_path: Path) -> None:
    extras = {"epoch": 3, "best": 0.5, "args": argparse.Namespace(lr=0.1), "note": "text"}
    torch.save({wrapper: STATE, **extras} if wrapper else {**STATE, "epoch": 3}, tmp_path / "w.pth")
    found = read_tensors(tmp_path / "w.pth")
    assert found.metadata == {} and found.state.keys() == STATE.keys()
    assert all(torch.equal(found.state[name], tensor) for name, tensor in STATE.items())
    shapes = read_tensors(tmp_path / "w.pth", "meta").state
    assert {name: tensor.shape for name, tensor in shapes.items()} == {name: t.shape for name, t in STATE.items()}
    assert all(tensor.device.type == "meta" for tensor in shapes.values())


def test_tensors_of_safetensors(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "w.safetensors", {"kind": "test"})
    found = read_tensors(tmp_path / "w.safetensors")
    assert found.metadata == {"kind": "test"} and all(torch.equal(found.state[n], t) for n, t in STATE.items())
    shapes = read_tensors(tmp_path / "w.safetensors", "meta").state
    assert {n: tuple(t.shape) for n, t in shapes.items()} == {n: tuple(t.shape) for n, t in STATE.items()}


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return open, (str(self.target), "w")


def test_code_in_a_file_never_runs(tmp_path: Path) -> None:
    made = tmp_path / "made"
    torch.save({**STATE, "bad": Malicious(made)}, tmp_path / "zip.pth")
    torch.save({**STATE, "bad": Malicious(made)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"bad": Malicious(made)}))
    (tmp_path / "fake.safetensors").write_bytes(pickle.dumps(Malicious(made)))
    for name in ("zip.pth", "old.pth", "plain.pth", "fake.safetensors"):
        for device in ("cpu", "meta"):
            with pytest.raises(DataError, match=r"code in a file is never run|no safetensors file") as caught:
                read_tensors(tmp_path / name, device)
            assert "\n" not in str(caught.value)
    assert not made.exists()
    with pytest.raises(DataError, match=r"\(_?io\.open\)"):
        read_tensors(tmp_path / "zip.pth")
    torch.load(tmp_path / "zip.pth", weights_only=False)  # the file does what it threatens to
    assert made.exists()


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    torch.save({"a": np.zeros(3)}, tmp_path / "numpy.pth")
    torch.save(STATE, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:200])
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    for path in sorted(tmp_path.iterdir()):
        if path.name != "whole.pth":
            with pytest.raises(DataError) as caught:
                read_tensors(path)
            assert path.name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DataError, match="there is no file of weights"):
        read_tensors(tmp_path / "none.pth")
