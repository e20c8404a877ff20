"""The task of `tiny-sam`: see in a stitched mosaic of slices what the 3D model sees in the volume.

The encoder has to foretell, in each token, the features that the encoder of `tiny-sam3d` has for its place, and the decoder the
finer ones in each pixel of its masks (distillation; Hinton et al. 2015, with features in place of classes). That says something
about every place of every volume, asks where tiles lie in the volume, and is what tuning on one labelled mosaic needs afterwards.

Clicks on mosaics, SAM's own task, were tried first: from random weights the answer was still the empty mask after 420 steps, and
a further 80 with balanced losses and attention that starts at the click changed nothing. Each says too little to learn from.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import SamModel

from scarceseg.foundation.base import freeze
from scarceseg.foundation.sam import image_size_of
from scarceseg.foundation.sam_config import parts
from scarceseg.foundation.sam_tuned import decoder_features
from scarceseg.foundation.stitching import Stitch
from scarceseg.foundation.tiny_sam import GRID
from scarceseg.foundation.tiny_sam3d import Grid
from scarceseg.foundation.tiny_sam3d_net import TinySam3DNet
from scarceseg.pretrain.volumes import TRAINING, Setting, make_volume

QUADRANTS = ((0, 0), (0, 1), (1, 0), (1, 1))


class MosaicTask:
    """Distillation of 3D features into a SAM that sees the volume as a mosaic.

    Args:
        sam: the small SAM.
        teacher: the 3D model whose features are foretold; frozen.
        batch: volumes a step.
        setting: of the generator.
    """

    def __init__(self, sam: SamModel, teacher: TinySam3DNet, batch: int = 1, setting: Setting = TRAINING) -> None:
        self.sam, self.batch, self.setting = sam, batch, setting
        self.teacher = freeze(teacher.encoder)
        vision, _, decoder = parts(sam.config)
        side = image_size_of(sam)
        self.shape = (side // GRID, side // GRID, GRID * GRID)
        self.stitch = Stitch.fit(self.shape, side)
        self.tokens = self.shape[0] // int(vision.patch_size)
        _, quarter, eighth = teacher.config.head
        fine = teacher.config.similarities * teacher.config.similarity_width
        # The heads belong to the training alone: they are saved in the checkpoint, and not with the model.
        heads = {
            "tokens": nn.Conv2d(int(vision.output_channels), len(QUADRANTS) * quarter + quarter + eighth, 1),
            "pixels": nn.Conv2d(int(decoder.hidden_size) // 8, fine, 1),
        }
        self.network = nn.ModuleDict({"sam": sam, **heads})

    def loss(self, rng: np.random.Generator, done: float) -> dict[str, torch.Tensor]:
        """How far the foretold features are from the teacher's: of tokens, and of the pixels of masks."""
        volumes = [make_volume(rng, self.shape, self.setting).image for _ in range(self.batch)]
        image = torch.from_numpy(np.stack(volumes))[:, None]
        canvas = self.stitch.stitch(image).expand(-1, 3, -1, -1)
        embedding = self.sam.vision_encoder(canvas).last_hidden_state
        _, upscaled = decoder_features(self.sam, embedding)
        for_tokens, for_pixels = self.features(image)
        tokens = F.smooth_l1_loss(self.network["tokens"](embedding), for_tokens)
        pixels = F.smooth_l1_loss(self.network["pixels"](upscaled), for_pixels)
        return {"loss": tokens + pixels, "tokens": tokens, "pixels": pixels}

    @torch.no_grad()
    def features(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the teacher sees in volumes ``[B, 1, X, Y, Z]``, on the mosaic's tokens and on its pixels.

        Of its map at 1/4, tokens get the values at the middle of each of their quarters; of those at 1/4 and 1/8, the one at
        their middle. Pixels get the map at 1/2 that is compared with clicks. Each channel has zero mean and unit variance.

        Returns:
            ``[B, ., E, E]`` and ``[B, ., 4E, 4E]``.
        """
        grid = Grid.fit((image.shape[2], image.shape[3], image.shape[4]), (1.0, 1.0, 1.0), 64)
        maps = self.teacher(grid.put(image))
        for_tokens = []
        for name, finer in (("quarter", 2), ("quarter", 1), ("eighth", 1)):
            values = self._resized(maps[name], finer)
            chosen = [values[:, :, i::finer, j::finer] for i, j in QUADRANTS if i < finer and j < finer]
            for_tokens += [_mosaic(part) for part in chosen]
        return _standard(torch.cat(for_tokens, 1)), _standard(_mosaic(self._resized(maps["similar"], 4)))

    def _resized(self, values: torch.Tensor, finer: int) -> torch.Tensor:
        size = (finer * self.tokens, finer * self.tokens, GRID * GRID)
        return F.interpolate(values, size=size, mode="trilinear", align_corners=False)


def _mosaic(values: torch.Tensor) -> torch.Tensor:
    """Maps ``[B, C, x, y, slices]`` of any in-plane resolution as mosaics ``[B, C, ., .]``."""
    return Stitch.fit((values.shape[2], values.shape[3], values.shape[4]), GRID * values.shape[2]).stitch(values)


def _standard(values: torch.Tensor) -> torch.Tensor:
    mean, deviation = values.mean((2, 3), keepdim=True), values.std((2, 3), keepdim=True)
    return (values - mean) / (deviation + 1e-3)
