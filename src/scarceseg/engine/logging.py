"""What a run writes while it works: metrics.jsonl, TensorBoard events, and a progress display."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from scarceseg.engine.parallel import rank
from scarceseg.files import write_atomic, write_text

PICTURES = "pictures"
"""Folder of a run with what its terms drew."""


class Display:
    """Progress of one piece of work: a bar with the time left on a terminal, a plain line now and then elsewhere.

    Args:
        title: what is being done.
        start, total: finished and planned steps.
        every: seconds between plain lines.
    """

    def __init__(self, title: str, start: int, total: int, every: float = 30.0) -> None:
        self.title, self.start, self.total, self.every = title, start, total, every
        self._note = ""
        self._began = self._said = time.monotonic()
        self._bar: Progress | None = None
        console = Console(stderr=True)
        self._silent = rank() > 0
        if console.is_terminal and not self._silent:
            columns = (
                "{task.description}",
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                "left",
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=console)
            self._task = self._bar.add_task(title, total=total, completed=start, note="")

    def __enter__(self) -> Display:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Make room for the display of other work."""
        if self._bar:
            self._bar.stop()
        try:
            yield
        finally:
            if self._bar:
                self._bar.start()

    def resize(self, done: int, total: int, note: str) -> None:
        """Report `done` of a number of steps that is known only now."""
        if total != self.total:
            self.total = total
            if self._bar:
                self._bar.update(self._task, total=total)
        self.update(done, note=note)

    def update(self, done: int, loss: float | None = None, note: str | None = None) -> None:
        """Report `done` finished steps and, if known, the loss or another note."""
        if loss is not None:
            note = f"loss {loss:.4f}"
        self._note = note or self._note
        if self._bar:
            self._bar.update(self._task, completed=done, note=self._note)
            return
        if self._silent:
            return
        now = time.monotonic()
        if now - self._said >= self.every or done == self.total:
            self._said = now
            pace = (now - self._began) / max(done - self.start, 1)
            minutes, seconds = divmod(round(pace * (self.total - done)), 60)
            left = f"{minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d}"
            print(f"{self.title} {done}/{self.total} {self._note} left {left}", file=sys.stderr, flush=True)


def say_warnings(warnings: Sequence[str]) -> None:
    """Show warnings where the progress is shown, on the first process only."""
    if rank() == 0:
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr, flush=True)


class RunLog:
    """Numbers of a run, appended line by line to ``metrics.jsonl`` and to TensorBoard.

    Args:
        folder: the run's.
        active: False on all processes but the first: nothing is written.
    """

    def __init__(self, folder: Path, active: bool = True) -> None:
        self.path = folder / "metrics.jsonl"
        self.folder = folder
        self.active = active
        self._writer: Any = None

    def record(self, stage: str, iteration: int, values: dict[str, float]) -> None:
        """Append one line."""
        if not self.active:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"iteration": iteration, "stage": stage, **values}) + "\n")
        for key, value in values.items():
            self._tensorboard().add_scalar(f"{stage}/{key}", value, iteration)

    def has(self, stage: str, iteration: int) -> bool:
        """Whether a line of this stage and iteration is there."""
        return any(entry.get("iteration") == iteration for entry in self.entries(stage))

    def entries(self, stage: str) -> list[dict[str, Any]]:
        """Lines of one stage, in order."""
        if not self.path.exists():
            return []
        return [entry for _, entry in self._lines() if entry.get("stage") == stage]

    def _lines(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for line in self.path.read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):  # the last line of a killed process may be cut
                yield line, json.loads(line)

    def picture(self, stage: str, name: str, iteration: int, image: NDArray[Any]) -> None:
        """Keep an RGB picture ``[rows, columns, 3]`` uint8 as ``pictures/<stage>-<name>-<iteration>.png`` and in TensorBoard."""
        if not self.active:
            return
        path = self.folder / PICTURES / f"{stage}-{name}-{iteration:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda file: Image.fromarray(image).save(file, format="PNG"))
        self._tensorboard().add_image(f"{stage}/{name}", image, iteration, dataformats="HWC")

    def _tensorboard(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder / "tensorboard"))
        return self._writer

    def rewind(self, stage: str, iteration: int) -> None:
        """Drop the lines of `stage` from `iteration` on: a resumed run writes them again."""
        if not self.active or not self.path.exists():
            return
        kept = []
        for line, entry in self._lines():
            at = entry.get("iteration", 0)
            # A validation line carries the number of finished iterations, a training line its iteration.
            again = {stage: at >= iteration}
            if stage == "train":
                again["validation"] = at > iteration
            if again.get(str(entry.get("stage")), False):
                continue
            kept.append(line)
        write_text(self.path, "".join(f"{line}\n" for line in kept))

    @contextmanager
    def progress(self, title: str, start: int, total: int) -> Iterator[Display]:
        """A progress display for one stage."""
        with Display(title, start, total) as display:
            yield display

    def close(self) -> None:
        """Flush TensorBoard."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
