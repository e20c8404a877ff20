"""Labelled volumes as atlases: registered to a volume without a label, their masks carried over and fused.

In: prepared volumes with their grids. Out: class probabilities, and the agreement of the atlases as confidence. One pair
is aligned in `register` (`affine`, then `deform`; `frame` says in which coordinates), carried over in `warp`, several
are fused in `fuse`, and `teacher` does it for many targets in parallel processes, cached. `copy_labels` is the
yardstick beside it: masks resized, no image looked at.
"""

from scarceseg.atlas.fuse import Fusion
from scarceseg.atlas.register import Registration
from scarceseg.atlas.teacher import AtlasLabel, AtlasOptions, ExpectedDice, atlas_labels, copy_labels, expected_dice

__all__ = [
    "AtlasLabel",
    "AtlasOptions",
    "ExpectedDice",
    "Fusion",
    "Registration",
    "atlas_labels",
    "copy_labels",
    "expected_dice",
]
