"""Zero-shot segmentation: an image file and a prompt go in, a mask in the geometry of the image comes out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from scarceseg.data.geometry import describe, orient, orient_geometry, same_geometry
from scarceseg.data.images import SeveralChannels, image_suffix, output_suffix, read_image, write_image
from scarceseg.errors import ConfigError, DataError, RunError
from scarceseg.foundation.base import Embedding, Promptable, check_prompts
from scarceseg.inference.export import open_folder
from scarceseg.inference.predictor import pick_device
from scarceseg.inference.prompting import Frame, Points, make_prompt, numbers, turn_back, turn_prompt
from scarceseg.types import Geometry, LabelMap, Prompt, Volume

__all__ = ["Segmentation", "segment", "segment_typed", "segment_volume"]

Keep = Literal["clicked", "all"]

_TOUCHING = np.ones((3, 3, 3), dtype=bool)


@dataclass(frozen=True)
class Segmentation:
    """Answer to one prompt, on the grid of the image.

    Attributes:
        mask: ``[X, Y, Z]`` uint8, 1 inside.
        probability: ``[X, Y, Z]`` float32 in [0, 1]; as the model gave it, also where `mask` was cleaned.
        geometry: grid of the image.
        quality: the model's own estimate of the mask's IoU, in [0, 1].
        seconds: time of the model, without reading and writing.
        notes: what the user should know about this mask; often empty.
    """

    mask: LabelMap
    probability: NDArray[np.float32]
    geometry: Geometry
    quality: float
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def voxels(self) -> int:
        """Voxels inside."""
        return int(np.count_nonzero(self.mask))

    @property
    def volume_ml(self) -> float:
        """Volume of the mask in millilitres (1000 mm^3)."""
        return self.voxels * float(np.prod(self.geometry.spacing_mm)) / 1000

    def __str__(self) -> str:
        return (
            f"{self.voxels} voxels, {self.volume_ml:.2f} ml, quality {self.quality:.2f} (the model's own estimate of the "
            f"IoU), {self.seconds:.1f} s"
        )


def segment(
    image: Path | str,
    *,
    points: Points = (),
    negative: Points = (),
    box: Sequence[float] | None = None,
    mask: Path | str | None = None,
    foundation: str | Path | Promptable = "tiny-sam3d",
    frame: Frame = "voxel",
    channel: int | None = None,
    keep: Keep = "clicked",
    device: str = "auto",
    out: Path | str | None = None,
    probabilities: Path | str | None = None,
    **options: Any,
) -> Segmentation:
    """Segment what a prompt points at in one image file.

    Args:
        image: image file, or folder with a DICOM series.
        points: clicks inside, ``(x, y, z)`` each.
        negative: clicks outside.
        box: ``(x0, y0, z0, x1, y1, z1)``, two opposite corners, both part of the box.
        mask: file on the grid of the image with a first mask (0 and 1) or probabilities in [0, 1].
        foundation: name, file or folder (see `load_foundation`), or a model that is loaded already.
        frame: of `points`, `negative` and `box`; places are rounded to the nearest voxel.
        channel: which volume of a 4D file, or which value of a voxel that holds several, counted from 0.
        keep: ``clicked`` keeps the connected pieces that hold a click inside (all where there is no such click, or none
            of them lies in the mask), ``all`` every piece.
        device: "auto" takes a GPU if there is one; "cpu", "cuda" or "cuda:1".
        out: write the mask here (uint8), in any of the formats we write.
        probabilities: write the probability here (float32).
        options: of the model, such as ``view="mosaic"`` for a SAM.

    Raises:
        DataError: a file that cannot be read, or a prompt outside the image or of a kind the model does not know.
        ConfigError: an unknown model, or options it does not have.
        RunError: no such device, or a result that cannot be written.
    """
    from scarceseg.foundation.load import load_foundation

    image = Path(image)
    first = None if mask is None else Path(mask)
    outputs = [Path(path) for path in (out, probabilities) if path is not None]
    _check_outputs(outputs, [path for path in (image, first) if path is not None])
    array, geometry = _read(image, channel)
    prompt = make_prompt(geometry, points, negative, box, None if first is None else _read_mask(first, geometry), frame)
    chosen = pick_device(device)
    if isinstance(foundation, Promptable) and options:
        raise ConfigError(
            f"{', '.join(options)}: a model that is loaded already takes no options, give them to load_foundation"
        )
    model = foundation if isinstance(foundation, Promptable) else load_foundation(foundation, **options)
    if not isinstance(model, Promptable):
        raise ConfigError(f"{foundation} can be tuned but takes no prompts: choose a promptable model")
    try:
        result = segment_volume(model, array[None].astype(np.float32), geometry, prompt, device=chosen, keep=keep)
    except DataError as error:
        if frame != "voxel" and "lies outside" in str(error):
            raise DataError(f"{error}; places were read as {frame.upper()} millimetres") from None
        raise
    for path, content in ((out, result.mask), (probabilities, result.probability)):
        if path is not None:
            write_image(content, geometry, Path(path))
    return result


def segment_typed(
    image: Path,
    *,
    point: Sequence[str],
    negative: Sequence[str],
    box: str | None,
    world: bool,
    ras: bool,
    keep: str,
    view: str | None,
    **rest: Any,
) -> Segmentation:
    """`segment` for what was typed: places as text, and only the options that were given.

    Raises:
        DataError: text that holds no place.
        ConfigError: `keep` is neither ``clicked`` nor ``all``.
    """
    if keep not in get_args(Keep):
        raise ConfigError(f"keep: expected {' or '.join(get_args(Keep))}, got {keep!r}")
    return segment(
        image,
        points=[numbers(text, "--point") for text in point],
        negative=[numbers(text, "--negative") for text in negative],
        box=None if box is None else numbers(box, "--box", "X0,Y0,Z0,X1,Y1,Z1"),
        frame="ras" if ras else "lps" if world else "voxel",
        keep="clicked" if keep == "clicked" else "all",
        **(rest if view is None else rest | {"view": view}),
    )


def segment_volume(
    model: Promptable,
    volume: Volume,
    geometry: Geometry,
    prompt: Prompt,
    *,
    device: torch.device | str = "cpu",
    keep: Keep = "clicked",
) -> Segmentation:
    """Segment what a prompt points at in one volume.

    The model sees the volume with its axes turned to the patient's right, front and head, as in training; nothing is
    interpolated here, and mask and prompt stay in the frame of `volume`.

    Args:
        model: moved to `device`.
        volume: ``[C, X, Y, Z]`` in the file's own intensities.
        geometry: its grid.
        prompt: in voxel indices of `volume`.
        device: where the model runs.
        keep: see `segment`.

    Raises:
        DataError: a prompt outside the volume or of a kind the model does not know, or channels it does not take.
        RunError: the device has too little memory.
    """
    device = torch.device(device)
    # The check comes first and in the frame of the volume, so that its message speaks of the user's indices.
    check_prompts(model, Embedding({"row": torch.zeros(1)}, geometry.size), [prompt])
    turned = np.ascontiguousarray(np.stack([orient(channel, geometry) for channel in volume]))
    start = time.perf_counter()
    try:
        with torch.no_grad():
            model.to(device)
            image = torch.from_numpy(turned)[None].to(device)
            embedding = model.embed(image, orient_geometry(geometry).spacing_mm)
            masks = model.segment(embedding, [turn_prompt(prompt, geometry, device)])
            probability = masks.probability[0].float().cpu().numpy()
            quality = float(masks.quality[0])
    except torch.cuda.OutOfMemoryError:
        raise RunError(f"{device} has too little memory for {model.name} on this volume: take the CPU") from None
    seconds = time.perf_counter() - start
    probability = turn_back(probability, geometry)
    mask = (probability > 0.5).astype(np.uint8)
    notes = []
    if not mask.any():
        notes.append("the mask is empty: give more clicks, or another model")
    elif keep == "clicked":
        mask, missed = _keep_clicked(mask, prompt)
        if missed:
            kept = "; every piece was kept, since none holds a click" if missed == _clicks_inside(prompt) else ""
            notes.append(f"{missed} of the clicks inside lie outside the mask: correct it with further clicks{kept}")
    return Segmentation(mask, probability, geometry, quality, seconds, tuple(notes))


def _clicks_inside(prompt: Prompt) -> int:
    return 0 if prompt.point_labels is None else int((prompt.point_labels == 1).sum())


def _keep_clicked(mask: LabelMap, prompt: Prompt) -> tuple[LabelMap, int]:
    """The pieces that hold a click inside, and how many such clicks lie in no piece."""
    if prompt.points_voxel is None or prompt.point_labels is None:
        return mask, 0
    clicks = prompt.points_voxel[prompt.point_labels == 1].round().long().numpy()
    pieces, _ = ndimage.label(mask, structure=_TOUCHING)
    hit = pieces[tuple(clicks.T)]
    missed = int(np.count_nonzero(hit == 0))
    if missed == len(hit):
        return mask, missed
    return np.isin(pieces, hit[hit > 0]).astype(np.uint8), missed


def _read(path: Path, channel: int | None) -> tuple[NDArray[Any], Geometry]:
    """`read_image`, that names the flag where a channel has to be chosen."""
    try:
        return read_image(path, channel=channel)
    except SeveralChannels as error:
        if channel is not None:
            raise
        raise DataError(
            f"{path} holds {error.count} channels: choose one, counted from 0 (--channel 0 to {error.count - 1})"
        ) from None


def _read_mask(path: Path, expected: Geometry) -> NDArray[np.float32]:
    array, geometry = read_image(path)
    if geometry.size != expected.size or not same_geometry(geometry, expected):
        raise DataError(
            f"the mask {path} does not lie on the image: it has {describe(geometry)}, the image has {describe(expected)}; "
            "resample it to the image"
        )
    if array.min() < 0 or array.max() > 1:
        raise DataError(
            f"the mask {path}: expected 0 and 1, or probabilities in [0, 1], got values from {array.min():g} to "
            f"{array.max():g}; keep one class of it"
        )
    return array.astype(np.float32)


def _check_outputs(outputs: Sequence[Path], inputs: Sequence[Path]) -> None:
    """Find out before the work, not after it, that a result cannot be written.

    Raises:
        RunError: an ending we do not write, an input or another result in the same place, or a folder of no use.
    """
    taken = {path.resolve(): "an input" for path in inputs}
    for path in outputs:
        if output_suffix(path) != image_suffix(path):
            raise RunError(f"cannot write {path}: expected a name that ends in .nii.gz, .nii, .nrrd or .mha")
        if path.resolve() in taken:
            raise RunError(f"{path} would replace {taken[path.resolve()]}: choose another name")
        taken[path.resolve()] = "another result"
        open_folder(path.absolute().parent)
