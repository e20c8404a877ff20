"""Large files from the web: resumed after an interruption, checked against a hash, and never half there."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import platform
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from scarceseg.errors import DataError, RunError

try:
    from lzma import LZMAError
except ImportError:  # a Python that was built without it cannot read such archives either
    LZMAError = zlib.error  # type: ignore[misc, assignment]

Progress = Callable[[int, int | None], None]
"""Called with the bytes that are there and the bytes there will be (None when the server does not say)."""

BLOCK = 1 << 20
ATTEMPTS = 3
"""Tries of one address in a row that bring nothing, before the next address is asked."""


class _Failed(Exception):
    """One try failed; the message says why."""


class _Expected(NamedTuple):
    sha256: str | None
    md5: str | None
    size: int | None


def download(
    urls: Sequence[str],
    path: Path,
    *,
    sha256: str | None = None,
    md5: str | None = None,
    size: int | None = None,
    on_progress: Progress | None = None,
    timeout: float = 60.0,
) -> Path:
    """Fetch a file, trying each address in turn.

    Data goes to ``path`` + ``.part``, which a later call goes on with, and is moved to `path` when it is complete and
    has the right hash. A file that is at `path` already and has the right hash is not fetched again.

    Args:
        urls: http or https addresses of the same file, the preferred one first.
        path: where the file goes; its folder is made.
        sha256, md5: hexadecimal hashes to check; those given must match.
        size: expected length in bytes.
        on_progress: see `Progress`.
        timeout: seconds to wait for a sign of life.

    Returns:
        `path`.

    Raises:
        DataError: no address gave the file, it has another hash or size (what was fetched is then removed), or another
            file is at `path`.
        RunError: the file cannot be written.
    """
    expected = _Expected(sha256, md5, size)
    if path.exists():
        if problem := _mismatch(path, expected):
            raise DataError(
                f"{path} exists and is not the file to be fetched ({problem}): move it away, or choose another folder"
            )
        return path
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        reasons = []
        for url in urls:
            try:
                _fetch(url, part, expected, on_progress, timeout)
                os.replace(part, path)
                return path
            except _Failed as failure:
                reasons.append(f"{url}: {failure}")
    except OSError as error:
        raise RunError(
            f"cannot write {part} ({error.strerror or error}); check that the folder may be written to and has room"
        ) from None
    kept = f"; {part.stat().st_size} bytes are kept, call again to go on with them" if part.exists() else ""
    raise DataError(f"cannot download {path.name}{kept}: {'; '.join(reasons)}")


def extract_tar(archive: Path, folder: Path) -> None:
    """Unpack a tar file, compressed or not; names that would lead out of `folder`, links and devices are refused.

    Raises:
        DataError: not a tar file, damaged, or with such a name.
        RunError: the files cannot be written.
    """
    if not hasattr(tarfile, "data_filter"):
        raise RunError(
            f"cannot unpack {archive}: Python {platform.python_version()} has no safe way to; take 3.10.12, 3.11.4 or newer"
        )
    try:
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
            while file.fileobj is not None and file.fileobj.read(BLOCK):  # the checksum comes at the end
                pass
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, LZMAError) as error:
        raise DataError(f"cannot unpack {archive}: {error}; fetch it again") from None
    except OSError as error:
        raise RunError(
            f"cannot unpack {archive} into {folder} ({error.strerror or error}); check that there is room"
        ) from None


def _fetch(url: str, part: Path, expected: _Expected, on_progress: Progress | None, timeout: float) -> None:
    """Bring `part` to its full length and check it; a try that adds some bytes does not count against `ATTEMPTS`."""
    if not url.startswith(("http://", "https://")):
        raise _Failed("expected an address that starts with http:// or https://")
    tries = 0
    while True:
        before = _length(part)
        try:
            _transfer(url, part, expected.size, on_progress, timeout)
            break
        except _Failed:
            raise
        except (http.client.HTTPException, urllib.error.URLError, TimeoutError, ConnectionError) as error:
            tries = tries + 1 if _length(part) <= before else 0
            if tries >= ATTEMPTS:
                raise _Failed(_reason(error)) from None
            time.sleep(0.2 * 2**tries)
    if problem := _mismatch(part, expected):
        part.unlink()
        raise _Failed(f"the file is not the expected one and was removed ({problem})")


def _transfer(url: str, part: Path, size: int | None, on_progress: Progress | None, timeout: float) -> None:
    have = _length(part)
    if size is not None and have >= size:
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have:  # nothing lies beyond what we have; the hash will tell whether it is right
            return
        if error.code >= 500:
            raise
        raise _Failed(f"the server answers {error.code} {error.reason}") from None
    with response:
        if response.status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise _Failed("the server sent another part of the file than was asked for")
        start = have if response.status == 206 else 0  # a server without ranges starts over
        announced = response.headers.get("Content-Length")
        total = start + int(announced) if announced is not None and announced.isdigit() else size
        if size is not None and total != size:
            raise _Failed(f"expected {size} bytes, the server offers {total}")
        with part.open("r+b" if start else "wb") as file:
            file.seek(start)
            file.truncate()
            done = _copy(response, file, start, total, on_progress)
    if total is not None and done < total:
        raise http.client.IncompleteRead(b"", total - done)


def _copy(
    response: http.client.HTTPResponse, file: BinaryIO, done: int, total: int | None, on_progress: Progress | None
) -> int:
    if on_progress:
        on_progress(done, total)
    while block := response.read1(BLOCK):
        file.write(block)
        done += len(block)
        if on_progress:
            on_progress(done, total)
    return done


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _mismatch(path: Path, expected: _Expected) -> str | None:
    """What is wrong with a file, or None."""
    if expected.size is not None and path.stat().st_size != expected.size:
        return f"expected {expected.size} bytes, got {path.stat().st_size}"
    for name, wanted in (("sha256", expected.sha256), ("md5", expected.md5)):
        if wanted is None:
            continue
        digest = hashlib.new(name, usedforsecurity=False)
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
        if digest.hexdigest() != wanted.lower():
            return f"expected {name} {wanted}, got {digest.hexdigest()}"
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return f"no connection ({error.reason})"
    if isinstance(error, http.client.IncompleteRead):
        return f"the connection broke off, {error.expected} bytes are missing"
    return f"the connection broke off ({str(error) or type(error).__name__})"
