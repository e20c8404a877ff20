"""Downloads from a local server: resuming, hashes, mirrors, servers without ranges, and unpacking."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from scarceseg.data import download as module
from scarceseg.data.download import download, extract_tar
from scarceseg.errors import DataError, RunError

CONTENT = bytes(i * i % 251 for i in range(50_000))
SHA = hashlib.sha256(CONTENT).hexdigest()
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `files`; `cut` lists after how many bytes the next answers break off; `requests` notes path and range."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {"/file": CONTENT}
        self.ranges = True
        self.announce = True
        self.cut: list[int | None] = []
        self.requests: list[tuple[str, str | None]] = []

    def url(self, path: str = "/file") -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append((self.path, wanted))
        if self.path not in self.server.files:
            self.send_error(404)
            return
        body = self.server.files[self.path]
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted and self.server.ranges else 0
        if start >= len(body) > 0:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if self.server.announce:
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        cut = self.server.cut.pop(0) if self.server.cut else None
        self.wfile.write(body[start:] if cut is None else body[start : start + cut])
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test output clean."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(module, "BLOCK", 4096)
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


def test_whole_file_with_progress(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    path = download(
        [server.url()], tmp_path / "new" / "f", sha256=SHA, md5=MD5.upper(), size=len(CONTENT),
        on_progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert path.read_bytes() == CONTENT and [p.name for p in path.parent.iterdir()] == ["f"]
    assert seen[0] == (0, len(CONTENT)) and seen[-1] == (len(CONTENT), len(CONTENT)) and len(seen) > 3
    assert download([server.url()], path, sha256=SHA) == path and len(server.requests) == 1


def test_broken_connection_is_resumed_where_it_ended(server: Server, tmp_path: Path) -> None:
    server.cut = [10_000, 20_000]
    download([server.url()], tmp_path / "f", sha256=SHA)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert server.requests == [("/file", None), ("/file", "bytes=10000-"), ("/file", "bytes=30000-")]


def test_later_call_goes_on(server: Server, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int | None) -> None:
        if done >= 20_000:
            raise Stop

    with pytest.raises(Stop):
        download([server.url()], tmp_path / "f", sha256=SHA, on_progress=stop)
    kept = (tmp_path / "f.part").read_bytes()
    assert len(kept) >= 20_000 and CONTENT.startswith(kept) and not (tmp_path / "f").exists()
    download([server.url()], tmp_path / "f", sha256=SHA)
    assert server.requests[-1] == ("/file", f"bytes={len(kept)}-")
    assert (tmp_path / "f").read_bytes() == CONTENT and not (tmp_path / "f.part").exists()


def test_nothing_but_dead_connections_keeps_the_part(server: Server, tmp_path: Path) -> None:
    server.cut = [7_000, 0, 0, 0]
    with pytest.raises(DataError, match="7000 bytes are kept, call again.*broke off, 43000 bytes are missing"):
        download([server.url()], tmp_path / "f", sha256=SHA)
    download([server.url()], tmp_path / "f", sha256=SHA)
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_server_without_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    (tmp_path / "f.part").write_bytes(b"x" * 60_000)
    server.cut = [10_000]
    download([server.url()], tmp_path / "f", sha256=SHA)
    assert (tmp_path / "f").read_bytes() == CONTENT and len(server.requests) == 2


def test_server_that_announces_no_length(server: Server, tmp_path: Path) -> None:
    server.announce = False
    download([server.url()], tmp_path / "f", md5=MD5)
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_complete_part_is_only_checked(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(CONTENT)
    download([server.url()], tmp_path / "f", sha256=SHA)
    assert (tmp_path / "f").read_bytes() == CONTENT
    (tmp_path / "g.part").write_bytes(CONTENT)
    download(["http://127.0.0.1:9/"], tmp_path / "g", sha256=SHA, size=len(CONTENT))
    assert (tmp_path / "g").read_bytes() == CONTENT


@pytest.mark.parametrize("hashes", [{"sha256": "0" * 64}, {"md5": "0" * 32}, {"sha256": SHA, "md5": "0" * 32}])
def test_wrong_hash_is_refused_and_removed(server: Server, tmp_path: Path, hashes: dict[str, str]) -> None:
    with pytest.raises(DataError, match="not the expected one and was removed.*0000"):
        download([server.url()], tmp_path / "f", **hashes)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_stale_part_of_another_file_is_removed(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(b"stale")
    with pytest.raises(DataError, match="was removed"):
        download([server.url()], tmp_path / "f", sha256=SHA)
    assert download([server.url()], tmp_path / "f", sha256=SHA).read_bytes() == CONTENT


def test_wrong_size_is_refused_before_the_transfer(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected 10 bytes, the server offers 50000"):
        download([server.url()], tmp_path / "f", size=10)
    assert not (tmp_path / "f").exists()


def test_mirrors_are_tried_in_turn(server: Server, tmp_path: Path) -> None:
    server.files["/other"] = b"an error page"
    urls = ["ftp://127.0.0.1/file", server.url("/gone"), server.url("/other"), server.url()]
    assert download(urls, tmp_path / "f", sha256=SHA).read_bytes() == CONTENT
    with pytest.raises(DataError, match=r"(?s)http://.*/gone: the server answers 404.*/gone2: the server answers 404"):
        download([server.url("/gone"), server.url("/gone2")], tmp_path / "g", sha256=SHA)


def test_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    with pytest.raises(DataError, match="cannot download f: http://127.0.0.1:9/f: no connection"):
        download(["http://127.0.0.1:9/f"], tmp_path / "f", sha256=SHA)


def test_another_file_is_in_the_way(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"mine")
    with pytest.raises(DataError, match="exists and is not the file"):
        download([server.url()], tmp_path / "f", sha256=SHA)
    assert (tmp_path / "f").read_bytes() == b"mine" and server.requests == []


def test_folder_that_cannot_be_made(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        download([server.url()], tmp_path / "file" / "f", sha256=SHA)


def tar(path: Path, names: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for name, content in names.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return path


def test_unpacking(tmp_path: Path) -> None:
    extract_tar(tar(tmp_path / "a.tar", {"task/x.txt": b"hello"}), tmp_path / "out")
    assert (tmp_path / "out" / "task" / "x.txt").read_bytes() == b"hello"
    for number, name in enumerate(("../escaped.txt", "task/../../escaped.txt")):
        with pytest.raises(DataError, match="cannot unpack"):
            extract_tar(tar(tmp_path / f"{number}.tar", {name: b"bad"}), tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("escaped.txt"))
    whole = (tmp_path / "a.tar").read_bytes()
    for bad in (b"not a tar", whole[: len(whole) // 2]):
        (tmp_path / "bad.tar").write_bytes(bad)
        with pytest.raises(DataError, match="cannot unpack"):
            extract_tar(tmp_path / "bad.tar", tmp_path / "out2")


def test_damage_within_and_a_python_without_safe_unpacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tar(tmp_path / "a.tar", {"x": " ".join(map(str, range(100_000))).encode()})
    whole = path.read_bytes()
    for changed in (bytes(50), b"\xff" * 50, bytes([whole[5000] ^ 1])):  # some still decode, into something else
        path.write_bytes(whole[:5000] + changed + whole[5000 + len(changed) :])
        with pytest.raises(DataError, match="cannot unpack"):
            extract_tar(path, tmp_path / "out")
    monkeypatch.delattr("tarfile.data_filter")
    with pytest.raises(RunError, match=r"3\.10\.12"):
        extract_tar(path, tmp_path / "out")
