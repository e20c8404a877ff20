"""`scarceseg segment`: geometry of the mask in every format, frames of the prompt, pieces kept, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

import scarceseg
from scarceseg import cli
from scarceseg.errors import ConfigError, DataError, RunError
from scarceseg.foundation import FOUNDATIONS
from scarceseg.foundation.base import Embedding, Masks, Promptable, check_prompts
from scarceseg.inference.segment import segment
from scarceseg.types import Prompt
from tests.inference.scans import BRIGHT, centroid, rotation, scan, write_series

NAME = "fake-threshold"


class Threshold(Promptable):
    """Inside is what is at least half as bright as the brightest click; a mask prompt or box limits it."""

    name = NAME
    prompt_kinds = frozenset({"point", "box", "mask"})

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, tuple[float, float, float], Prompt]] = []
        self.device = torch.device("cpu")

    def embed(self, image: torch.Tensor, spacing_mm: tuple[float, float, float]) -> Embedding:
        x, y, z = image.shape[2:]
        return Embedding({"image": image.clone()}, (x, y, z), spacing_mm)

    def segment(self, embedding: Embedding, prompts: Sequence[Prompt], previous: Masks | None = None) -> Masks:
        check_prompts(self, embedding, prompts)
        image = embedding.features["image"][:, -1]
        prompt = prompts[0]
        self.seen.append((image, embedding.frame, prompt))
        level = torch.tensor(BRIGHT)
        if prompt.points_voxel is not None and prompt.point_labels is not None:
            inside = prompt.points_voxel[prompt.point_labels == 1].long()
            if len(inside):
                level = image[0][tuple(inside.T)].max()
        logits = (image - level / 2) / 50
        if prompt.box_voxel is not None:
            (a, b, c), (d, e, f) = prompt.box_voxel.long().tolist()
            allowed = torch.zeros_like(logits, dtype=torch.bool)
            allowed[:, a : d + 1, b : e + 1, c : f + 1] = True
            logits = torch.where(allowed, logits, -20.0)
        if prompt.mask is not None:
            logits = torch.where(prompt.mask[None] > 0.5, logits, -20.0)
        return Masks(logits, torch.tensor([0.83]))

    def to(self, device: torch.device) -> Promptable:
        self.device = device
        return self


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Threshold:
    FOUNDATIONS.names()
    monkeypatch.setattr(FOUNDATIONS, "_parts", dict(FOUNDATIONS._parts))
    made = Threshold()
    FOUNDATIONS.register(NAME)(lambda: made)
    return made


def run(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    try:
        cli.main(["segment", *[str(a) for a in arguments]])
        status: Any = 0
    except SystemExit as stop:
        status = stop.code or 0
    captured = capsys.readouterr()
    return int(status), captured.out, captured.err


def voxel(image: sitk.Image, world: np.ndarray) -> str:
    return ",".join(str(i) for i in image.TransformPhysicalPointToIndex([float(v) for v in world]))


def same_grid(a: sitk.Image, b: sitk.Image) -> bool:
    return a.GetSize() == b.GetSize() and all(
        np.allclose(getattr(a, part)(), getattr(b, part)(), atol=1e-4)
        for part in ("GetSpacing", "GetOrigin", "GetDirection")
    )


@pytest.mark.parametrize("seed", [0, 3, 8])
@pytest.mark.parametrize(("suffix", "target"), [(".nii.gz", ".nii.gz"), (".nrrd", ".nrrd"), (".mha", ".nii.gz")])
def test_mask_lies_on_the_image(
    seed: int, suffix: str, target: str, model: Threshold, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, centre = scan(direction=rotation(seed))
    source, out, probability = tmp_path / f"a{suffix}", tmp_path / "new" / f"m{target}", tmp_path / f"p{target}"
    sitk.WriteImage(image, str(source))
    status, text, err = run(
        source, "--foundation", NAME, "--point", voxel(image, centre), "--out", out, "--probabilities", probability,
        "--device", "cpu", capsys=capsys,
    )  # fmt: skip
    assert status == 0, err
    mask = sitk.ReadImage(str(out))
    assert same_grid(mask, image) and mask.GetPixelID() == sitk.sitkUInt8
    expected = sitk.GetArrayFromImage(image) > BRIGHT / 2
    assert np.array_equal(sitk.GetArrayFromImage(mask), expected)
    assert np.linalg.norm(centroid(mask) - centre) < 0.5
    chances = sitk.ReadImage(str(probability))
    assert same_grid(chances, image) and chances.GetPixelID() == sitk.sitkFloat32
    assert np.array_equal(sitk.GetArrayFromImage(chances) > 0.5, expected)
    millilitres = expected.sum() * np.prod(image.GetSpacing()) / 1000
    for part in (f"{expected.sum()} voxels", f"{millilitres:.2f} ml", "quality 0.83", " s"):
        assert part in text


def test_the_model_sees_canonical_axes_and_the_prompt_moves_along(model: Threshold, tmp_path: Path) -> None:
    direction = np.array([[0.0, 0.0, -1.0], [1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])  # sagittal slices
    image, centre = scan(direction=direction)
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"))
    index = image.TransformPhysicalPointToIndex([float(v) for v in centre])
    first = np.zeros(image.GetSize(), np.uint8)
    first[tuple(slice(max(i - 9, 0), i + 9) for i in index)] = 1
    prior = sitk.GetImageFromArray(first.T)
    prior.CopyInformation(image)
    sitk.WriteImage(prior, str(tmp_path / "prior.nrrd"))
    segment(
        tmp_path / "a.nrrd", points=[index], negative=[(0, 0, 0)], box=(1, 2, 3, 20, 21, 15),
        mask=tmp_path / "prior.nrrd", foundation=NAME, device="cpu",
    )  # fmt: skip
    seen, spacing, prompt = model.seen[0]
    turned = sitk.DICOMOrient(image, "RAS" if sitk.DICOMOrient(image, "RAS").GetDirection()[0] < 0 else "LPI")
    assert turned.GetDirection()[0] < 0 and np.allclose(spacing, turned.GetSpacing())
    assert np.array_equal(seen[0].numpy(), sitk.GetArrayFromImage(turned).T.astype(np.float32))
    assert prompt.points_voxel is not None and prompt.box_voxel is not None and prompt.mask is not None
    assert prompt.point_labels is not None and prompt.point_labels.tolist() == [1, 0]
    wanted = turned.TransformPhysicalPointToIndex(image.TransformIndexToPhysicalPoint(index))
    corner = turned.TransformPhysicalPointToIndex(image.TransformIndexToPhysicalPoint((0, 0, 0)))
    assert prompt.points_voxel.tolist() == [list(map(float, wanted)), list(map(float, corner))]
    ends = [
        turned.TransformPhysicalPointToIndex(image.TransformIndexToPhysicalPoint(e)) for e in ((1, 2, 3), (20, 21, 15))
    ]
    assert prompt.box_voxel.tolist() == np.sort(np.array(ends, float), axis=0).tolist()
    moved = sitk.DICOMOrient(prior, "RAS" if sitk.DICOMOrient(image, "RAS").GetDirection()[0] < 0 else "LPI")
    assert np.array_equal(prompt.mask.numpy(), sitk.GetArrayFromImage(moved).T)


def test_world_places(model: Threshold, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, centre = scan(direction=rotation(5))
    source = tmp_path / "a.nii.gz"
    sitk.WriteImage(image, str(source))
    ras = centre * (-1, -1, 1)
    given = {"voxel": ([], voxel(image, centre)), "lps": (["--world"], ",".join(f"{v:.3f}" for v in centre))}
    given["ras"] = (["--ras"], ",".join(f"{v:.3f}" for v in ras))
    for frame, (flags, place) in given.items():
        out = tmp_path / f"{frame}.nii.gz"
        status, _, err = run(source, "--foundation", NAME, "--point", place, *flags, "--out", out, capsys=capsys)
        assert status == 0, err
    clicks = [prompt.points_voxel for _, _, prompt in model.seen]
    assert all(torch.equal(click, clicks[0]) for click in clicks if click is not None and clicks[0] is not None)
    arrays = [sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / f"{frame}.nii.gz"))) for frame in given]
    assert arrays[0].any() and all(np.array_equal(array, arrays[0]) for array in arrays)
    status, _, err = run(
        source,
        "--foundation",
        NAME,
        "--point",
        given["ras"][1],
        "--world",
        "--out",
        tmp_path / "x.nii.gz",
        capsys=capsys,
    )
    assert status == 2 and "lies outside the volume" in err and "LPS millimetres" in err


def test_world_box_is_the_voxel_box_around_it(model: Threshold, tmp_path: Path) -> None:
    image, centre = scan(direction=rotation(5))
    sitk.WriteImage(image, str(tmp_path / "a.nii.gz"))
    low, high = centre - 2.0, centre + 2.0
    result = segment(tmp_path / "a.nii.gz", box=[*high, *low], foundation=NAME, frame="lps", device="cpu")
    corners = [(x, y, z) for x in (low[0], high[0]) for y in (low[1], high[1]) for z in (low[2], high[2])]
    index = np.array([image.TransformPhysicalPointToContinuousIndex([float(v) for v in c]) for c in corners])
    a, b = np.rint(index.min(0)).astype(int), np.rint(index.max(0)).astype(int)
    allowed = np.zeros(image.GetSize(), bool)
    allowed[tuple(slice(i, j + 1) for i, j in zip(np.maximum(a, 0), b, strict=True))] = True
    bright = sitk.GetArrayFromImage(image).T > BRIGHT / 2
    assert np.array_equal(result.mask == 1, bright & allowed) and 0 < result.voxels < bright.sum()
    with pytest.raises(DataError, match="the box lies outside the image.*LPS"):
        segment(tmp_path / "a.nii.gz", box=[*(high + 500), *(low + 500)], foundation=NAME, frame="lps")


def two_balls(folder: Path) -> tuple[Path, np.ndarray]:
    array = np.zeros((24, 20, 16), np.int16)
    array[2:8, 2:8, 2:8] = 900
    array[14:20, 10:16, 8:12] = 1000
    sitk.WriteImage(sitk.GetImageFromArray(array.T), str(folder / "two.nii.gz"))
    return folder / "two.nii.gz", array > 0


def test_pieces_with_a_click_are_kept(model: Threshold, tmp_path: Path) -> None:
    path, both = two_balls(tmp_path)
    clicked = segment(path, points=[(3, 3, 3)], foundation=NAME, device="cpu")
    assert np.array_equal(clicked.mask == 1, both & (np.arange(24) < 10)[:, None, None]) and not clicked.notes
    assert np.array_equal(clicked.probability > 0.5, both)
    every = segment(path, points=[(3, 3, 3)], foundation=NAME, device="cpu", keep="all")
    assert np.array_equal(every.mask == 1, both)
    two = segment(path, points=[(3, 3, 3), (15, 11, 9)], foundation=NAME, device="cpu")
    assert np.array_equal(two.mask == 1, both)
    boxed = segment(path, box=(0, 0, 0, 23, 19, 15), foundation=NAME, device="cpu")
    assert np.array_equal(boxed.mask == 1, both)
    partly = segment(path, points=[(3, 3, 3), (23, 0, 0)], foundation=NAME, device="cpu")
    assert np.array_equal(partly.mask, clicked.mask) and "1 of the clicks inside lie outside" in partly.notes[0]
    # Only a click outside, which no piece can hold: everything stays.
    nowhere = segment(path, points=[(23, 0, 0)], foundation=NAME, device="cpu")
    assert np.array_equal(nowhere.mask == 1, both) and "every piece was kept" in nowhere.notes[0]
    outside = segment(path, negative=[(0, 0, 0)], foundation=NAME, device="cpu")
    assert np.array_equal(outside.mask == 1, both) and not outside.notes


def test_mask_prompt_and_empty_answer(model: Threshold, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, both = two_balls(tmp_path)
    prior = np.zeros(both.shape, np.float32)
    prior[:12] = 0.9
    file = sitk.GetImageFromArray(prior.T)
    sitk.WriteImage(file, str(tmp_path / "prior.nrrd"))
    result = segment(path, mask=tmp_path / "prior.nrrd", foundation=NAME, device="cpu")
    assert np.array_equal(result.mask == 1, both & (prior > 0))
    status, out, err = run(
        path, "--foundation", NAME, "--box", "0,0,0,1,1,1", "--out", tmp_path / "m.nrrd", capsys=capsys
    )
    assert status == 0 and "0 voxels" in out and "warning: the mask is empty" in err
    for change, problem in (
        (prior * 3, "probabilities in \\[0, 1\\], got values from 0 to 2.7"),
        (prior[1:], "does not lie on"),
    ):
        sitk.WriteImage(sitk.GetImageFromArray(change.T), str(tmp_path / "bad.nrrd"))
        with pytest.raises(DataError, match=problem):
            segment(path, mask=tmp_path / "bad.nrrd", foundation=NAME)


def test_channels_of_one_file(model: Threshold, tmp_path: Path) -> None:
    image, centre = scan(direction=rotation(3))
    dark = sitk.Cast(image * 0, sitk.sitkInt16)
    dark.CopyInformation(image)
    click = image.TransformPhysicalPointToIndex([float(v) for v in centre])
    sitk.WriteImage(sitk.JoinSeries([dark, image]), str(tmp_path / "4d.nii.gz"))
    sitk.WriteImage(sitk.Compose(dark, image), str(tmp_path / "vector.nrrd"))
    for name in ("4d.nii.gz", "vector.nrrd"):
        result = segment(tmp_path / name, points=[click], foundation=NAME, channel=1, out=tmp_path / f"m{name}")
        assert np.array_equal(result.mask.T, sitk.GetArrayFromImage(image) > BRIGHT / 2)
        assert same_grid(sitk.ReadImage(str(tmp_path / f"m{name}")), image)
        with pytest.raises(DataError, match="holds 2 channels: choose one, counted from 0"):
            segment(tmp_path / name, points=[click], foundation=NAME)
        with pytest.raises(DataError, match="holds 2 channels, counted from 0: got 2"):
            segment(tmp_path / name, points=[click], foundation=NAME, channel=2)
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"))
    assert segment(tmp_path / "a.nrrd", points=[click], foundation=NAME, channel=0).voxels == result.voxels
    with pytest.raises(DataError, match="holds 1 channel, counted from 0: got 1"):
        segment(tmp_path / "a.nrrd", points=[click], foundation=NAME, channel=1)


def test_a_channel_of_a_skewed_grid_is_refused(model: Threshold, tmp_path: Path) -> None:
    path = tmp_path / "skewed.nrrd"
    image = sitk.GetImageFromArray(np.zeros((6, 5, 4), np.float32))
    sitk.WriteImage(sitk.Compose(image, image), str(path))
    assert segment(path, points=[(1, 1, 1)], foundation=NAME, channel=1).voxels >= 0
    text = path.read_bytes()
    assert text.count(b"(1,0,0) (0,1,0)") == 1
    path.write_bytes(text.replace(b"(1,0,0) (0,1,0)", b"(1,0.5,0) (0,1,0)"))
    with pytest.raises(DataError, match="axes at right angles"):
        segment(path, points=[(1, 1, 1)], foundation=NAME, channel=1)


def test_dicom_series(model: Threshold, tmp_path: Path) -> None:
    image, centre = scan(size=(20, 22, 12), direction=np.eye(3))
    write_series(image, tmp_path / "series")
    result = segment(
        tmp_path / "series", points=[tuple(centre)], frame="lps", foundation=NAME, out=tmp_path / "m.nii.gz"
    )
    with pytest.raises(DataError, match="holds 1 channel, counted from 0: got 2"):
        segment(tmp_path / "series", points=[tuple(centre)], frame="lps", foundation=NAME, channel=2)
    mask = sitk.ReadImage(str(tmp_path / "m.nii.gz"))
    assert same_grid(mask, image) and result.voxels == (sitk.GetArrayFromImage(image) > BRIGHT / 2).sum()


def test_bad_input_is_one_message(model: Threshold, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = two_balls(tmp_path)
    out = tmp_path / "m.nii.gz"
    point = ["--point", "3,3,3"]
    cases: list[tuple[list[object], str]] = [
        (
            [path, "--point", "24,0,0"],
            "point (24.0, 0.0, 0.0) lies outside the volume: expected voxel indices from (0, 0, 0)",
        ),
        ([path, "--point", "-3,0,0"], "point (-3.0, 0.0, 0.0) lies outside"),
        ([path, "--box", "0,0,0,5,5,16"], "box corner (5.0, 5.0, 16.0) lies outside"),
        ([path, "--point", "1,2"], "--point: expected 3 numbers (X,Y,Z), got 1, 2"),
        ([path, "--point", "a,b,c"], "--point: expected X,Y,Z, got 'a,b,c'"),
        ([path, "--negative", "nan,1,1"], "--negative: expected 3 numbers"),
        ([path, "--box", "1,2,3"], "--box: expected 6 numbers (X0,Y0,Z0,X1,Y1,Z1)"),
        ([path], "an empty prompt; give at least one of box, mask, point"),
        ([path, *point, "--keep", "some"], "keep: expected clicked or all, got 'some'"),
        ([path, *point, "--view", "mosaic"], f"'{NAME}' has no option 'view'"),
        ([path, *point, "--foundation", "fake-treshold"], "did you mean 'fake-threshold'?"),
        ([tmp_path / "none.nii.gz", *point], "there is no image"),
        ([path, *point, "--device", "tpu9"], "device: expected auto, cpu"),
    ]
    for arguments, message in cases:
        named = [] if "--foundation" in arguments else ["--foundation", NAME]
        status, _, err = run(*arguments, *named, "--out", out, capsys=capsys)
        assert status == 2 and message in err and "Traceback" not in err, (arguments, err)
        assert len(err.strip().splitlines()) == 1 and not out.exists()


def test_results_that_cannot_be_written_are_refused_before_the_work(model: Threshold, tmp_path: Path) -> None:
    path, _ = two_balls(tmp_path)
    (tmp_path / "file").write_text("")
    for out, problem in (
        (path, "would replace an input"),
        (tmp_path / "m.png", "expected a name that ends in .nii.gz"),
        (tmp_path / "m.nhdr", "expected a name that ends in .nii.gz"),
        (tmp_path / "file" / "m.nrrd", "cannot write into"),
    ):
        with pytest.raises(RunError, match=problem):
            segment(path, points=[(3, 3, 3)], foundation=NAME, out=out)
    with pytest.raises(RunError, match="would replace another result"):
        segment(path, points=[(3, 3, 3)], foundation=NAME, out=tmp_path / "m.nrrd", probabilities=tmp_path / "m.nrrd")
    assert not model.seen


def test_python_function_takes_a_loaded_model(tmp_path: Path) -> None:
    path, both = two_balls(tmp_path)
    model = Threshold()
    for _ in range(2):
        result = scarceseg.segment(path, points=[(15, 11, 9)], foundation=model, device="cpu")
        assert (
            result.voxels == 6 * 6 * 4 and result.quality == pytest.approx(0.83) and result.geometry.size == both.shape
        )
    assert len(model.seen) == 2
    with pytest.raises(ConfigError, match="view.*takes no options"):
        scarceseg.segment(path, points=[(15, 11, 9)], foundation=model, device="cpu", view="mosaic")


def test_a_model_without_prompts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = two_balls(tmp_path)
    FOUNDATIONS.names()
    monkeypatch.setattr(FOUNDATIONS, "_parts", dict(FOUNDATIONS._parts))

    def builder() -> Any:
        return object()

    FOUNDATIONS.register("only-tunable")(builder)
    with pytest.raises(ConfigError, match="takes no prompts"):
        segment(path, points=[(3, 3, 3)], foundation="only-tunable")
