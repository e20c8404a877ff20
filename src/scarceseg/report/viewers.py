"""Cases -> what the page's slice viewer shows: grey slices and clear layers on them, as images within the page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from scarceseg.report.encode import jpeg_uri, png_uri
from scarceseg.report.figures import (
    Array,
    Picture,
    View,
    best_view,
    chosen_slices,
    grey_strip,
    mask_strip,
    own_size,
    peak,
    picture,
    pixels_per_mm,
    three_planes,
    tile_size,
    uncertainty_strip,
)
from scarceseg.report.folder import ShownCase

Viewer = dict[str, Any]
Maker = Callable[[int, int], Viewer]
"""A viewer by pixels of the longest side and slices a plane; what does not depend on them is worked out once."""

BUDGET = 6_000_000
"""Characters of all images of a page."""
MOSAIC_SIDE = 1000
"""Pixels of a mosaic's longer side at most."""
SIZES = ((288, 40), (256, 32), (224, 24), (192, 20), (160, 16), (128, 12), (96, 8))
"""Pixels of the longest side and slices a plane, tried until the page is within its budget."""


def within_budget(makers: Iterable[Maker], budget: int | None = None) -> list[Viewer]:
    """Make all viewers at the largest size at which they fit the page together; `budget` in characters, None is `BUDGET`."""
    makers, budget = list(makers), BUDGET if budget is None else budget
    for side, count in SIZES:
        viewers, used = [], 0
        for make in makers:
            viewer = make(side, count)
            used += sum(len(layer["uri"]) for layer in viewer["layers"]) + len(viewer["still"])
            viewers.append(viewer)
            if used > budget:
                break
        else:
            return viewers
    # At the smallest size: as many as fit.
    return viewers[:-1]


def planes_viewer(case: ShownCase, note: str, uncertain: bool = False) -> Maker:
    """Three planes of one case, each with a slider of its own; prediction, reference and uncertainty can be hidden.

    Args:
        case, note: the volume, and words below its title.
        uncertain: whether the uncertainty is to be seen from the start.
    """
    masks = {"prediction": case.prediction}
    if case.reference is not None:
        masks["reference"] = case.reference
    toggles = [(name, True) for name in masks] + ([("uncertainty", uncertain)] if case.uncertainty is not None else [])
    drawn = _drawn(case, masks, case.uncertainty)

    def make(side: int, count: int) -> Viewer:
        shown = drawn()
        scale = pixels_per_mm(shown, side)
        layers: list[dict[str, str]] = []
        panes = []
        for number, view in enumerate(shown.views):
            size, slices, start = _slices(shown, view, scale, count)
            small = own_size(shown, view, size)
            strips = {"image": jpeg_uri(grey_strip(shown, view, slices, small))}
            if shown.uncertainty is not None:
                strips["uncertainty"] = png_uri(uncertainty_strip(shown.uncertainty, view, slices, small))
            for name, mask in shown.masks.items():
                strips[name] = png_uri(mask_strip(mask, view, slices, size, name == "reference"))
            layers += [{"name": f"{kind}:{number}", "uri": uri} for kind, uri in strips.items()]
            panes.append(_pane(view.name, view, size, slices, start, [f"{kind}:{number}" for kind in strips], shown))
        still = _still(shown, list(masks), side)
        return _viewer(case.title, note, toggles, layers, panes, still, together=False)

    return make


def compare_viewer(case: ShownCase, predictions: Mapping[str, Any], notes: Mapping[str, str]) -> Maker:
    """The same slices with each method's prediction beside the reference; one slider moves all.

    Args:
        case: its `prediction` is not looked at.
        predictions: label maps by method.
        notes: words below each method's name, such as its Dice.
    """
    masks = dict(predictions) if case.reference is None else {"reference": case.reference, **predictions}
    toggles = [("mask", True)] + ([("reference", True)] if case.reference is not None else [])
    in_still = [next(iter(predictions)), *(["reference"] if case.reference is not None else [])]
    drawn = _drawn(case, masks)

    def make(side: int, count: int) -> Viewer:
        shown = drawn()
        view = best_view(shown)
        size, slices, start = _slices(shown, view, pixels_per_mm(shown, min(side, 224)), count)
        layers = [{"name": "image:0", "uri": jpeg_uri(grey_strip(shown, view, slices, own_size(shown, view, size)))}]
        if "reference" in shown.masks:
            strip = mask_strip(shown.masks["reference"], view, slices, size, white=True)
            layers.append({"name": "reference:0", "uri": png_uri(strip)})
        panes = []
        for number, (name, mask) in enumerate(shown.masks.items()):
            layers.append({"name": f"mask:{number}", "uri": png_uri(mask_strip(mask, view, slices, size))})
            over = ["reference:0"] if case.reference is not None and name != "reference" else []
            names = ["image:0", f"mask:{number}", *over]
            panes.append(_pane(name, view, size, slices, start, names, shown, notes.get(name, "")))
        return _viewer(case.title, view.name, toggles, layers, panes, _still(shown, in_still, side), together=True)

    return make


def pool_viewer(case: ShownCase, guesses: Mapping[str, Any], note: str) -> Maker:
    """An unlabelled volume: bare, with the labels guessed for it, and with the student's mask; one slider moves all.

    The outline of the first guess lies on the student's mask too.

    Args:
        case: without a reference.
        guesses: label maps by term.
        note: words below the title.
    """
    masks = {**{f"guess of {name}": mask for name, mask in guesses.items()}, "student": case.prediction}
    kinds = {"mask": True, "outline": True, "uncertainty": False}
    drawn = _drawn(case, masks, case.uncertainty)

    def make(side: int, count: int) -> Viewer:
        shown = drawn()
        view = best_view(shown)
        size, slices, start = _slices(shown, view, pixels_per_mm(shown, side), count)
        small = own_size(shown, view, size)
        strips = {"image:0": jpeg_uri(grey_strip(shown, view, slices, small))}
        panes = [_pane("image", view, size, slices, start, ["image:0"], shown)]
        for number, (name, mask) in enumerate(shown.masks.items()):
            strips[f"mask:{number}"] = png_uri(mask_strip(mask, view, slices, size))
            layers = ["image:0", f"mask:{number}"]
            if name == "student":
                if guesses:
                    first = next(iter(shown.masks.values()))
                    strips["outline:0"] = png_uri(mask_strip(first, view, slices, size, white=True))
                    layers.append("outline:0")
                if shown.uncertainty is not None:
                    strips["uncertainty:0"] = png_uri(uncertainty_strip(shown.uncertainty, view, slices, small))
                    layers.insert(1, "uncertainty:0")
            panes.append(_pane(name, view, size, slices, start, layers, shown))
        toggles = [(kind, on) for kind, on in kinds.items() if any(name.startswith(kind) for name in strips)]
        whole = [{"name": name, "uri": uri} for name, uri in strips.items()]
        still = _still(shown, ["student"], side)
        return _viewer(case.title, f"{view.name}. {note}", toggles, whole, panes, still, together=True)

    return make


def mosaic_viewer(title: str, note: str, image: Array, label: Array) -> Viewer:
    """One picture of all slices side by side, with the outline of a label map that can be hidden.

    Args:
        title, note: words above it.
        image: grey values ``[rows, columns]`` uint8.
        label: classes of the same shape; 0 is clear.
    """
    rows, columns = image.shape
    longest = max(rows, columns)
    factor = min(max(1, MOSAIC_SIDE // longest), MOSAIC_SIDE / longest)
    size = (max(round(columns * factor), 1), max(round(rows * factor), 1))
    # A stack of one slice: rows along the first axis, columns along the second.
    view = View("mosaic", 2, 0, 1, (False, False), "")
    shown = Picture(image[..., None], {"pseudo-label": label[..., None]}, None, (1.0, 1.0, 1.0), (view,))
    grey = grey_strip(shown, view, [0], size)
    mask = mask_strip(shown.masks["pseudo-label"], view, [0], size)
    layers = [{"name": "image:0", "uri": jpeg_uri(grey)}, {"name": "pseudo-label:0", "uri": png_uri(mask)}]
    pane = _pane("", view, size, [0], 0, [layer["name"] for layer in layers], shown)
    still = grey.convert("RGBA")
    still.alpha_composite(mask.convert("RGBA"))
    uri = jpeg_uri(still.convert("RGB"))
    return _viewer(title, note, [("pseudo-label", True)], layers, [pane], uri, together=False)


def _drawn(case: ShownCase, masks: Mapping[str, Array], uncertainty: Array | None = None) -> Callable[[], Picture]:
    """The case as it is drawn, made when it is first asked for and then kept."""
    return cache(lambda: picture(case.image, dict(masks), uncertainty, case.spacing_mm, case.direction))


def _still(shown: Picture, names: list[str], side: int) -> str:
    """Three planes in one picture, for readers without scripts."""
    return png_uri(three_planes(shown, names, min(side, 200)), optimize=True)


def _slices(shown: Picture, view: View, scale: float, count: int) -> tuple[tuple[int, int], list[int], int]:
    """Tile size, the slices shown, and the number among them of the one shown first."""
    slices, best = chosen_slices(shown, view, count), peak(shown, view)
    start = min(range(len(slices)), key=lambda k: abs(slices[k] - best))
    return tile_size(shown, view, scale), slices, start


def _pane(
    title: str,
    view: View,
    size: tuple[int, int],
    slices: list[int],
    start: int,
    layers: list[str],
    shown: Picture,
    note: str = "",
) -> dict[str, Any]:
    total = shown.image.shape[view.axis]
    return {
        "title": title,
        "note": note,
        "width": size[0],
        "height": size[1],
        "letters": view.letters,
        "labels": [f"{k + 1} of {total}" for k in slices],
        "start": start,
        "layers": layers,
    }


def _viewer(
    title: str,
    note: str,
    toggles: list[tuple[str, bool]],
    layers: list[dict[str, str]],
    panes: list[dict[str, Any]],
    still: str,
    together: bool,
) -> Viewer:
    return {
        "title": title,
        "note": note,
        "toggles": toggles,
        "layers": layers,
        "panes": panes,
        "still": still,
        "together": together,
    }
