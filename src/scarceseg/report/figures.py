"""Volumes -> pictures: three planes with outlines, as one PNG or as stacks of slices to leaf through.

With a direction matrix the planes are axial, coronal and sagittal and drawn as radiologists see them (the patient's
right on the left of the picture). Without one the planes are named after the array's axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scarceseg.data.geometry import orient, orient_geometry
from scarceseg.report.encode import png_bytes
from scarceseg.types import Geometry

Array = NDArray[Any]
Colour = tuple[int, int, int]

CLASS_COLOURS: tuple[Colour, ...] = (
    (255, 140, 66),
    (70, 190, 255),
    (120, 220, 130),
    (240, 110, 190),
    (250, 215, 80),
    (165, 145, 255),
    (255, 105, 105),
    (80, 220, 200),
)
"""Prediction of class 1, 2 ...; from the ninth on they repeat."""
REFERENCE_COLOUR: Colour = (255, 255, 255)
FILL_ALPHA, RIM_ALPHA = 80, 120
RIM = 2 * len(CLASS_COLOURS) + 1
"""Index of the dark rim in the palette of a mask, behind outlines and fillings."""
UNCERTAINTY_LEVELS = 16


@dataclass(frozen=True)
class View:
    """One of the three planes: how a volume is sliced and turned for the screen.

    Attributes:
        name: for people.
        axis: of the slices.
        rows, columns: array axis along the picture's rows (top to bottom) and columns (left to right).
        flip: whether rows and columns run against the index.
        letters: patient side at the picture's left, right, top and bottom, or empty.
    """

    name: str
    axis: int
    rows: int
    columns: int
    flip: tuple[bool, bool]
    letters: str

    def stack(self, array: Array) -> Array:
        """Slices ``[N, rows, columns]`` of ``array [X, Y, Z]``, a view."""
        turned = array.transpose(self.axis, self.rows, self.columns)
        return turned[:, :: -1 if self.flip[0] else 1, :: -1 if self.flip[1] else 1]


PATIENT_VIEWS = (
    View("axial", 2, 1, 0, (True, True), "RLAP"),
    View("coronal", 1, 2, 0, (True, True), "RLHF"),
    View("sagittal", 0, 2, 1, (True, True), "APHF"),
)
ARRAY_VIEWS = (
    View("x-y plane", 2, 1, 0, (False, False), ""),
    View("x-z plane", 1, 2, 0, (True, False), ""),
    View("y-z plane", 0, 2, 1, (True, False), ""),
)


@dataclass(frozen=True)
class Picture:
    """A case to draw; arrays are ``[X, Y, Z]`` of one shape, turned to `views` already when made by `picture`.

    Attributes:
        image: grey values 0 to 255.
        masks: label maps by name; "reference" is drawn white, any other in the classes' colours.
        uncertainty: level 0 to `UNCERTAINTY_LEVELS` - 1, or None.
        spacing_mm: of the turned axes.
        views: the planes.
    """

    image: NDArray[np.uint8]
    masks: dict[str, NDArray[np.uint8]]
    uncertainty: NDArray[np.uint8] | None
    spacing_mm: tuple[float, float, float]
    views: tuple[View, ...]

    @cached_property
    def scores(self) -> dict[str, NDArray[np.float64]]:
        """How much each slice of a view shows of the reference, or where there is none of the other masks, by view.

        Each class counts by the root of its area's share of its own largest area: several classes are better than one.
        """
        return {view.name: _score(self, view) for view in self.views}

    @cached_property
    def covered(self) -> dict[str, tuple[int, int]]:
        """First and last slice that the masks cover, by view; all slices without masks."""
        return {view.name: _covered(self, view) for view in self.views}


def picture(
    image: Array,
    masks: dict[str, Array],
    uncertainty: Array | None = None,
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
    direction: Sequence[float] | None = None,
) -> Picture:
    """Grey values between the 0.5th and the 99.5th percentile, axes turned for display.

    Args:
        image: ``[X, Y, Z]``.
        masks: label maps ``[X, Y, Z]`` by name.
        uncertainty: ``[X, Y, Z]``, not negative; scaled to its largest value.
        spacing_mm: of the arrays' axes.
        direction: row-major 3x3 matrix of the grid (LPS world), or None when it is unknown.

    Raises:
        ValueError: an array of another shape than the image.
    """
    for name, array in {**masks, **({} if uncertainty is None else {"uncertainty": uncertainty})}.items():
        if image.ndim != 3 or array.shape != image.shape:
            raise ValueError(
                f"{name}: expected the shape of the image {image.shape} with three axes, got {array.shape}"
            )
    sx, sy, sz = (float(s) for s in spacing_mm)
    nx, ny, nz = image.shape
    spacing, views = (sx, sy, sz), ARRAY_VIEWS
    arrays: dict[str, Array] = {"": image, **masks}
    if uncertainty is not None:
        arrays["uncertainty "] = uncertainty
    if direction is not None:
        grid = Geometry((nx, ny, nz), spacing, (0.0, 0.0, 0.0), tuple(float(d) for d in direction))
        spacing, views = orient_geometry(grid).spacing_mm, PATIENT_VIEWS
        arrays = {name: orient(array, grid) for name, array in arrays.items()}
    level = None
    if uncertainty is not None:
        values = np.nan_to_num(arrays.pop("uncertainty ")).astype(np.float32)
        top = max(float(values.max()), 1e-6)
        level = np.clip(values / top * UNCERTAINTY_LEVELS, 0, UNCERTAINTY_LEVELS - 1).astype(np.uint8)
    shades = grey(arrays.pop(""))
    return Picture(shades, {name: array.astype(np.uint8) for name, array in arrays.items()}, level, spacing, views)


def grey(image: Array) -> NDArray[np.uint8]:
    """Grey values: black at the 0.5th, white at the 99.5th percentile; what is not finite counts as 0."""
    values = np.nan_to_num(image.astype(np.float32))
    low, high = np.percentile(values, (0.5, 99.5))
    scaled: NDArray[np.float32] = (values - low) * np.float32(255 / max(float(high - low), 1e-6))
    return np.clip(scaled, 0, 255).astype(np.uint8)


def overlay_png(
    image: Array,
    prediction: Array,
    reference: Array | None = None,
    *,
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
    direction: Sequence[float] | None = None,
    at: Sequence[int] | None = None,
    side: int = 320,
) -> bytes:
    """Three planes side by side at one scale: the prediction filled and outlined in colour, the reference in white.

    Args:
        image: ``[X, Y, Z]``.
        prediction: label map ``[X, Y, Z]``; 0 is clear.
        reference: label map ``[X, Y, Z]``, or None.
        spacing_mm: of the arrays' axes.
        direction: row-major 3x3 matrix of the grid, see `picture`.
        at: voxel the planes go through; None takes the slices with the largest area of the reference, or else of the
            prediction. With `direction`, an index of the turned volume.
        side: pixels of the volume's longest side.

    Returns:
        A PNG file.
    """
    masks = {"prediction": prediction} if reference is None else {"prediction": prediction, "reference": reference}
    shown = picture(image, masks, None, spacing_mm, direction)
    return png_bytes(three_planes(shown, list(masks), side, at), optimize=True)


def three_planes(shown: Picture, names: Sequence[str], side: int, at: Sequence[int] | None = None) -> Image.Image:
    """One slice of each view side by side at one scale, with the masks in `names`; `at` and `side` as in `overlay_png`."""
    scale = pixels_per_mm(shown, side)
    tiles = []
    for view in shown.views:
        index = peak(shown, view) if at is None else int(at[view.axis])
        size = tile_size(shown, view, scale)
        tile = grey_strip(shown, view, [index], size).convert("RGBA")
        for name in names:
            strip = mask_strip(shown.masks[name], view, [index], size, name == "reference")
            tile.alpha_composite(strip.convert("RGBA"))
        tiles.append(tile.convert("RGB"))
    gap = max(side // 40, 2)
    whole = Image.new("RGB", (sum(t.width for t in tiles) + gap * (len(tiles) - 1), max(t.height for t in tiles)))
    left = 0
    for tile in tiles:
        whole.paste(tile, (left, (whole.height - tile.height) // 2))
        left += tile.width + gap
    return whole


def pixels_per_mm(shown: Picture, side: int) -> float:
    """Scale at which the volume's longest side has `side` pixels."""
    return side / max(n * s for n, s in zip(shown.image.shape, shown.spacing_mm, strict=True))


def tile_size(shown: Picture, view: View, scale: float) -> tuple[int, int]:
    """Width and height in pixels of one slice."""
    width, height = (shown.image.shape[a] * shown.spacing_mm[a] * scale for a in (view.columns, view.rows))
    return max(round(width), 1), max(round(height), 1)


def chosen_slices(shown: Picture, view: View, count: int) -> list[int]:
    """Up to `count` slices, spread over what the masks cover and a tenth more; over everything without masks."""
    total = shown.image.shape[view.axis]
    low, high = shown.covered[view.name]
    margin = max((high - low) // 10, 1)
    low, high = max(low - margin, 0), min(high + margin, total - 1)
    return sorted({round(float(k)) for k in np.linspace(low, high, min(count, high - low + 1))})


def peak(shown: Picture, view: View) -> int:
    """The slice that shows most of the reference, else of the other masks, else the middle one."""
    score = shown.scores[view.name]
    return int(score.argmax()) if score.any() else len(score) // 2


def best_view(shown: Picture) -> View:
    """The plane whose best slice shows most, the first one if they are equal."""
    return max(shown.views, key=lambda view: float(shown.scores[view.name].max()))


def _score(shown: Picture, view: View) -> NDArray[np.float64]:
    score = np.zeros(shown.image.shape[view.axis])
    for names in (["reference"], list(shown.masks)):
        for mask in (shown.masks[name] for name in names if name in shown.masks):
            values = np.flatnonzero(np.bincount(mask.ravel()))
            for value in values[values > 0]:
                areas = np.count_nonzero(mask == value, axis=(view.rows, view.columns))
                score += np.sqrt(areas / max(areas.max(), 1))
        if score.any():
            break
    return score


def _covered(shown: Picture, view: View) -> tuple[int, int]:
    used = np.flatnonzero(sum(mask.any(axis=(view.rows, view.columns)) for mask in shown.masks.values()))
    return (int(used[0]), int(used[-1])) if used.size else (0, shown.image.shape[view.axis] - 1)


def grey_strip(shown: Picture, view: View, slices: Sequence[int], size: tuple[int, int]) -> Image.Image:
    """Slices of the image below each other, in grey."""
    stack = view.stack(shown.image)
    tiles = [np.asarray(Image.fromarray(stack[k].copy()).resize(size, Image.Resampling.BICUBIC)) for k in slices]
    return Image.fromarray(np.concatenate(tiles))


def own_size(shown: Picture, view: View, size: tuple[int, int]) -> tuple[int, int]:
    """Pixels that hold all a smooth layer has to say: its voxels, or `size` where that is less."""
    shape = shown.image.shape
    return min(size[0], shape[view.columns]), min(size[1], shape[view.rows])


def mask_strip(
    mask: Array, view: View, slices: Sequence[int], size: tuple[int, int], white: bool = False
) -> Image.Image:
    """Slices of a label map below each other on clear ground: outlines, and unless `white` a faint filling.

    White outlines have a dark rim outside, so that they are seen on bright tissue too.
    """
    stack = view.stack(mask)
    tiles = []
    for k in slices:
        label = np.asarray(Image.fromarray(stack[k].copy()).resize(size, Image.Resampling.NEAREST))
        colour = np.where(label > 0, (label.astype(np.int64) - 1) % len(CLASS_COLOURS) + 1, 0).astype(np.uint8)
        edge = _edge(label)
        inside = 0 if white else colour + len(CLASS_COLOURS)
        outside = np.where(_edge(label == 0), RIM, 0) if white else 0
        tiles.append(np.where(label == 0, outside, np.where(edge, colour, inside)).astype(np.uint8))
    line = [REFERENCE_COLOUR] * len(CLASS_COLOURS) if white else list(CLASS_COLOURS)
    alpha = [0, *[255] * len(line), *[FILL_ALPHA] * len(line), RIM_ALPHA]
    return _indexed(np.concatenate(tiles), [(0, 0, 0), *line, *line, (0, 0, 0)], alpha)


def _edge(label: Array) -> NDArray[np.bool_]:
    """Pixels of a label that touch another one; the picture's border counts as the same."""
    edge = np.zeros(label.shape, dtype=bool)
    down, across = label[1:] != label[:-1], label[:, 1:] != label[:, :-1]
    edge[1:] |= down
    edge[:-1] |= down
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    return edge & (label > 0)


def uncertainty_strip(level: Array, view: View, slices: Sequence[int], size: tuple[int, int]) -> Image.Image:
    """Slices of the uncertainty below each other: clear where it is low, through red to yellow where it is high."""
    stack = view.stack(level)
    tiles = [np.asarray(Image.fromarray(stack[k].copy()).resize(size, Image.Resampling.NEAREST)) for k in slices]
    share = np.linspace(0, 1, UNCERTAINTY_LEVELS)
    palette = [(round(150 + 105 * s), round(230 * s), round(60 * (1 - s))) for s in share]
    return _indexed(np.concatenate(tiles), palette, [0, *(round(60 + 150 * s) for s in share[1:])])


def _indexed(values: Array, palette: Sequence[Colour], alpha: Sequence[int]) -> Image.Image:
    image = Image.fromarray(values.astype(np.uint8), mode="L")
    image.putpalette([channel for colour in palette for channel in colour])
    image.info["transparency"] = bytes(alpha)
    return image
