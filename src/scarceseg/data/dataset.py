"""A folder in nnU-Net raw layout -> its cases, and who of them is labelled, unlabelled or for validation in a run.

Whether a case has a label is read from the directory listing alone: label files are neither opened nor examined here.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scarceseg.data.formats import SUFFIXES, image_suffix
from scarceseg.errors import ConfigError, DataError, near_matches


@dataclass(frozen=True)
class Case:
    """One case of the dataset; `label` is None where ``labelsTr`` has no file for it. `images`: one file a channel."""

    name: str
    images: tuple[Path, ...]
    label: Path | None


@dataclass(frozen=True)
class UnlabelledCase:
    """A case whose label this run must not see: it has no label field, so nothing can follow it."""

    name: str
    images: tuple[Path, ...]


@dataclass(frozen=True)
class Dataset:
    """What ``dataset.json`` and the folders say.

    Attributes:
        folder: where it lies.
        name: of the dataset.
        channels: names of the image channels.
        classes: names; the position is the value in the label files, 0 is background.
        file_ending: such as ``.nii.gz``.
        cases: sorted by name.
        warnings: oddities that do no harm, such as a label without an image.
    """

    folder: Path
    name: str
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    file_ending: str
    cases: tuple[Case, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Split:
    """Who is what in one run.

    Attributes:
        labelled: cases whose label may be read; `label` is never None.
        unlabelled: every other training case.
        val: validation cases, in neither of the two; `label` is never None.
        warnings: what the user should know.
    """

    labelled: tuple[Case, ...]
    unlabelled: tuple[UnlabelledCase, ...]
    val: tuple[Case, ...]
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, list[str]]:
        """Case names by role, as saved in ``split.json``."""
        return {
            "labelled": [case.name for case in self.labelled],
            "unlabelled": [case.name for case in self.unlabelled],
            "val": [case.name for case in self.val],
        }

    def save(self, path: Path) -> None:
        """Write the case names by role."""
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path, dataset: Dataset) -> Split:
        """The saved split of `dataset`; cases added to the dataset since then stay out.

        Raises:
            DataError: the file is unreadable or not a split, or names a case the dataset does not have.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            roles = {role: [str(name) for name in values[role]] for role in ("labelled", "unlabelled", "val")}
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(f"{path}: expected case names under labelled, unlabelled and val; restore it") from None
        known = {case.name: case for case in dataset.cases}
        gone = [name for names in roles.values() for name in names if name not in known]
        if gone:
            raise DataError(f"{path} names cases that {dataset.folder} does not have: {_some(gone)}; restore them")
        return cls(
            tuple(_need_label(known[name], "labelled") for name in roles["labelled"]),
            tuple(UnlabelledCase(name, known[name].images) for name in roles["unlabelled"]),
            tuple(_need_label(known[name], "val") for name in roles["val"]),
        )


def load_dataset(folder: Path) -> Dataset:
    """Read ``dataset.json`` and list ``imagesTr`` and ``labelsTr``.

    nnU-Net's present keys (``channel_names``, ``labels`` by name, ``file_ending``) and its former ones (``modality``,
    ``labels`` by number, always ``.nii.gz``) are both read. A single channel may do without the ``_0000`` in its name.

    Raises:
        DataError: no such folder, ``dataset.json`` missing or wrong, no image, a missing channel, doubled names.
    """
    path = folder / "dataset.json"
    facts = _read_json(path)
    channels = _channels(facts, path)
    classes = _classes(facts, path)
    ending = facts.get("file_ending", ".nii.gz")
    if not isinstance(ending, str) or ending.lower() not in SUFFIXES:
        raise DataError(f"{path}: expected file_ending to be one of {', '.join(SUFFIXES)}, got {ending!r}")
    images = _group(folder / "imagesTr", ending, len(channels))
    listed = _listing(folder / "labelsTr", missing_ok=True)
    labels = {name[: -len(ending)] for name in listed if name.endswith(ending)}
    cases = tuple(
        Case(name, files, folder / "labelsTr" / f"{name}{ending}" if name in labels else None)
        for name, files in sorted(images.items())
    )
    warnings = []
    if stray := sorted(labels - images.keys()):
        warnings.append(f"{folder / 'labelsTr'} has labels without an image, which are left out: {_some(stray)}")
    for part, kind, names in (
        ("imagesTr", "images", _listing(folder / "imagesTr", missing_ok=False)),
        ("labelsTr", "labels", listed),
    ):
        if other := [name for name in names if not name.endswith(ending) and image_suffix(Path(name))]:
            warnings.append(
                f"{folder / part} has files that do not end in {ending} (file_ending of dataset.json) and are no {kind} "
                f"therefore: {_some(other)}"
            )
    name = facts.get("name")
    return Dataset(
        folder,
        name if isinstance(name, str) and name else folder.resolve().name,
        channels,
        classes,
        ending,
        cases,
        tuple(warnings),
    )


def make_split(dataset: Dataset, labeled: int | list[str] | None, val: list[str]) -> Split:
    """Decide who is labelled in this run.

    Args:
        dataset: all cases.
        labeled: how many labelled cases are kept (the first by name, validation cases left out), or their names, or
            None for all that have a label file. Every other case is unlabelled, whatever files it has.
        val: names of validation cases.

    Raises:
        ConfigError: unknown or doubled names, a case both labelled and validation, more labels asked for than there
            are, none asked for.
        DataError: no case has a label, or a chosen case has none.
    """
    known = {case.name: case for case in dataset.cases}
    _check_names("labeled", labeled if isinstance(labeled, list) else [], known)
    _check_names("val", val, known)
    kept_out = set(val)
    candidates = [case for case in dataset.cases if case.label is not None and case.name not in kept_out]
    if isinstance(labeled, list):
        if both := sorted(kept_out & set(labeled)):
            raise ConfigError(f"cases cannot be both labelled and for validation: {_some(both)}; remove them from one")
        chosen = [_need_label(known[name], "labeled") for name in sorted(labeled)]
    else:
        chosen = candidates if labeled is None else candidates[: max(labeled, 0)]
        if labeled is not None and candidates and not 1 <= labeled <= len(candidates):
            raise ConfigError(
                f"labeled: expected a number from 1 to {len(candidates)} (cases of {dataset.folder} with a label that "
                f"are not for validation), got {labeled}"
            )
    if not chosen:
        raise DataError(
            f"{dataset.folder} has no labelled case to train on: expected at least one file in labelsTr named like its "
            f"case, such as {dataset.cases[0].name}{dataset.file_ending}, that is not a validation case"
        )
    names = {case.name for case in chosen}
    unlabelled = tuple(
        UnlabelledCase(case.name, case.images) for case in dataset.cases if case.name not in names | kept_out
    )
    warnings = list(dataset.warnings)
    if not unlabelled:
        warnings.append(
            "there is no unlabelled case: every training case is labelled, so semi-supervised terms have nothing to add"
        )
    checked = tuple(_need_label(known[name], "val") for name in sorted(kept_out))
    return Split(tuple(chosen), unlabelled, checked, tuple(warnings))


def _check_names(role: str, names: list[str], known: Mapping[str, Case]) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"{role}: there is no case {name!r} in the dataset: {_near(name, known)}")
    if doubled := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError(f"{role}: cases are named twice: {_some(doubled)}; name each once")


def _near(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if len(names) <= 12:
        return near_matches(name, names)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"names run from {names[0]} to {names[-1]}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _need_label(case: Case, role: str) -> Case:
    if case.label is None:
        raise DataError(f"{role}: case {case.name!r} has no file in labelsTr; add its label or choose another case")
    return case


def _read_json(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise DataError(f"there is no dataset folder {path.parent}: check the path")
    if not path.is_file():
        raise DataError(
            f"{path.parent} is not a dataset: found no dataset.json; expected the nnU-Net raw layout (dataset.json, "
            "imagesTr, labelsTr)"
        )
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}; correct the JSON") from None
    if not isinstance(facts, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(facts).__name__}")
    return facts


def _channels(facts: dict[str, Any], path: Path) -> tuple[str, ...]:
    names = facts.get("channel_names", facts.get("modality"))
    if not isinstance(names, dict) or not names:
        raise DataError(f'{path}: expected channel_names such as {{"0": "MRI"}}, got {names!r}; add it')
    if sorted(names) != sorted(str(number) for number in range(len(names))):
        raise DataError(f"{path}: expected channel_names to be numbered from 0 without gaps, got {', '.join(names)}")
    return tuple(str(names[str(number)]) for number in range(len(names)))


def _classes(facts: dict[str, Any], path: Path) -> tuple[str, ...]:
    labels = facts.get("labels")
    if not isinstance(labels, dict) or not labels:
        raise DataError(f'{path}: expected labels such as {{"background": 0, "heart": 1}}, got {labels!r}; add it')
    if any(isinstance(value, list) for value in labels.values()):
        raise DataError(f"{path}: region-based labels (lists of values) are not supported; give each class one number")
    if "ignore" in labels:
        raise DataError(f"{path}: an 'ignore' label is not supported; remove it or complete the labels")
    try:
        if all(str(key).isdigit() for key in labels):  # nnU-Net v1: number -> name
            by_value = {int(key): str(name) for key, name in labels.items()}
        else:
            by_value = {_whole(value): str(name) for name, value in labels.items()}
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{path}: expected labels to give each class a whole number, got {labels!r}") from None
    if len(by_value) != len(labels) or sorted(by_value) != list(range(len(labels))):
        raise DataError(
            f"{path}: expected labels numbered 0 (background), 1, 2 ... without gaps or repeats, got {labels!r}; renumber "
            "the classes, here and in the label files (docs/how-to/own-data.md shows how)"
        )
    if not 2 <= len(by_value) <= 255:
        raise DataError(f"{path}: expected 2 to 255 classes with the background, got {len(by_value)}")
    return tuple(by_value[value] for value in range(len(by_value)))


def _whole(value: Any) -> int:
    number = int(value)
    if isinstance(value, float) and number != value:
        raise ValueError(f"{value} is no whole number")
    return number


def _listing(folder: Path, *, missing_ok: bool) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except FileNotFoundError:
        if missing_ok:
            return []
        raise DataError(f"{folder.parent} is not a dataset: expected a folder {folder.name} with the images") from None
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror}") from None


def _group(folder: Path, ending: str, channels: int) -> dict[str, tuple[Path, ...]]:
    """Image files by case, one a channel."""
    listing = _listing(folder, missing_ok=False)
    stems = [name[: -len(ending)] for name in listing if name.endswith(ending)]
    if not stems:
        others = sorted({suffix for name in listing if (suffix := image_suffix(Path(name)))})
        hint = f"; there are {', '.join(others)} files: set file_ending in dataset.json" if others else ""
        raise DataError(f"{folder}: expected images that end in {ending}, found none{hint}")
    numbered = channels > 1 or any(stem.endswith("_0000") for stem in stems)
    found: dict[str, dict[int, Path]] = {}
    for stem in stems:
        parts = re.fullmatch(r"(.+)_(\d{4})", stem) if numbered else None
        if numbered and parts is None:
            twice = f" (case {stem!r} is there twice)" if f"{stem}_0000" in stems else ""
            raise DataError(
                f"{folder / (stem + ending)}: expected a name like case_0000{ending} with the channel number last, "
                f"as other files here have{twice}; rename or remove it"
            )
        case, channel = (parts[1], int(parts[2])) if parts else (stem, 0)
        found.setdefault(case, {})[channel] = folder / f"{stem}{ending}"
    _check_groups(folder, found, channels)
    return {case: tuple(files[channel] for channel in range(channels)) for case, files in found.items()}


def _check_groups(folder: Path, found: Mapping[str, Mapping[int, Path]], channels: int) -> None:
    for case, files in found.items():
        if sorted(files) != list(range(channels)):
            have = _some([f"_{channel:04d}" for channel in sorted(files)])
            if channels == 1:  # case names may just end in such a number
                raise DataError(
                    f"{folder}: case {case!r} needs the channel _0000 alone (channel_names of dataset.json), found {have}; the "
                    "last four digits of a name are its channel: if they number your cases, add _0000 to every name "
                    f"({case}_0001 becomes {case}_0001_0000), else correct channel_names or remove files"
                )
            raise DataError(
                f"{folder}: case {case!r} needs the channels _0000 to _{channels - 1:04d} (channel_names of "
                f"dataset.json), found {have}; add the missing files or remove the case"
            )
    same = Counter(case.lower() for case in found)
    if doubled := [case for case in sorted(found) if same[case.lower()] > 1]:
        raise DataError(f"{folder}: case names must differ by more than capitals: {_some(doubled)}; rename them")
