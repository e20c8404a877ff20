"""Public datasets, one file each: where they come from, and how their published files become nnU-Net raw layout.

In: a dataset's name, and a folder with its published files or a place to download them to. Out: a folder with
``dataset.json``, ``imagesTr``, ``labelsTr`` (and ``imagesTs``, ``labelsTs``) that `scarceseg train` reads, cases named
in the order of the benchmark's list. To add one, drop a file here that registers a `PublicDataset`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from scarceseg.data import download
from scarceseg.data.catalogue.base import DATASETS, Archive, PublicDataset

__all__ = ["DATASETS", "Archive", "PublicDataset", "convert_dataset", "get_dataset", "list_datasets", "print_datasets"]


def list_datasets() -> list[PublicDataset]:
    """Every known dataset, by name."""
    return [DATASETS.get(name) for name in DATASETS.names()]


def print_datasets(console: Console | None = None) -> None:
    """Show the known datasets, and whether they are downloaded by `get` or converted from the user's files."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("name", "what", "size", "classes", "by", "licence"):
        table.add_column(heading, overflow="fold")
    for dataset in list_datasets():
        how = "convert" if dataset.archive is None else "get"
        table.add_row(dataset.name, dataset.title, dataset.size, str(len(dataset.classes) - 1), how, dataset.licence)
    (console or Console()).print(table)


def convert_dataset(name: str, src: Path, dst: Path, **options: Any) -> Path:
    """Convert the published files of a benchmark to nnU-Net raw layout.

    Args:
        name: of the dataset.
        src: folder with the published files.
        dst: folder to make.
        options: of the dataset, such as ``spacing_mm`` or ``fold``.

    Returns:
        `dst`.

    Raises:
        ConfigError: unknown name (near matches are listed) or option.
        DataError: `src` does not hold the expected files, or one is damaged.
        RunError: `dst` exists and is not empty, or cannot be written.
    """
    return DATASETS.get(name).convert(src, dst, **options)


def get_dataset(name: str, folder: Path, on_progress: download.Progress | None = None) -> Path:
    """Download an openly available dataset and convert it to ``folder/NAME``.

    An interrupted download is kept in `folder` and gone on with by the next call.

    Args:
        name: of the dataset.
        folder: where the dataset's own folder is made.
        on_progress: called with the bytes that are there and that there will be; None shows a bar in a terminal.

    Returns:
        ``folder/NAME``.

    Raises:
        ConfigError: unknown name; near matches are listed.
        DataError: the dataset is not openly available, cannot be fetched, or is not the expected file.
        RunError: ``folder/NAME`` exists and is not empty, or cannot be written.
    """
    dataset = DATASETS.get(name)
    if on_progress is not None:
        return dataset.get(folder / name, on_progress)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=None)
        return dataset.get(folder / name, lambda done, total: bar.update(task, completed=done, total=total))
