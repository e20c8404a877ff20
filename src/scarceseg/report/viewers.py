"""Cases -> what the page's slice viewer shows: grey slices and clear layers on them, as images within the page."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from scarceseg.report.figures import (
    Picture,
    View,
    best_view,
    chosen_slices,
    grey_strip,
    jpeg_uri,
    mask_strip,
    overlay_png,
    own_size,
    peak,
    picture,
    pixels_per_mm,
    png_uri,
    tile_size,
    uncertainty_strip,
)
from scarceseg.report.folder import ShownCase

Viewer = dict[str, Any]

BUDGET = 6_000_000
"""Characters of all images of a page."""
SIZES = ((288, 40), (256, 32), (224, 24), (192, 20), (160, 16), (128, 12), (96, 8))
"""Pixels of the longest side and slices a plane, tried until the page is within its budget."""


def within_budget(makers: Iterable[Callable[[int, int], Viewer]]) -> list[Viewer]:
    """Make all viewers at the largest size at which they fit the page together."""
    makers = list(makers)
    for side, count in SIZES:
        viewers, used = [], 0
        for make in makers:
            viewer = make(side, count)
            used += sum(len(layer["uri"]) for layer in viewer["layers"]) + len(viewer["still"])
            viewers.append(viewer)
            if used > BUDGET:
                break
        else:
            return viewers
    # At the smallest size: as many as fit.
    return viewers[:-1]


def planes_viewer(case: ShownCase, note: str, side: int, count: int) -> Viewer:
    """Three planes of one case, each with a slider of its own; prediction, reference and uncertainty can be hidden."""
    masks = {"prediction": case.prediction}
    if case.reference is not None:
        masks["reference"] = case.reference
    shown = picture(case.image, masks, case.uncertainty, case.spacing_mm, case.direction)
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
    toggles = [(name, True) for name in masks] + ([("uncertainty", False)] if case.uncertainty is not None else [])
    still = overlay_png(
        case.image,
        case.prediction,
        case.reference,
        spacing_mm=case.spacing_mm,
        direction=case.direction,
        side=min(side, 200),
    )
    return _viewer(case.title, note, toggles, layers, panes, still, together=False)


def compare_viewer(
    case: ShownCase, predictions: Mapping[str, Any], notes: Mapping[str, str], side: int, count: int
) -> Viewer:
    """The same slices with each method's prediction beside the reference; one slider moves all.

    Args:
        case: its `prediction` is not looked at.
        predictions: label maps by method.
        notes: words below each method's name, such as its Dice.
        side, count: pixels of the longest side, slices.
    """
    masks = dict(predictions) if case.reference is None else {"reference": case.reference, **predictions}
    shown = picture(case.image, masks, None, case.spacing_mm, case.direction)
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
        panes.append(
            _pane(name, view, size, slices, start, ["image:0", f"mask:{number}", *over], shown, notes.get(name, ""))
        )
    first = next(iter(predictions.values()))
    still = overlay_png(
        case.image, first, case.reference, spacing_mm=case.spacing_mm, direction=case.direction, side=min(side, 200)
    )
    toggles = [("mask", True)] + ([("reference", True)] if case.reference is not None else [])
    return _viewer(case.title, view.name, toggles, layers, panes, still, together=True)


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
    still: bytes,
    together: bool,
) -> Viewer:
    return {
        "title": title,
        "note": note,
        "toggles": toggles,
        "layers": layers,
        "panes": panes,
        "still": "data:image/png;base64," + base64.b64encode(still).decode(),
        "together": together,
    }
