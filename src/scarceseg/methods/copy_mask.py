"""Copy: the labelled masks stretched onto every volume, which is what position alone tells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from scarceseg.atlas.warp import copy_label
from scarceseg.methods.base import METHODS
from scarceseg.methods.pseudo_labels import PseudoLabelTerm

if TYPE_CHECKING:
    from scarceseg.data.prepare import PreparedCase
    from scarceseg.engine.workspace import Workspace


@METHODS.register("copy")
class CopyMask(PseudoLabelTerm):
    """Pseudo-labels without a model: each labelled mask resized onto the unlabelled volume, and their mean. (ours)

    No image is looked at. Where volumes are cropped around the organ, as in the LA benchmark, this alone reaches a Dice that
    learning from few labels has to beat; on whole scans it means little.
    """

    def stages(self) -> list[str]:
        """The labels."""
        return ["label"]

    def prepare(self, stage: str, work: Workspace) -> None:
        """Label the pool."""
        self.guess(work, stage, list(work.unlabelled), atlases=[case.name for case in work.labelled])

    def probability_of(self, work: Workspace, case: PreparedCase) -> NDArray[np.float32]:
        """Mean of the stretched masks ``[K, X, Y, Z]``."""
        total: NDArray[np.float32] | None = None
        for atlas in work.labelled:
            assert atlas.label is not None
            share = copy_label(np.asarray(atlas.label), atlas.geometry, case.geometry, work.classes)
            total = share if total is None else total + share
        assert total is not None
        mean: NDArray[np.float32] = total / np.float32(len(work.labelled))
        return mean
