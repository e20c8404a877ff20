"""Tasks of the Medical Segmentation Decathlon, openly downloadable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import SimpleITK as sitk

from scarceseg.config import Section
from scarceseg.data.catalogue.base import DATASETS, Archive, PublicDataset
from scarceseg.errors import DataError


@dataclass(frozen=True)
class Decathlon(PublicDataset):
    """A task as its tar file holds it: ``dataset.json``, ``imagesTr``, ``labelsTr``, ``imagesTs``.

    Volumes of several channels are 4D there and become one file a channel; everything else is copied as it is. Names
    and their order are kept. Test cases have no label. Hidden files (``._NAME``) are left out, since only files that
    ``dataset.json`` lists are looked at.
    """

    def write(self, src: Path, out: Path, options: Section) -> None:
        """Follow the lists of the task's ``dataset.json``."""
        root = self._root(src)
        training, test = self._lists(root)
        for folder in ("imagesTr", "labelsTr", *(("imagesTs",) if test else ())):
            (out / folder).mkdir()
        for image, label in training:
            self._write_image(root / image, out / "imagesTr")
            shutil.copyfile(self._there(root / label), out / "labelsTr" / f"{_case(Path(image))}.nii.gz")
        for image in test:
            self._write_image(root / image, out / "imagesTs")
        self.write_json(out, len(training), {})

    def _root(self, src: Path) -> Path:
        """The folder with ``dataset.json``: `src`, or the one task folder in it."""
        candidates = [src, *sorted(path for path in src.iterdir() if path.is_dir() and not path.name.startswith("."))]
        found = [path for path in candidates if (path / "dataset.json").is_file() and (path / "imagesTr").is_dir()]
        if not found:
            raise self.missing(src)
        if len(found) > 1 and found[0] != src:
            raise self.missing(src, f"there is more than one task: {', '.join(path.name for path in found)}")
        return found[0]

    def _lists(self, root: Path) -> tuple[list[tuple[str, str]], list[str]]:
        path = root / "dataset.json"
        try:
            facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            training = [(str(pair["image"]), str(pair["label"])) for pair in facts["training"]]
            test = [str(item["image"] if isinstance(item, dict) else item) for item in facts.get("test", [])]
            channels = [str(facts["modality"][key]) for key in sorted(facts["modality"], key=int)]
            classes = [str(facts["labels"][key]) for key in sorted(facts["labels"], key=int)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise DataError(
                f"{path}: expected the dataset.json of a Decathlon task, with modality, labels, training and test; "
                f"fetch the task again from {self.source}"
            ) from None
        if (len(channels), len(classes)) != (len(self.channels), len(self.classes)):
            raise DataError(
                f"{path} is another task: expected {len(self.channels)} channel(s) and the classes "
                f"{', '.join(self.classes)}, got {len(channels)} and {', '.join(classes)}"
            )
        return training, test

    def _there(self, path: Path) -> Path:
        if not path.is_file():
            raise self.missing(path.parent.parent, f"there is no {path}, which dataset.json lists")
        return path

    def _write_image(self, path: Path, folder: Path) -> None:
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(self._there(path)))
        try:
            reader.ReadImageInformation()
            if reader.GetDimension() == 3 and len(self.channels) == 1:
                shutil.copyfile(path, folder / f"{_case(path)}_0000.nii.gz")
                return
            parts = _split(reader.Execute())
        except RuntimeError:
            raise DataError(f"cannot read {path}: it is damaged or no NIfTI file; fetch the task again") from None
        if len(parts) != len(self.channels):
            raise DataError(
                f"{path}: expected {len(self.channels)} channels ({', '.join(self.channels)}), got {len(parts)}"
            )
        for channel, part in enumerate(parts):
            sitk.WriteImage(part, str(folder / f"{_case(path)}_{channel:04d}.nii.gz"), useCompression=True)


def _split(image: sitk.Image) -> Sequence[sitk.Image]:
    if image.GetDimension() != 4:
        return [image]
    return [image[:, :, :, channel] for channel in range(image.GetSize()[3])]


def _case(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


def _register(
    name: str,
    task: str,
    md5: str,
    title: str,
    size: str,
    channels: tuple[str, ...],
    classes: tuple[str, ...],
) -> None:
    """Enter a task; addresses and MD5 sums are those MONAI publishes for its DecathlonDataset."""
    DATASETS.register(name)(
        Decathlon(
            name=name,
            title=title,
            description=f"Medical Segmentation Decathlon, {task}. Test cases have no labels.",
            licence="CC BY-SA 4.0",
            source="http://medicaldecathlon.com",
            size=size,
            channels=channels,
            classes=("background", *classes),
            citation="Simpson et al., arXiv:1902.09063, 2019; Antonelli et al., Nature Communications 13, 2022",
            layout=f"the unpacked folder {task} with dataset.json, imagesTr and labelsTr",
            archive=Archive((f"https://msd-for-monai.s3-us-west-2.amazonaws.com/{task}.tar",), md5=md5),
        )
    )


_register(
    "msd-heart",
    "Task02_Heart",
    "06ee59366e1e5124267b774dbd654057",
    "Decathlon: left atrium, MR",
    "30 volumes (20 training, 10 test), about 0.4 GB",
    ("MRI",),
    ("left_atrium",),
)
_register(
    "msd-hippocampus",
    "Task04_Hippocampus",
    "9d24dba78a72977dbd1d2e110310f31b",
    "Decathlon: hippocampus, MR",
    "390 volumes (260 training, 130 test), about 30 MB",
    ("MRI",),
    ("anterior", "posterior"),
)
_register(
    "msd-prostate",
    "Task05_Prostate",
    "35138f08b1efaef89d7424d2bcc928db",
    "Decathlon: prostate zones, MR",
    "48 volumes (32 training, 16 test), about 0.2 GB",
    ("T2", "ADC"),
    ("peripheral_zone", "transition_zone"),
)
_register(
    "msd-spleen",
    "Task09_Spleen",
    "410d4a301da4e5b2f6f86ec3ddba524e",
    "Decathlon: spleen, CT",
    "61 volumes (41 training, 20 test), about 1.5 GB",
    ("CT",),
    ("spleen",),
)
_register(
    "msd-brain-tumour",
    "Task01_BrainTumour",
    "240a19d752f0d9e9101544901065d872",
    "Decathlon: brain tumour parts, MR",
    "750 volumes (484 training, 266 test), about 7 GB",
    ("FLAIR", "T1w", "T1gd", "T2w"),
    ("oedema", "non_enhancing_tumour", "enhancing_tumour"),
)
_register(
    "msd-pancreas",
    "Task07_Pancreas",
    "4f7080cfca169fa8066d17ce6eb061e4",
    "Decathlon: pancreas and its tumours, CT",
    "420 volumes (281 training, 139 test), about 12 GB",
    ("CT",),
    ("pancreas", "tumour"),
)
