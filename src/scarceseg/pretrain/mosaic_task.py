"""The task of `tiny-sam`: see in a stitched mosaic what the 3D model sees in the volume, and answer clicks on it.

Clicks alone teach a transformer too slowly: for hundreds of steps the empty mask is the best answer it knows. So each token
also has to foretell the features that the encoder of `tiny-sam3d` has for its place (distillation), which says something about
every token of every volume. A click on one tile must then select the same thing in all tiles. Both ask the encoder where tiles
lie in the volume and what belongs together, and that is what tuning on one labelled mosaic needs afterwards.
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
from scarceseg.foundation.tiny_sam import GRID
from scarceseg.foundation.tiny_sam3d import Grid
from scarceseg.foundation.tiny_sam3d_net import EncodedPrompt, TinySam3DNet
from scarceseg.pretrain.click_task import dialogue, target_losses
from scarceseg.pretrain.volumes import TRAINING, Setting, draw_target, make_volume

STARTS = {"click": 0.8, "mask": 0.2}
CLICKS = {1: 0.3, 2: 0.3, 3: 0.2, 5: 0.2}
QUADRANTS = ((0, 0), (0, 1), (1, 0), (1, 1))


class MosaicTask:
    """Interactive segmentation of stitched synthetic volumes.

    Args:
        network: the small SAM.
        teacher: the 3D model whose features are foretold; frozen.
        grid: tiles along each side of the canvas; volumes have ``grid**2`` slices.
        targets: targets of each volume; one volume a step.
        setting: of the generator.
    """

    def __init__(
        self,
        network: SamModel,
        teacher: TinySam3DNet,
        grid: int = GRID,
        targets: int = 3,
        setting: Setting = TRAINING,
    ) -> None:
        self.sam, self.grid, self.targets, self.setting = network, grid, targets, setting
        self.teacher = freeze(teacher.encoder)
        vision = parts(network.config)[0]
        self.tile = image_size_of(network) // grid
        self.patch = int(vision.patch_size)
        channels = len(QUADRANTS) * teacher.config.head[1] + sum(teacher.config.head[1:])
        # The head belongs to the training alone: it is saved in the checkpoint, and not with the model.
        self.network = nn.ModuleDict({"sam": network, "foretell": nn.Conv2d(vision.output_channels, channels, 1)})

    def loss(self, rng: np.random.Generator, done: float) -> dict[str, torch.Tensor]:
        """Dice and cross-entropy of the masks, error of the quality, and how well tokens tell regions apart."""
        shape = (self.tile, self.tile, self.grid**2)
        masks: list[np.ndarray] = []
        while not masks:
            volume = make_volume(rng, shape, self.setting)
            masks = [mask for _ in range(self.targets) if (mask := draw_target(rng, volume)) is not None]
        target = torch.from_numpy(np.stack(masks))
        image = torch.from_numpy(volume.image)[None]
        canvas = to_canvas(image, self.grid)
        embedding = self.sam.vision_encoder(canvas[:, None].expand(-1, 3, -1, -1)).last_hidden_state
        foretold = F.smooth_l1_loss(self.network["foretell"](embedding), self._features(image))
        # Masks come at half the canvas' resolution; the target is compared there.
        small = F.avg_pool3d(target.float()[:, None], (2, 2, 1))[:, 0] > 0.5
        if not small.flatten(1).any(1).all():
            small = target[:, ::2, ::2]
        losses = target_losses(dialogue(_Answer(self, embedding), small, rng, STARTS, CLICKS), small, balance=1 - done)
        total = losses["mask"] + 0.2 * losses["quality"] + 2.0 * foretold
        return {"loss": total, "foretold": foretold, **losses}

    @torch.no_grad()
    def _features(self, image: torch.Tensor) -> torch.Tensor:
        """What the teacher sees at the place of each token ``[1, channels, E, E]``, each channel of zero mean and unit variance.

        The finest map is taken at the middle of each quarter of a token, the coarser ones at the token's middle.
        """
        seen = Grid.fit((image.shape[1], image.shape[2], image.shape[3]), (1.0, 1.0, 1.0), 64).put(image[:, None])
        maps = self.teacher(seen)
        tokens = self.tile // self.patch
        parts = []
        for name, finer in (("quarter", 2), ("quarter", 1), ("eighth", 1)):
            size = (finer * tokens, finer * tokens, self.grid**2)
            values = F.interpolate(maps[name], size=size, mode="trilinear", align_corners=False)[0]
            parts += [values[:, i::finer, j::finer] for i, j in QUADRANTS if i < finer and j < finer]
        features = torch.cat([to_canvas(part, self.grid) for part in parts])
        mean, deviation = features.mean((1, 2), keepdim=True), features.std((1, 2), keepdim=True)
        return ((features - mean) / (deviation + 1e-3))[None]


class _Answer:
    """The decoder, asked in the frame of the half-resolution volume."""

    def __init__(self, task: MosaicTask, embedding: torch.Tensor) -> None:
        self.task, self.embedding = task, embedding
        self.position = task.sam.get_image_wide_positional_embeddings()

    def __call__(self, prompt: EncodedPrompt) -> tuple[torch.Tensor, torch.Tensor]:
        task, sam, rows = self.task, self.task.sam, len(prompt.points)
        x, y, z = (2 * prompt.points[..., 0] + 0.5, 2 * prompt.points[..., 1] + 0.5, prompt.points[..., 2].long())
        pixel = torch.stack([(z % task.grid) * task.tile + x, (z // task.grid) * task.tile + y], -1)
        mask = None
        if prompt.mask is not None:
            canvas = to_canvas(prompt.mask[:, 0], task.grid)[:, None]
            mask = torch.logit(canvas.clamp(1e-4, 1 - 1e-4))
        sparse, dense = sam.prompt_encoder(pixel[:, None], prompt.labels[:, None], None, mask)
        low, quality = sam.mask_decoder(
            self.embedding.expand(rows, -1, -1, -1), self.position.expand(rows, -1, -1, -1), sparse, dense, False
        )
        return from_canvas(low[:, 0, 0], task.grid), quality[:, 0, 0]


def to_canvas(volume: torch.Tensor, grid: int) -> torch.Tensor:
    """``[B, X, Y, grid*grid]`` to ``[B, grid*Y, grid*X]``: slice by slice, row by row."""
    b, x, y, _ = volume.shape
    return volume.reshape(b, x, y, grid, grid).permute(0, 3, 2, 4, 1).reshape(b, grid * y, grid * x)


def from_canvas(canvas: torch.Tensor, grid: int) -> torch.Tensor:
    """Inverse of `to_canvas`."""
    b, rows, columns = canvas.shape
    y, x = rows // grid, columns // grid
    return canvas.reshape(b, grid, y, grid, x).permute(0, 4, 2, 1, 3).reshape(b, x, y, grid * grid)
