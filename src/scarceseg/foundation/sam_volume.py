"""A 2D SAM on volumes: slice by slice, or as one mosaic of all slices, behind the interface of promptable models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import SamModel

from scarceseg.errors import ConfigError, DataError
from scarceseg.foundation.base import (
    Embedding,
    Masks,
    Promptable,
    PromptKind,
    Spacing,
    Tunable,
    TunedModel,
    Tuning,
    check_image,
    check_prompts,
    freeze,
)
from scarceseg.foundation.sam import image_embedding, image_size_of, load_sam
from scarceseg.foundation.sam_config import parts
from scarceseg.foundation.sam_mosaic import lay_out, segment_mosaic
from scarceseg.foundation.sam_pixels import Normalise, fit_image, to_pixels
from scarceseg.foundation.sam_slices import SliceFrame, segment_slices
from scarceseg.foundation.stitching import Stitch
from scarceseg.types import ImageBatch, Prompt

View = Literal["slices", "mosaic"]


@dataclass(frozen=True)
class SamOptions:
    """How a SAM looks at a volume.

    Attributes:
        view: ``slices`` embeds every slice by itself, ``mosaic`` the whole volume as one image.
        normalise: scale of the pixels, see `Normalise`; each volume is cut at its percentiles 0.5 and 99.5 first, but for
            ``zscore``. MedSAM wants ``minmax``.
        axis: index axis along which the volume is sliced.
        batch: images in one call of the encoder, prompts in one call of the decoder.
        half: keep embeddings in float16: half the memory, about three digits.
        multimask: of a single click, take the best of SAM's three masks by its own estimate; else always mask 0.
        stop_quality: spreading to a neighbour slice ends where the estimated IoU is lower (``slices``).
        stop_overlap: and where the mask shares less than this (IoU) with the one it came from (``slices``).

    Raises:
        ConfigError: a value that is not possible.
    """

    view: View = "slices"
    normalise: Normalise = "sam"
    axis: int = 2
    batch: int = 4
    half: bool = False
    multimask: bool = True
    stop_quality: float = 0.5
    stop_overlap: float = 0.2

    def __post_init__(self) -> None:
        for name, value, known in (
            ("view", self.view, get_args(View)),
            ("normalise", self.normalise, get_args(Normalise)),
            ("axis", self.axis, (0, 1, 2)),
        ):
            if value not in known:
                raise ConfigError(f"{name} of a SAM: expected {', '.join(map(str, known))}, got {value!r}")
        if self.batch < 1:
            raise ConfigError(f"batch of a SAM starts at 1, got {self.batch}")


class SamPromptable(Promptable, Tunable):
    """A frozen SAM that segments volumes, and hands out copies of itself to be tuned on mosaics.

    A prompt that says nothing about what is inside (clicks outside alone, or an empty mask) gets an empty answer of quality 0.

    Args:
        sam: the model; it is frozen, not copied.
        name: for messages and results.
        options: see `SamOptions`.
    """

    prompt_kinds: frozenset[PromptKind] = frozenset({"point", "box", "mask"})
    views = frozenset(get_args(View))

    def __init__(self, sam: SamModel, name: str = "sam", options: SamOptions | None = None) -> None:
        self.sam = sam
        self.name = name
        self.options = options or SamOptions()
        self.channels = frozenset({1, 2, int(parts(sam.config)[0].num_channels)})
        freeze(sam)

    @classmethod
    def from_file(
        cls, path: Path, view: str = "slices", name: str = "sam", image_size: int | None = None, **options: Any
    ) -> SamPromptable:
        """Read a SAM and look at volumes with it.

        Args:
            path: file or folder, see `load_sam`.
            view: ``slices`` or ``mosaic``.
            name: for messages; one with "medsam" in it takes MedSAM's scale of pixels unless ``normalise`` is given.
            image_size: another side of the images in pixels.
            options: further fields of `SamOptions`.

        Raises:
            DataError: see `load_sam`.
            ConfigError: an option that is not there or not possible.
        """
        known = SamOptions.__dataclass_fields__
        for key in options:
            if key not in known:
                raise ConfigError(f"a SAM has no option {key!r}: its options are {', '.join(known)}")
        if "medsam" in name.lower():
            options.setdefault("normalise", "minmax")
        chosen = SamOptions(view=view, **options)  # type: ignore[arg-type]  # checked there
        return cls(load_sam(path, image_size)[0], name, chosen)

    def to(self, device: torch.device) -> SamPromptable:
        """Move the weights; returns itself."""
        self.sam.to(device)  # type: ignore[arg-type]  # the library's annotation forgets torch.device
        return self

    def seen_as(self, view: str) -> SamPromptable:
        """See `Promptable.seen_as`."""
        return SamPromptable(self.sam, self.name, replace(self.options, view=view))  # type: ignore[arg-type]  # checked there

    @torch.no_grad()
    def embed(self, image: ImageBatch, spacing_mm: Spacing) -> Embedding:
        """Run the image encoder over every slice, or over the mosaic.

        Slices keep their proportions in millimetres; the longer side fills SAM's image. A mosaic goes by voxels.

        Args:
            image: ``[B, C, X, Y, Z]`` with one channel, two (a, b and their mean are shown) or three.
            spacing_mm: distance of voxel centres along X, Y, Z.

        Raises:
            DataError: another number of axes or channels, or values that are not finite.
            ConfigError: more slices than a mosaic can hold.
        """
        check_image(self, image)
        wanted = int(parts(self.sam.config)[0].num_channels)
        pixels = to_pixels(image.to(self._device, torch.float32), self.options.normalise, wanted)
        x, y, z = image.shape[2:]
        if self.options.view == "mosaic":
            stitch = lay_out((x, y, z), image_size_of(self.sam), self.options.axis)
            return Embedding({"canvas": self._encode(stitch.stitch(pixels))}, (x, y, z), stitch)
        frame = self._slice_frame((x, y, z), spacing_mm)
        volumes = []
        for volume in pixels:
            slices = volume.permute(1 + frame.order[0], 0, 1 + frame.order[1], 1 + frame.order[2])
            volumes.append(self._encode(slices, frame))
        frame = SliceFrame(tuple(volumes), frame.size, frame.axis, frame.shown, frame.image_size)
        return Embedding({"volume": torch.arange(len(image), device=self._device)}, (x, y, z), frame)

    @torch.no_grad()
    def segment(self, embedding: Embedding, prompts: Sequence[Prompt], previous: Masks | None = None) -> Masks:
        """Answer one prompt per row; see `Promptable.segment`, and `sam_slices` and `sam_mosaic` for what a prompt does.

        Raises:
            DataError: wrong number of prompts, an empty one or one outside the volume, or an embedding or previous answer
                that is not of this model and view.
        """
        check_prompts(self, embedding, prompts)
        frame, options = embedding.frame, self.options
        if not isinstance(frame, Stitch if options.view == "mosaic" else SliceFrame):
            raise DataError(f"{self.name}: expected an embedding of the view {options.view!r}: embed the volume again")
        earlier = self._earlier(embedding, previous)
        if isinstance(frame, Stitch):
            canvases = embedding.features["canvas"]
            result = segment_mosaic(
                self.sam, canvases, frame, prompts, earlier, batch=options.batch, multimask=options.multimask
            )
        else:
            result = segment_slices(
                self.sam,
                frame,
                embedding.features["volume"].tolist(),
                prompts,
                earlier,
                batch=options.batch,
                multimask=options.multimask,
                stop_quality=options.stop_quality,
                stop_overlap=options.stop_overlap,
            )
        logits, quality, low_res = result
        return Masks(logits, quality, {"low_res": low_res.half() if options.half else low_res})

    def tunable(self, channels: int, classes: int, tuning: Tuning, size: tuple[int, int, int]) -> TunedModel:
        """A copy opened for K classes on mosaics, whatever the view of prompts; see `TunedSam`."""
        from scarceseg.foundation.sam_tuned import TunedSam

        return TunedSam(self.sam, channels, classes, tuning, size)

    @property
    def _device(self) -> torch.device:
        return self.sam.mask_decoder.mask_tokens.weight.device

    def _slice_frame(self, size: tuple[int, int, int], spacing_mm: Spacing) -> SliceFrame:
        """How a slice lies in SAM's image; without embeddings yet."""
        image_size = image_size_of(self.sam)
        frame = SliceFrame((), size, self.options.axis, (0, 0), image_size)
        extent = [size[i] * spacing_mm[i] for i in frame.order[1:]]
        rows, columns = (max(round(image_size * side / max(extent)), 1) for side in extent)
        return SliceFrame((), size, self.options.axis, (rows, columns), image_size)

    def _encode(self, images: torch.Tensor, frame: SliceFrame | None = None) -> torch.Tensor:
        """Embeddings ``[N, D, E, E]`` of images ``[N, 3, rows, columns]``, a few at a time."""
        found = []
        for part in images.split(self.options.batch):
            pixels = part if frame is None else fit_image(part, frame.shown, frame.image_size)
            features = image_embedding(self.sam, pixels)
            found.append(features.half() if self.options.half else features)
        return torch.cat(found)

    def _earlier(self, embedding: Embedding, previous: Masks | None) -> torch.Tensor | None:
        """Low-resolution logits of the last round."""
        if previous is None:
            return None
        frame = embedding.frame
        side = image_size_of(self.sam) // int(parts(self.sam.config)[0].patch_size) * 4
        slices = (frame.size[frame.axis],) if isinstance(frame, SliceFrame) else ()
        expected = (len(embedding), *slices, side, side)
        low_res = previous.memory.get("low_res")
        if low_res is None or tuple(low_res.shape) != expected:
            got = "none" if low_res is None else list(low_res.shape)
            raise DataError(
                f"{self.name}: expected a previous answer with low_res logits {list(expected)}, got {got}: hand back the answer "
                "of the same model for the same rows"
            )
        return low_res.float()
