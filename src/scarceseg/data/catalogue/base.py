"""What is known of a public dataset, and the frame of its conversion to nnU-Net raw layout."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ValidationError

from scarceseg.config import Section, one_line
from scarceseg.data.download import Progress, download, extract_tar
from scarceseg.errors import ConfigError, DataError, RunError
from scarceseg.registry import Registry


@dataclass(frozen=True)
class Archive:
    """A tar file on the web.

    Attributes:
        urls: addresses of the same file, the preferred one first.
        sha256, md5: what its owner or a widely used library publishes; at least one.
        size: in bytes, where known.
    """

    urls: tuple[str, ...]
    sha256: str | None = None
    md5: str | None = None
    size: int | None = None


@dataclass(frozen=True)
class PublicDataset(ABC):
    """One public dataset. A file of this folder makes an instance and registers it in `DATASETS`.

    Attributes:
        name: as the user types it.
        title: a line for tables.
        description: what the images show and how the published files were prepared.
        licence: of the data.
        source: page to get the data from.
        size: text such as "100 volumes (80 / 20)".
        channels: names of the image channels.
        classes: names by label value, background first.
        citation: of the data.
        layout: files `convert` expects, for messages.
        archive: None where the data cannot be had without an account or a request.
    """

    name: str
    title: str
    description: str
    licence: str
    source: str
    size: str
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    citation: str
    layout: str
    archive: Archive | None = None

    Options: ClassVar[type[Section]] = Section

    @abstractmethod
    def write(self, src: Path, out: Path, options: Any) -> None:
        """Fill the empty folder `out` from the published files in `src`.

        Raises:
            DataError: files are missing (`missing` makes the message) or are not what they should be.
        """

    def convert(self, src: Path, dst: Path, **options: Any) -> Path:
        """Convert the published files to nnU-Net raw layout.

        The order of the benchmark's list is kept in the new names (``la_000`` ...), so that the first N labelled cases
        are those of the published tables; ``names.json`` gives the original name of each.

        Args:
            src: folder with the published files.
            dst: folder to make; it appears only when everything is converted.
            options: of this dataset, see its `Options`.

        Raises:
            ConfigError: an option that the dataset does not have, or a wrong value.
            DataError: `src` does not hold the expected files, or one is damaged.
            RunError: `dst` is taken or cannot be written.
        """
        try:
            chosen = self.Options.model_validate(options)
        except ValidationError as error:
            raise ConfigError(f"dataset {self.name}: {one_line(error, self.Options)}") from None
        check_free(dst)
        if not src.is_dir():
            raise self.missing(src)
        try:
            dst.absolute().parent.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=f".{dst.name}.", dir=dst.absolute().parent))
        except OSError as error:
            raise RunError(f"cannot make {dst} ({error.strerror or error}); choose another folder") from None
        try:
            out = scratch / "dataset"
            out.mkdir()
            self.write(src, out, chosen)
            if dst.exists():
                dst.rmdir()
            os.replace(out, dst)
        except OSError as error:
            raise RunError(f"cannot write {dst} ({error.strerror or error}); check that there is room") from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return dst

    def get(self, dst: Path, on_progress: Progress | None = None) -> Path:
        """Download and convert the dataset. An interrupted download, kept beside `dst`, is gone on with.

        Raises:
            DataError: the data is not openly available, the download fails or is not the expected file.
            RunError: `dst` is taken or cannot be written.
        """
        if self.archive is None:
            raise DataError(
                f"{self.name} cannot be downloaded without its owners' consent: get it from {self.source}, then run "
                f"'scarceseg datasets convert {self.name} SRC DST'; SRC holds {self.layout}"
            )
        check_free(dst)
        file = dst.absolute().parent / self.archive.urls[0].rsplit("/", 1)[-1]
        archive = self.archive
        download(archive.urls, file, sha256=archive.sha256, md5=archive.md5, size=archive.size, on_progress=on_progress)
        unpacked = Path(tempfile.mkdtemp(prefix=f".{file.name}.", dir=file.parent))
        try:
            extract_tar(file, unpacked)
            self.convert(unpacked, dst)
        finally:
            shutil.rmtree(unpacked, ignore_errors=True)
        file.unlink()
        return dst

    def missing(self, src: Path, detail: str = "") -> DataError:
        """The error for a folder without the published files: what was expected and what is there."""
        there = sorted(path.name for path in src.iterdir() if not path.name.startswith(".")) if src.is_dir() else None
        found = "no such folder" if there is None else f"it holds {', '.join(there[:8]) or 'nothing'}"
        found += " ..." if there and len(there) > 8 else ""
        return DataError(f"{src}: expected {self.layout}; {detail or found}. Source: {self.source}")

    def write_json(self, out: Path, training: int, names: Mapping[str, str]) -> None:
        """Write ``dataset.json`` and, where cases were renamed, ``names.json`` (new name -> published name)."""
        facts = {
            "channel_names": {str(i): name for i, name in enumerate(self.channels)},
            "labels": {name: value for value, name in enumerate(self.classes)},
            "numTraining": training,
            "file_ending": ".nii.gz",
            "name": self.name,
            "description": self.title,
            "reference": self.source,
            "licence": self.licence,
        }
        (out / "dataset.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        if names:
            (out / "names.json").write_text(json.dumps(dict(names), indent=1) + "\n", encoding="utf-8")


def check_free(dst: Path) -> None:
    """Refuse a folder that is taken.

    Raises:
        RunError: it exists and is not an empty folder.
    """
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise RunError(f"{dst} exists and is not empty: choose another folder")


DATASETS: Registry[PublicDataset] = Registry("dataset", "scarceseg.data.catalogue")
"""Every public dataset we know, by name."""
