"""BraTS19: whole tumour on FLAIR, in the HDF5 layout of the SSL4MIS repository."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scarceseg.data.catalogue.arrays import SpacingOptions, first_folder, h5_case, read_list, write_cases
from scarceseg.data.catalogue.base import DATASETS, PublicDataset


@dataclass(frozen=True)
class Brats19(PublicDataset):
    """250 training, 25 validation and 60 test cases; "25 labels" means the first 25 of ``train.txt``.

    The published preparation reads the volumes with the slice axis first; axes are kept as stored, because patches and
    rotations of the published runs follow them.
    """

    Options = SpacingOptions

    def write(self, src: Path, out: Path, options: SpacingOptions) -> None:
        """Read the three lists and ``data/NAME.h5`` of each case."""
        root = first_folder((src, src / "BraTS2019", src.parent), "train.txt", "val.txt", "test.txt", "data")
        if root is None:
            raise self.missing(src)
        cases = [
            h5_case(name, role, root / "data" / f"{name}.h5")
            for role in ("train", "val", "test")
            for name in read_list(root / f"{role}.txt")
        ]
        write_cases(self, src, out, cases, "brats", options.spacing_mm)


DATASETS.register("brats19")(
    Brats19(
        name="brats19",
        title="BraTS19: whole brain tumour, FLAIR MR",
        description=(
            "MICCAI 2019 brain tumour challenge, as published by SSL4MIS: FLAIR only, cropped to the brain, brightest "
            "0.1 % clipped, z-scored over the brain; tumour parts merged to one class. 1 mm voxels."
        ),
        licence="research use, terms of the challenge",
        source="https://github.com/HiLab-git/SSL4MIS/tree/master/data/BraTS2019",
        size="335 volumes (250 training, 25 validation, 60 test)",
        channels=("FLAIR",),
        classes=("background", "whole_tumour"),
        citation="Menze et al., IEEE TMI 34(10), 2015, doi:10.1109/TMI.2014.2377694; "
        "Bakas et al., Scientific Data 4, 2017, doi:10.1038/sdata.2017.117",
        layout="train.txt, val.txt, test.txt and the folder 'data' with NAME.h5",
    )
)
