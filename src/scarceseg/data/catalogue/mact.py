"""MACT: eight abdominal organs on CT, in the HDF5 layout of the MagicNet repository."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field

from scarceseg.data.catalogue.arrays import SpacingOptions, first_folder, h5_case, write_cases
from scarceseg.data.catalogue.base import DATASETS, PublicDataset

CASES, FOLDS, TRAINING, TEST, SEED = 90, 4, 66, 22, 1337


class MactOptions(SpacingOptions):
    """Options of the conversion.

    `fold`: part of the published four-fold cross-validation, 1 to 4.
    `spacing_mm`: a placeholder, since the files do not hold the spacing.
    """

    fold: int = Field(1, ge=1, le=FOLDS)


def fold_split(fold: int) -> tuple[list[int], list[int]]:
    """Training and test cases of a fold, as numbers 1 to 90, at most 66 and 22.

    Cases are shuffled and cut into four parts as scikit-learn's ``KFold(4, shuffle=True, random_state=1337)`` does. The
    published script then shuffles the training part once more before it counts off the labelled cases and leaves out
    those beyond 66. Only in the first fold does that not depend on how long training took: there order and choice are
    the published ones. In the others the order is ascending, and the one or two cases left out are the last.
    """
    order = np.arange(CASES)
    np.random.RandomState(SEED).shuffle(order)
    test = np.sort(np.array_split(order, FOLDS)[fold - 1])
    training = np.setdiff1d(order, test)
    if fold == 1:
        np.random.RandomState(SEED).shuffle(training)
    return (training[:TRAINING] + 1).tolist(), (test[:TEST] + 1).tolist()


@dataclass(frozen=True)
class Mact(PublicDataset):
    """66 training and 22 test cases of one fold."""

    Options = MactOptions

    def write(self, src: Path, out: Path, options: MactOptions) -> None:
        """Read ``MACT_h5/0001.h5`` ..."""
        root = first_folder((src, src / "data", src.parent), "MACT_h5")
        if root is None:
            raise self.missing(src)
        training, test = fold_split(options.fold)
        cases = [h5_case(f"{n:04d}", "train", root / "MACT_h5" / f"{n:04d}.h5") for n in training]
        cases += [h5_case(f"{n:04d}", "test", root / "MACT_h5" / f"{n:04d}.h5") for n in test]
        write_cases(self, src, out, cases, "mact", options.spacing_mm)


DATASETS.register("mact")(
    Mact(
        name="mact",
        title="MACT: eight abdominal organs, CT",
        description=(
            "Multi-organ abdominal CT reference standard segmentations (volumes of TCIA Pancreas-CT and BTCV), as "
            "published by MagicNet. The voxel spacing is not stored: 1 mm is written, and distances are in voxels."
        ),
        licence="terms of TCIA Pancreas-CT, BTCV and the page of the segmentations",
        source="https://github.com/DeepMed-Lab-ECNU/MagicNet",
        size="90 volumes (66 training, 22 test in each of four folds)",
        channels=("CT",),
        classes=(
            "background",
            "spleen",
            "left_kidney",
            "gallbladder",
            "esophagus",
            "liver",
            "stomach",
            "pancreas",
            "duodenum",
        ),
        citation="Gibson et al., IEEE TMI 37(8), 2018, doi:10.1109/TMI.2018.2806309; doi:10.5281/zenodo.1169361",
        layout="the folder 'MACT_h5' with 0001.h5 to 0090.h5 (in it, or in its folder 'data')",
    )
)
