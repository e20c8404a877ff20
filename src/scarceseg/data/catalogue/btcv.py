"""BTCV: thirteen abdominal organs on CT, in the HDF5 layout of the MagicNet repository."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scarceseg.data.catalogue.arrays import Spacing, SpacingOptions, first_folder, h5_case, read_list, write_cases
from scarceseg.data.catalogue.base import DATASETS, PublicDataset
from scarceseg.errors import DataError

TRAINING, SEED = 18, 1337

ORGANS = (
    "background",
    "spleen",
    "right_kidney",
    "left_kidney",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior_vena_cava",
    "portal_and_splenic_vein",
    "pancreas",
    "right_adrenal_gland",
    "left_adrenal_gland",
)


class BtcvOptions(SpacingOptions):
    """`spacing_mm`: that of the published resampling, which the files do not hold."""

    spacing_mm: Spacing = (1.5, 1.5, 2.0)


@dataclass(frozen=True)
class Btcv(PublicDataset):
    """18 training and 12 test cases.

    The published script takes the first 18 of ``btcv.txt`` for training and shuffles them with NumPy's legacy generator
    and seed 1337 before it counts off the labelled ones. The same is done here, so that "7 labels" are the same cases.
    """

    Options = BtcvOptions

    def write(self, src: Path, out: Path, options: BtcvOptions) -> None:
        """Read ``btcv.txt`` and ``btcv_h5/0001.h5`` ..."""
        root = first_folder((src, src / "data", src.parent), "btcv.txt", "btcv_h5")
        if root is None:
            raise self.missing(src)
        names = [name.split(".")[0][-4:] for name in read_list(root / "btcv.txt")]
        if len(names) <= TRAINING:
            raise DataError(
                f"{root / 'btcv.txt'}: expected 30 cases, {TRAINING} of them for training, got {len(names)}"
            )
        training, test = names[:TRAINING], names[TRAINING:]
        np.random.RandomState(SEED).shuffle(training)
        cases = [h5_case(name, "train", root / "btcv_h5" / f"{name}.h5") for name in training]
        cases += [h5_case(name, "test", root / "btcv_h5" / f"{name}.h5") for name in test]
        write_cases(self, src, out, cases, "btcv", options.spacing_mm)


DATASETS.register("btcv")(
    Btcv(
        name="btcv",
        title="BTCV: thirteen abdominal organs, CT",
        description=(
            "Multi-atlas labelling challenge 2015 (Synapse), as published by MagicNet: resampled to 1.5x1.5x2 mm, "
            "z-scored."
        ),
        licence="research use, terms of the challenge (account at Synapse)",
        source="https://github.com/DeepMed-Lab-ECNU/MagicNet",
        size="30 volumes (18 training, 12 test)",
        channels=("CT",),
        classes=ORGANS,
        citation="Landman et al., MICCAI Multi-Atlas Labeling Beyond the Cranial Vault, 2015, doi:10.7303/syn3193805",
        layout="btcv.txt and the folder 'btcv_h5' with 0001.h5 ... (in it, or in its folder 'data')",
    )
)
