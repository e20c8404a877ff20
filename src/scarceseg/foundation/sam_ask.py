"""Questions to a 2D SAM: any mixture of clicks, boxes and masks on any images, answered in as few calls as their kinds allow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy import ndimage
from transformers import SamModel

from scarceseg.foundation.sam import decode

# Logit of a place where no mask was found: a probability of 5e-5, and within the range of SAM's own low-resolution logits.
EMPTY = -10.0


@dataclass(frozen=True)
class Ask:
    """One prompt on one image, in pixels of the image the encoder saw.

    Attributes:
        image: embedding ``[D, E, E]``.
        points: ``[N, 2]`` pixel indices (x, y); N may be 0.
        labels: ``[N]`` 1 inside, 0 outside.
        box: ``[4]`` first and last pixel (x0, y0, x1, y1), or None.
        mask: ``[4E, 4E]`` logits of a first mask, or None.
    """

    image: torch.Tensor
    points: torch.Tensor
    labels: torch.Tensor
    box: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    @property
    def kind(self) -> tuple[int, bool, bool]:
        """Asks of one kind can be answered together."""
        return len(self.points), self.box is not None, self.mask is not None


def answer(sam: SamModel, asks: Sequence[Ask], batch: int, multimask: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode every ask.

    Args:
        sam: the model.
        asks: on any images.
        batch: asks in one call of the decoder.
        multimask: of a single click, which may mean a part or the whole, take the best of SAM's several masks by its own
            estimate. Every other prompt gets mask 0, as SAM was trained.

    Returns:
        Logits ``[P, 4E, 4E]`` and estimated IoU ``[P]`` in [0, 1], in the order of the asks.
    """
    groups: dict[tuple[int, bool, bool], list[int]] = defaultdict(list)
    for index, ask in enumerate(asks):
        groups[ask.kind].append(index)
    logits: dict[int, torch.Tensor] = {}
    quality: dict[int, torch.Tensor] = {}
    for kind, members in groups.items():
        several = multimask and kind == (1, False, False) and sam.mask_decoder.num_mask_tokens > 1
        for start in range(0, len(members), batch):
            rows = members[start : start + batch]
            masks, scores = _decode_together(sam, [asks[i] for i in rows], several)
            best = scores.argmax(dim=1)
            for place, row in enumerate(rows):
                logits[row] = masks[place, best[place]]
                quality[row] = scores[place, best[place]]
    order = range(len(asks))
    return torch.stack([logits[i] for i in order]), torch.stack([quality[i] for i in order]).clamp(0, 1)


def _decode_together(sam: SamModel, asks: Sequence[Ask], several: bool) -> tuple[torch.Tensor, torch.Tensor]:
    points, box, mask = asks[0].kind
    home = sam.mask_decoder.mask_tokens.weight.device
    return decode(
        sam,
        torch.stack([ask.image for ask in asks]).to(home),
        points=torch.stack([ask.points for ask in asks]).to(home) if points else None,
        labels=torch.stack([ask.labels for ask in asks]).to(home) if points else None,
        boxes=torch.stack([ask.box for ask in asks if ask.box is not None]).to(home) if box else None,
        masks=torch.stack([ask.mask for ask in asks if ask.mask is not None])[:, None].float().to(home)
        if mask
        else None,
        multimask=several,
    )


def prompt_of_mask(logits: torch.Tensor, image_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A click and a box that stand for a mask; SAM was never trained on a mask prompt alone.

    Args:
        logits: ``[4E, 4E]``, positive somewhere.
        image_size: S, side of the image in pixels.

    Returns:
        The point ``[2]`` (x, y) farthest from the mask's border and the box ``[4]`` around it, in pixels of S x S.
    """
    inside = (logits > 0).cpu().numpy()
    # The image's own edge is a border too, hence the frame of zeros.
    depth = torch.from_numpy(ndimage.distance_transform_edt(F.pad(torch.from_numpy(inside), (1, 1, 1, 1)).numpy()))
    row, column = divmod(int(depth[1:-1, 1:-1].argmax()), inside.shape[1])
    rows, columns = inside.any(axis=1).nonzero()[0], inside.any(axis=0).nonzero()[0]
    scale = image_size / inside.shape[0]
    point = torch.tensor([column, row]).add(0.5).mul(scale).sub(0.5)
    first = torch.tensor([columns[0], rows[0]], dtype=torch.float32).mul(scale)
    last = torch.tensor([columns[-1] + 1, rows[-1] + 1], dtype=torch.float32).mul(scale).sub(1)
    return point, torch.cat([first, last])


def mask_logits(probability: torch.Tensor, side: int) -> torch.Tensor:
    """Probabilities ``[N, S, S]`` as mask prompts ``[N, side, side]``: logits within +-9.2, like SAM's own."""
    coarse = F.interpolate(probability[:, None].float(), size=(side, side), mode="area")[:, 0]
    return torch.logit(coarse, eps=1e-4)
