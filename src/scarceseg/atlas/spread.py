"""Independent jobs over worker processes, with progress; the results do not depend on how many there are."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

import SimpleITK as sitk
import torch

Job = TypeVar("Job")
Result = TypeVar("Result")
Progress = Callable[[int, int, str], None]


def count_workers(workers: int | None) -> int:
    """`workers`, or this process's share of the cores it may use, others being for those that ``torchrun`` started beside it."""
    if workers is not None:
        return max(workers, 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // _beside(), 1)


def at_once(largest: float, memory: int | None = None) -> int | None:
    """How many jobs of `largest` bytes fit into the free memory, one at least; None where the system does not tell.

    It is shared with the other processes that ``torchrun`` started here.

    Args:
        largest: bytes of a job.
        memory: free bytes; None asks the system.
    """
    if memory is None:
        memory = free_memory()
    return None if memory is None else max(int(memory // largest // _beside()), 1)


def _beside() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def free_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this process and those it starts may still take: of the machine, or of the container or job it is in.

    Args:
        proc, groups: where Linux tells of processes and of their groups, which have limits.
    """
    found = re.search(r"^MemAvailable: *(\d+) kB", _text(proc / "meminfo"), flags=re.MULTILINE)
    free = [1024 * int(found[1])] if found else []
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, kinds, path = line.split(":", 2)
        if not kinds:
            root, names = groups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            root, names = groups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        here = root / path.lstrip("/")
        for folder in [one for one in (here, *here.parents) if one.is_relative_to(root)]:
            most, used = (_text(folder / name).strip() for name in names[:2])
            if most.isdigit() and used.isdigit():  # not "max"
                kept = re.search(rf"^{names[2]} (\d+)", _text(folder / "memory.stat"), flags=re.MULTILINE)
                free.append(max(int(most) - int(used) + (int(kept[1]) if kept else 0), 0))  # copies of files can go
    return min(free, default=None)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""


class Spread:
    """A pool of processes that is started with the first job that needs one.

    With one worker everything happens in the calling process. When worker processes die (too little memory, or a
    script without a ``__main__`` guard), the work goes on in the calling process, with a warning.
    """

    def __init__(self, workers: int, total: int, on_progress: Progress | None) -> None:
        self.workers = workers
        self.total = total
        self.done = 0
        self._on_progress = on_progress
        self._pool: ProcessPoolExecutor | None = None
        self._broken = False

    def __enter__(self) -> Spread:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def run(
        self,
        function: Callable[[Job], None],
        jobs: Sequence[Job],
        is_done: Callable[[Job], bool],
        text: Callable[[Job], str],
        most: int | None = None,
    ) -> None:
        """Do the jobs that are not done yet, at `most` so many at the same time."""
        waiting = [job for job in jobs if not is_done(job)]
        self.done += len(jobs) - len(waiting)
        for _ in self.results(function, waiting, text, most):
            pass

    def results(
        self,
        function: Callable[[Job], Result],
        jobs: Sequence[Job],
        text: Callable[[Job], str],
        most: int | None = None,
    ) -> Iterator[Result]:
        """Results in the order of the jobs; a few are made ahead, at `most` so many at the same time."""
        for job, result in zip(jobs, self._results(function, jobs, most), strict=True):
            self.done += 1
            if self._on_progress:
                self._on_progress(self.done, self.total, text(job))
            yield result

    def _results(self, function: Callable[[Job], Result], jobs: Sequence[Job], most: int | None) -> Iterator[Result]:
        ahead = self.workers + 1 if most is None else min(self.workers + 1, most)
        if self.workers == 1 or len(jobs) < 2 or ahead == 1:
            yield from map(function, jobs)
            return
        waiting: deque[tuple[Job, Future[Result] | None]] = deque()
        for job in jobs:
            waiting.append((job, self._submit(function, job)))
            if len(waiting) >= ahead:
                yield self._result(function, *waiting.popleft())
        while waiting:
            yield self._result(function, *waiting.popleft())

    def _submit(self, function: Callable[[Job], Result], job: Job) -> Future[Result] | None:
        if self._pool is None and not self._broken:
            # Started afresh and not forked: a copy of a process that has threads may hang.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.workers, mp_context=context, initializer=_start_worker)
        try:
            return self._pool.submit(function, job) if self._pool is not None else None
        except BrokenProcessPool:
            return None

    def _result(self, function: Callable[[Job], Result], job: Job, future: Future[Result] | None) -> Result:
        if future is not None:
            try:
                return future.result()
            except BrokenProcessPool:
                self._give_up_processes()
        return function(job)

    def _give_up_processes(self) -> None:
        if self._broken:
            return
        self._broken = True
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=False)
            self._pool = None
        warnings.warn(
            'worker processes ended early (too little memory, or a script without an `if __name__ == "__main__":` '
            "guard); going on in one process",
            stacklevel=2,
        )


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the first process decides what happens
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    torch.set_num_threads(1)
