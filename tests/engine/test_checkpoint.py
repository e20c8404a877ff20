"""Files of a run are whole or not there."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest
import torch

from scarceseg import cli
from scarceseg.engine import run as run_module
from scarceseg.engine.checkpoint import load_checkpoint, save_checkpoint
from scarceseg.engine.logging import RunLog
from scarceseg.errors import RunError
from scarceseg.files import write_atomic, write_text
from tests.tiny import tiny_dataset


def test_a_full_disk_keeps_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"iteration": 1})

    def full(file: Path) -> None:
        file.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunError, match="No space left on device; free the disk"):
        write_atomic(path, full)
    assert load_checkpoint(path) == {"iteration": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    texts = ["a" * 200_000, "b" * 200_000]
    write_text(path, texts[0])
    stop = threading.Event()

    def keep_writing() -> None:
        while not stop.is_set():
            for text in texts:
                write_text(path, text)

    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        assert all(path.read_text() in texts for _ in range(200))
    finally:
        stop.set()
        writer.join()


def test_no_pickled_code_is_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("run",)

    torch.save({"x": Evil()}, tmp_path / "last.pt")
    with pytest.raises(RunError, match="cannot read the checkpoint"):
        load_checkpoint(tmp_path / "last.pt")
    with pytest.raises(RunError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "none.pt")


def test_a_disk_that_fills_during_training_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunLog, "record", full)
    command = ["train", str(tiny_dataset(tmp_path / "data")), "--labeled", "2", "--out", str(tmp_path / "run")]
    command += ["--patch", "16,16,16", "--spacing", "1", "--iterations", "2", "--set", "network.args.n_filters=1"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--precision", "fp32", "--set", "memory_format=contiguous"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "error: [Errno 28] No space left on device" in error
    assert "Traceback" not in error


def test_seeds_do_not_depend_on_what_was_drawn_before() -> None:
    generator = torch.Generator()
    run_module.seed_init(3)
    first = torch.rand(2)
    torch.rand(100)
    run_module.seed_init(3)
    assert torch.equal(first, torch.rand(2))
    from scarceseg.seeds import seed_step

    draws = {}
    for t in (0, 1, 0):
        seed_step(3, t, generator)
        draws.setdefault(t, []).append((torch.rand(1).item(), torch.rand(1, generator=generator).item()))
    assert draws[0][0] == draws[0][1] != draws[1][0]
