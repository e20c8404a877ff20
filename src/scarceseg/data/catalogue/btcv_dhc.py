"""BTCV in the NumPy layout of the DHC repository, where all volumes are resized to one shape."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scarceseg.data.catalogue.arrays import Role, SpacingOptions, first_folder, npy_case, read_list, write_cases
from scarceseg.data.catalogue.base import DATASETS, PublicDataset
from scarceseg.data.catalogue.btcv import ORGANS


class DhcOptions(SpacingOptions):
    """Options of the conversion.

    `labeled_percent`: which published list of labelled cases comes first.
    `spacing_mm`: a placeholder; the resizing has made the true one differ from case to case.
    """

    labeled_percent: Literal[10, 20, 40] = 20


@dataclass(frozen=True)
class BtcvDhc(PublicDataset):
    """20 training, 4 validation and 6 test cases.

    Labelled cases have a list of their own; they come first, so that ``--labeled 4`` means the four of
    ``labeled_20p.txt``. Arrays are stored ``[Z, Y, X]`` and turned to ``[X, Y, Z]``.
    """

    Options = DhcOptions

    def write(self, src: Path, out: Path, options: DhcOptions) -> None:
        """Read ``splits/*.txt``, ``npy/NAME_image.npy`` and ``npy/NAME_label.npy``."""
        share = f"{options.labeled_percent}p.txt"
        lists = ("npy", f"splits/labeled_{share}", f"splits/unlabeled_{share}", "splits/eval.txt", "splits/test.txt")
        root = first_folder((src, src / "synapse_data", src.parent), *lists)
        if root is None:
            raise self.missing(src)
        folder = root / "npy"
        parts: tuple[tuple[Role, tuple[str, ...]], ...] = (
            ("train", lists[1:3]),
            ("val", lists[3:4]),
            ("test", lists[4:]),
        )
        cases = [
            npy_case(name, role, folder / f"{name}_image.npy", folder / f"{name}_label.npy")
            for role, files in parts
            for file in files
            for name in read_list(root / file)
        ]
        write_cases(self, src, out, cases, "btcv", options.spacing_mm)


DATASETS.register("btcv-dhc")(
    BtcvDhc(
        name="btcv-dhc",
        title="BTCV: thirteen abdominal organs, CT, resized to 160x160x80",
        description=(
            "Multi-atlas labelling challenge 2015 (Synapse), as published by DHC: every volume resized to 160x160x80 "
            "voxels, Hounsfield units. The voxel spacing is lost: 1 mm is written, and distances are in voxels."
        ),
        licence="research use, terms of the challenge (account at Synapse)",
        source="https://github.com/xmed-lab/DHC",
        size="30 volumes (20 training, 4 validation, 6 test)",
        channels=("CT",),
        classes=ORGANS,
        citation="Landman et al., MICCAI Multi-Atlas Labeling Beyond the Cranial Vault, 2015, doi:10.7303/syn3193805",
        layout="the folders 'splits' (labeled_20p.txt, unlabeled_20p.txt, eval.txt, test.txt) and 'npy' "
        "(NAME_image.npy, NAME_label.npy)",
    )
)
