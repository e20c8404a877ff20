"""Pictures: colours where they belong, turned as a radiologist expects, slices that show something."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from scarceseg.data.geometry import CANONICAL_DIRECTION
from scarceseg.report.encode import png_uri
from scarceseg.report.figures import (
    CLASS_COLOURS,
    PATIENT_VIEWS,
    _score,
    best_view,
    chosen_slices,
    mask_strip,
    overlay_png,
    peak,
    picture,
    tile_size,
)

LPS = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def near(image: np.ndarray, colour: tuple[int, int, int], tolerance: int = 12) -> np.ndarray:
    return np.abs(image - np.array(colour)).max(axis=2) <= tolerance


def test_overlay_outlines_prediction_in_colour_and_reference_in_white() -> None:
    image = np.zeros((20, 20, 20), np.float32)
    prediction, reference = np.zeros(image.shape, np.uint8), np.zeros(image.shape, np.uint8)
    prediction[4:9, 4:9, 4:9] = 2
    reference[11:16, 11:16, 4:9] = 1
    shown = pixels(overlay_png(image, prediction, reference, at=(6, 6, 6), side=100))
    assert shown.shape == (100, 304, 3)
    first = shown[:, :100]  # x-y plane: x to the right, y down, five pixels a voxel
    blue, white = near(first, CLASS_COLOURS[1]), near(first, (255, 255, 255))
    assert np.argwhere(blue).min(axis=0).tolist() == [20, 20] and np.argwhere(blue).max(axis=0).tolist() == [44, 44]
    assert np.argwhere(white).min(axis=0).tolist() == [55, 55] and np.argwhere(white).max(axis=0).tolist() == [79, 79]
    assert not near(first, CLASS_COLOURS[0]).any()
    assert first[30, 30].max() > 20  # faint filling of the prediction
    assert first[67, 67].max() == 0  # the reference is not filled
    assert not near(pixels(overlay_png(image, prediction, at=(6, 6, 6))), (255, 255, 255)).any()


@pytest.mark.parametrize("direction", [CANONICAL_DIRECTION, LPS, (0, 0, -1, 1, 0, 0, 0, -1, 0)])
def test_known_directions_are_drawn_as_a_radiologist_sees_them(direction: tuple[float, ...]) -> None:
    """A mark at the patient's right, front and head is at the picture's left and top, whatever the file's axes."""
    matrix = np.reshape(direction, (3, 3))
    mark = np.zeros((18, 18, 18), np.uint8)
    toward = matrix.T @ np.array([-1, -1, 1])  # right, front, head in LPS
    mark[tuple(slice(12, 15) if step > 0 else slice(3, 6) for step in toward)] = 1
    shown = pixels(overlay_png(mark.astype(np.float32) * 0, mark, direction=direction, side=90))
    for number in range(3):
        tile = shown[:, number * 92 : number * 92 + 90]
        row, column = np.argwhere(near(tile, CLASS_COLOURS[0])).mean(axis=0)
        assert row < 40 and column < 40, PATIENT_VIEWS[number].name


def test_unequal_spacing_keeps_the_patient_s_proportions() -> None:
    image = np.random.default_rng(0).random((40, 20, 10)).astype(np.float32)
    shown = picture(image, {}, spacing_mm=(1.0, 2.0, 5.0))
    assert [tile_size(shown, view, 2.0) for view in shown.views] == [(80, 80), (80, 100), (80, 100)]


def test_slices_and_views_show_what_there_is() -> None:
    label = np.zeros((30, 30, 40), np.uint8)
    label[10:20, 10:14, 30:36] = 1
    label[10:20, 10:14, 5:9] = 2
    shown = picture(label.astype(np.float32), {"prediction": label})
    axial, _coronal, _ = shown.views
    slices = chosen_slices(shown, axial, 8)
    assert len(slices) == 8 and slices[0] <= 5 and slices[-1] >= 35 and slices == sorted(set(slices))
    assert chosen_slices(shown, axial, 500) == list(range(2, 39))
    assert peak(shown, axial) in {*range(30, 36), *range(5, 9)}
    assert best_view(shown).axis != 2  # both classes lie in one x-z or y-z plane
    nothing = picture(label.astype(np.float32), {"prediction": label * 0})
    assert peak(nothing, axial) == 20 and chosen_slices(nothing, axial, 500) == list(range(40))


def test_a_class_counts_where_there_is_no_background() -> None:
    label = np.ones((8, 8, 10), np.uint8)
    label[:, :, 7:] = 2
    shown = picture(label.astype(np.float32), {"prediction": label})
    assert _score(shown, shown.views[0]).tolist() == [1.0] * 10


def test_layers_are_clear_outside_of_the_mask() -> None:
    label = np.zeros((10, 10, 4), np.uint8)
    label[3:7, 3:7] = 1
    view = picture(label.astype(np.float32), {}).views[0]
    uri = png_uri(mask_strip(label, view, [1, 2], (10, 10)))
    alpha = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGBA"))[..., 3]
    assert alpha.shape == (20, 10)
    assert alpha[0, 0] == 0 and alpha[3, 3] == 255 and 0 < alpha[4, 4] < 255
    np.testing.assert_array_equal(alpha[:10], alpha[10:])


def test_constant_and_broken_images_can_be_drawn() -> None:
    label = np.zeros((6, 7, 8), np.uint8)
    assert overlay_png(np.full((6, 7, 8), 3.0), label)[:4] == b"\x89PNG"
    image = np.full((6, 7, 8), np.nan, np.float32)
    assert picture(image, {"prediction": label}, image).image.max() == 0
    with pytest.raises(ValueError, match="expected the shape of the image"):
        overlay_png(np.zeros((6, 7, 8)), np.zeros((6, 7, 9), np.uint8))
