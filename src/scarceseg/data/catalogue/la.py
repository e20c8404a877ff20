"""LA: the left-atrium benchmark in the HDF5 layout of the UA-MT repository."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scarceseg.data.catalogue.arrays import Spacing, SpacingOptions, first_folder, h5_case, read_list, write_cases
from scarceseg.data.catalogue.base import DATASETS, PublicDataset

CASES = "2018LA_Seg_Training Set"


class LaOptions(SpacingOptions):
    """`spacing_mm`: that of the challenge, which the files do not hold."""

    spacing_mm: Spacing = (0.625, 0.625, 0.625)


@dataclass(frozen=True)
class LeftAtrium(PublicDataset):
    """80 training and 20 test cases; "4 labels" in the papers means the first four of ``train.list``."""

    Options = LaOptions

    def write(self, src: Path, out: Path, options: LaOptions) -> None:
        """Read ``train.list`` and ``test.list`` and the file ``mri_norm2.h5`` of each case."""
        root = first_folder((src, src / "data", src.parent), "train.list", "test.list", CASES)
        if root is None:
            raise self.missing(src)
        cases = [
            h5_case(name, role, root / CASES / name / "mri_norm2.h5")
            for role in ("train", "test")
            for name in read_list(root / f"{role}.list")
        ]
        write_cases(self, src, out, cases, "la", options.spacing_mm)


DATASETS.register("la")(
    LeftAtrium(
        name="la",
        title="LA: left atrium, late-gadolinium-enhanced MR",
        description=(
            "STACOM 2018 Atrial Segmentation Challenge, as published by UA-MT: z-scored, and cropped around the atrium "
            "in plane with the reference mask, so that results compare with the papers but say little of whole scans."
        ),
        licence="research use, terms of the challenge",
        source="https://github.com/yulequan/UA-MT",
        size="100 volumes (80 training, 20 test)",
        channels=("LGE-MRI",),
        classes=("background", "left_atrium"),
        citation="Xiong et al., Medical Image Analysis 67, 2021, doi:10.1016/j.media.2020.101832",
        layout=f"train.list, test.list and the folder '{CASES}' with NAME/mri_norm2.h5 (in it, or in its 'data')",
    )
)
