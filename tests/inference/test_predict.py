"""Files in, files out: a ball at a known place of the world has to be found there, whatever the format and the axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from scarceseg.data.images import read_volume
from scarceseg.errors import ConfigError, DataError, RunError
from scarceseg.functional.sliding import sliding_window
from scarceseg.inference import model as model_module
from scarceseg.inference.export import _file_words
from scarceseg.inference.predictor import Predictor, pick_device, predict
from scarceseg.types import Geometry
from tests.inference.scans import THRESHOLD, Threshold, centroid, overlap, rotation, save_threshold, scan, write_series


@pytest.fixture(autouse=True)
def thresholding(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(_name: str, channels: int, classes: int, _args: Any) -> Threshold:
        return Threshold(channels, classes)

    monkeypatch.setattr(model_module, "build_network", build)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return save_threshold(tmp_path / "run")


def silent(_done: float, _total: int, _name: str) -> None:
    """No progress bar in the tests' output."""


def put(image: sitk.Image, folder: Path, suffix: str, name: str = "scan") -> Path:
    folder.mkdir(exist_ok=True)
    if suffix == "dicom":
        write_series(image, folder / name)
        return folder / name
    sitk.WriteImage(image, str(folder / f"{name}{suffix}"))
    return folder / f"{name}{suffix}"


def same_grid(a: sitk.Image, b: sitk.Image, tolerance: float = 1e-3) -> None:
    assert a.GetSize() == b.GetSize()
    np.testing.assert_allclose(a.GetSpacing(), b.GetSpacing(), atol=tolerance)
    np.testing.assert_allclose(a.GetOrigin(), b.GetOrigin(), atol=tolerance)
    np.testing.assert_allclose(a.GetDirection(), b.GetDirection(), atol=tolerance)


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha", "dicom"])
def test_the_mask_lies_where_the_structure_is(run: Path, tmp_path: Path, suffix: str, seed: int) -> None:
    image, centre = scan(direction=rotation(seed))
    source = put(image, tmp_path / "in", suffix)
    written = predict(run, [source], tmp_path / "out", on_progress=silent)
    assert [path.name for path in written] == ["scan.nii.gz" if suffix == "dicom" else f"scan{suffix}"]
    mask = sitk.ReadImage(str(written[0]))
    assert mask.GetPixelID() == sitk.sitkUInt8
    same_grid(mask, image)
    assert np.abs(centroid(mask) - centre).max() < 0.25  # a tenth of a voxel diagonal
    assert overlap(sitk.GetArrayFromImage(mask) == 1, sitk.GetArrayFromImage(image) > THRESHOLD) > 0.97


@pytest.mark.parametrize("flip", [(1, -1, 1), (-1, -1, 1), (-1, 1, -1)])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_axes_in_any_order_and_sense(run: Path, tmp_path: Path, order: tuple[int, ...], flip: tuple[int, ...]) -> None:
    direction = (np.eye(3) * flip)[:, list(order)]
    image, centre = scan(direction=direction)
    written = predict(run, [put(image, tmp_path / "in", ".nrrd")], tmp_path / "out", on_progress=silent)
    mask = sitk.ReadImage(str(written[0]))
    same_grid(mask, image)
    assert np.abs(centroid(mask) - centre).max() < 0.25


@pytest.mark.parametrize("size", [(7, 61, 13), (17, 16, 15), (33, 5, 40)])
def test_odd_sizes_and_sides_shorter_than_the_patch(run: Path, tmp_path: Path, size: tuple[int, int, int]) -> None:
    image, _ = scan(size=size, direction=rotation(4), radius_mm=4)
    written = predict(run, [put(image, tmp_path / "in", ".nii.gz")], tmp_path / "out", on_progress=silent)
    mask = sitk.ReadImage(str(written[0]))
    same_grid(mask, image)
    assert overlap(sitk.GetArrayFromImage(mask) == 1, sitk.GetArrayFromImage(image) > THRESHOLD) > 0.9


@pytest.mark.parametrize(
    "windows", [{}, {"legacy": True}, {"whole": True}, {"tta": True}, {"tta": True, "whole": True}]
)
def test_a_coarser_plan_still_gives_the_grid_of_the_input(tmp_path: Path, windows: dict[str, bool]) -> None:
    run = save_threshold(tmp_path / "coarse", spacing=2.0)
    image, centre = scan(direction=rotation(5), radius_mm=8)
    written = predict(run, [put(image, tmp_path / "in", ".mha")], tmp_path / "out", on_progress=silent, **windows)
    mask = sitk.ReadImage(str(written[0]))
    same_grid(mask, image)
    assert np.abs(centroid(mask) - centre).max() < 0.4


@pytest.mark.parametrize("size", [(7, 61, 13), (33, 5, 40)])
def test_a_whole_volume_goes_through_the_network_once(
    run: Path, tmp_path: Path, size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    forward = Threshold.forward

    def spy(self: Threshold, image: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(image.shape))
        return forward(self, image)

    monkeypatch.setattr(Threshold, "forward", spy)
    monkeypatch.setattr(Threshold, "divisor", (8, 8, 4))
    image, _ = scan(size=size, direction=rotation(4), radius_mm=4)
    source = put(image, tmp_path / "in", ".nii.gz")
    written = predict(run, [source], tmp_path / "out", whole=True, on_progress=silent)
    mask = sitk.ReadImage(str(written[0]))
    same_grid(mask, image)
    assert overlap(sitk.GetArrayFromImage(mask) == 1, sitk.GetArrayFromImage(image) > THRESHOLD) > 0.9
    x, y, z = Predictor(run).prepare(*read_volume([source])).image.shape[1:]
    assert seen == [(1, 1, -(-x // 8) * 8, -(-y // 8) * 8, -(-z // 4) * 4)]


def test_a_network_of_patches_alone_says_so_and_two_ways_exclude_each_other(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Threshold, image: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("size mismatch")

    image, _ = scan()
    source = put(image, tmp_path / "in", ".mha")
    with pytest.raises(ConfigError, match="exclude each other"):
        predict(run, [source], tmp_path / "out", whole=True, legacy=True, on_progress=silent)
    monkeypatch.setattr(Threshold, "forward", refuse)
    with pytest.raises(RunError, match=r"in one piece \(size mismatch\): predict without 'whole'"):
        predict(run, [source], tmp_path / "out", whole=True, on_progress=silent)


def test_several_channels_are_taken_in_their_order(tmp_path: Path) -> None:
    run = save_threshold(tmp_path / "run2", channels=2)
    other, _ = scan(at=(0.7, 0.3, 0.6))
    image, centre = scan()  # the network looks at the last channel
    for case in ("b", "a"):
        put(other, tmp_path / "in", ".nii.gz", f"{case}_0000")
        put(image, tmp_path / "in", ".nii.gz", f"{case}_0001")
    written = predict(run, tmp_path / "in", tmp_path / "out", on_progress=silent)
    assert [path.name for path in written] == ["a.nii.gz", "b.nii.gz"]
    assert np.abs(centroid(sitk.ReadImage(str(written[1]))) - centre).max() < 0.25


def test_probabilities_and_uncertainty_lie_on_the_input_and_agree(tmp_path: Path) -> None:
    run = save_threshold(tmp_path / "run4", classes=4, spacing=1.3)
    image, _ = scan(direction=rotation(6))
    source = put(image, tmp_path / "in", ".nii.gz")
    written = predict(run, [source], tmp_path / "out", probabilities=True, uncertainty=True, on_progress=silent)
    assert [path.name for path in written] == [
        "scan.nii.gz",
        "scan_prob_background.nii.gz",
        "scan_prob_ball.nii.gz",
        "scan_prob_left_right_part_2.nii.gz",
        "scan_prob_left_right_part_3.nii.gz",
        "scan_uncertainty.nii.gz",
    ]
    images = [sitk.ReadImage(str(path)) for path in written]
    for one in images:
        same_grid(one, image)
    assert {one.GetPixelID() for one in images[1:]} == {sitk.sitkFloat32}
    arrays = [sitk.GetArrayFromImage(one) for one in images]
    probability = np.stack(arrays[1:5])
    np.testing.assert_allclose(probability.sum(0), 1, atol=1e-4)
    np.testing.assert_array_equal(probability.argmax(0), arrays[0])
    entropy = -(probability * np.log(np.maximum(probability, 1e-30))).sum(0) / np.log(4)
    np.testing.assert_allclose(arrays[5], entropy, atol=1e-4)
    assert arrays[5].min() >= 0
    assert arrays[5].max() <= 1
    edge = np.abs(probability[0] - probability[1]) < 0.1
    assert edge.any()
    assert arrays[5][edge].min() > arrays[5][~edge & (arrays[0] == 0)].mean()


def test_several_runs_give_the_mean_of_their_probabilities(tmp_path: Path) -> None:
    runs = [save_threshold(tmp_path / f"run{i}", classes=3, spacing=s) for i, s in enumerate((1.3, 2.0, 1.0))]
    source = put(scan(direction=rotation(6))[0], tmp_path / "in", ".nii.gz")
    said: list[float] = []

    def arrays(runs: Any, name: str) -> list[np.ndarray]:
        written = predict(
            runs,
            [source],
            tmp_path / name,
            probabilities=True,
            uncertainty=True,
            on_progress=lambda done, *_: said.append(done),
        )
        return [sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in written]

    alone = [arrays(run, f"alone{i}") for i, run in enumerate(runs)]
    said.clear()
    label, *probability, uncertainty = arrays(runs, "all")
    assert said == sorted(said) and said[-1] == 1
    mean = np.mean([one[1:4] for one in alone], axis=0)
    np.testing.assert_allclose(probability, mean, atol=1e-6)
    np.testing.assert_array_equal(label, np.argmax(probability, axis=0))
    assert any((label != one[0]).any() for one in alone)
    entropy = -(mean * np.log(np.maximum(mean, 1e-30))).sum(0) / np.log(3)
    np.testing.assert_allclose(uncertainty, entropy, atol=1e-4)
    for once, again in zip(alone[0], arrays([runs[0]], "one"), strict=True):
        np.testing.assert_array_equal(once, again)


def test_runs_that_do_not_go_together_are_refused(run: Path, tmp_path: Path) -> None:
    source = put(scan()[0], tmp_path / "in", ".nii.gz")
    for settings, words in (({"classes": 3}, "the same classes"), ({"channels": 2}, "the same channels")):
        other = save_threshold(tmp_path / "other", **settings)
        with pytest.raises(RunError, match=f"{words} to average, got .*: predict with them one by one"):
            predict([run, other], [source], tmp_path / "out", on_progress=silent)
    with pytest.raises(RunError, match="no run to predict with"):
        predict([], [source], tmp_path / "out", on_progress=silent)


def test_uncertainty_reaches_both_ends(run: Path) -> None:
    geometry = Geometry((16, 16, 16), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0))
    predictor = Predictor(run, device="cpu")
    undecided = predictor.predict_volume(np.full((1, 16, 16, 16), THRESHOLD, np.float32), geometry)
    certain = predictor.predict_volume(np.full((1, 16, 16, 16), 1e5, np.float32), geometry)
    np.testing.assert_allclose(undecided.uncertainty, 1, atol=1e-5)
    np.testing.assert_allclose(certain.uncertainty, 0, atol=1e-5)
    assert np.isfinite(certain.uncertainty).all()


def test_largest_component_is_an_option(run: Path, tmp_path: Path) -> None:
    big, centre = scan(radius_mm=6)
    small, _ = scan(at=(0.85, 0.1, 0.9), radius_mm=3)
    source = put(sitk.Maximum(big, small), tmp_path / "in", ".nii.gz")
    both, one = (
        sitk.ReadImage(str(predict(run, [source], tmp_path / name, largest_component=only, on_progress=silent)[0]))
        for name, only in (("both", False), ("one", True))
    )
    assert sitk.GetArrayFromImage(both).sum() > sitk.GetArrayFromImage(one).sum()
    assert np.abs(centroid(one) - centre).max() < 0.25 < np.abs(centroid(both) - centre).max()


def test_the_largest_component_of_some_classes(run: Path, tmp_path: Path) -> None:
    big, _ = scan(radius_mm=6)
    small, _ = scan(at=(0.85, 0.1, 0.9), radius_mm=3)
    source = put(sitk.Maximum(big, small), tmp_path / "in", ".nii.gz")
    name = Predictor(run, device="cpu").classes[1]

    def voxels(out: str, only: bool | str | list[str]) -> int:
        (written,) = predict(run, [source], tmp_path / out, largest_component=only, on_progress=silent)
        return int(sitk.GetArrayFromImage(sitk.ReadImage(str(written))).sum())

    assert (
        voxels("none", [])
        == voxels("off", False)
        > voxels("all", True)
        == voxels("named", name)
        == voxels("list", [name])
    )
    for wrong in ("bal", "background", [name, "spleen"]):
        with pytest.raises(ConfigError, match=f"there is no class .*{name}"):
            predict(run, [source], tmp_path / "wrong", largest_component=wrong, on_progress=silent)


def test_a_bad_file_does_not_lose_the_others(run: Path, tmp_path: Path) -> None:
    image, _ = scan()
    for name in "abcd":
        put(image, tmp_path / "in", ".nii.gz", name)
    whole = (tmp_path / "in" / "a.nii.gz").read_bytes()
    (tmp_path / "in" / "b.nii.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in" / "d.nii.gz").write_text("not an image")
    with pytest.raises(DataError, match="2 of 4 cases failed") as caught:
        predict(run, [tmp_path / "in"], tmp_path / "out", on_progress=silent)
    assert "b:" in str(caught.value)
    assert "d:" in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.nii.gz", "c.nii.gz"]


def test_a_wrong_number_of_channels_is_told(tmp_path: Path) -> None:
    run = save_threshold(tmp_path / "run2", channels=2)
    source = put(scan()[0], tmp_path / "in", ".nii.gz", "a_0000")
    with pytest.raises(DataError, match="_0001"):
        predict(run, [source], tmp_path / "out", on_progress=silent)


def test_an_unwritable_folder_is_told_before_any_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = put(scan()[0], tmp_path / "in", ".nii.gz")
    monkeypatch.setattr(Predictor, "predict_prepared", lambda *_: pytest.fail("worked before looking"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="choose another folder"):
        predict(run, [source], tmp_path / "file", on_progress=silent)


def test_an_input_is_never_replaced(run: Path, tmp_path: Path) -> None:
    source = put(scan()[0], tmp_path / "in", ".nii.gz")
    before = source.read_bytes()
    with pytest.raises(DataError, match="would replace an input"):
        predict(run, [source], tmp_path / "in", on_progress=silent)
    assert source.read_bytes() == before


def test_earlier_results_are_replaced_skipped_or_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sources, out = [put(scan()[0], tmp_path / "in", ".nii.gz", name) for name in "abc"], tmp_path / "out"
    mine, after = predict(run, sources[:2], out, on_progress=silent)
    whole = after.read_bytes()
    mine.write_bytes(b"corrected by hand")
    written = predict(run, sources, out, uncertainty=True, existing="skip", on_progress=silent)
    assert [path.name for path in written] == [
        f"{x}.nii.gz" for x in ("a_uncertainty", "b_uncertainty", "c", "c_uncertainty")
    ]
    assert mine.read_bytes() == b"corrected by hand" and after.read_bytes() == whole
    capsys.readouterr()
    (out / "b_uncertainty.nii.gz").unlink()
    assert len(predict(run, sources, out, uncertainty=True, existing="skip", on_progress=silent)) == 1
    assert "2 of 3 cases are done" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "predict_prepared", lambda *_: pytest.fail("worked before looking"))
        assert predict(run, sources, out, existing="skip", on_progress=silent) == []
        with pytest.raises(RunError, match=r"2 of 2 results exist already, such as .*a\.nii\.gz"):
            predict(run, sources[:2], out, existing="refuse", on_progress=silent)
        with pytest.raises(ConfigError, match="expected replace, skip, refuse, got 'keep'"):
            predict(run, sources[:2], out, existing="keep", on_progress=silent)  # type: ignore[arg-type]
    predict(run, sources, out, on_progress=silent)
    assert mine.read_bytes() == whole


def test_a_file_that_is_not_finished_is_not_there(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = put(scan()[0], tmp_path / "in", ".nii.gz"), tmp_path / "out"

    def half(_image: sitk.Image, path: str, **_settings: Any) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("scarceseg.data.images.sitk.WriteImage", half)
        with pytest.raises(KeyboardInterrupt):
            predict(run, [source], out, on_progress=silent)
    assert not (out / "scan.nii.gz").exists()
    assert [path.name for path in predict(run, [source], out, existing="skip", on_progress=silent)] == ["scan.nii.gz"]


def test_progress_goes_from_nothing_to_all(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        put(scan()[0], tmp_path / "in", ".nii.gz", name)
    said: list[tuple[float, int, str]] = []
    predict(run, tmp_path / "in", tmp_path / "out", on_progress=lambda *args: said.append(args))
    done = [entry[0] for entry in said]
    assert done == sorted(done)
    assert done[-1] == 2
    assert 0 < done[0] < 1
    assert {entry[1:] for entry in said} == {(2, "a"), (2, "b")}
    predict(run, tmp_path / "in", tmp_path / "out")
    assert "predict 2/2" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there(run: Path, device: str) -> None:
    with pytest.raises(RunError, match="device"):
        Predictor(run, device=device)


def test_an_output_that_is_not_a_number_is_no_empty_mask(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        put(scan()[0], tmp_path / "in", ".nii.gz", name)
    asked: list[int] = []

    def broken(volume: np.ndarray, *args: Any, **settings: Any) -> torch.Tensor:
        asked.append(1)
        found = sliding_window(volume, *args, **settings)
        return found * float("nan") if len(asked) == 1 else found

    monkeypatch.setattr("scarceseg.inference.predictor.sliding_window", broken)
    with pytest.raises(DataError, match=r"1 of 2 cases failed .* a: the network's output .* not a number"):
        predict(run, [tmp_path / "in"], tmp_path / "out", on_progress=silent, device="cpu")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.nii.gz"]


def test_every_class_has_a_probability_file_of_its_own() -> None:
    for classes in (("background", "a_2", "a", "A"), ("background", "a b", "a_b", "a_b_1", "A-b"), ("b", "?", "!")):
        words = [word.lower() for word in _file_words(classes)]
        assert len(set(words)) == len(classes), words
    assert _file_words(("background", "left atrium")) == ["background", "left_atrium"]


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert pick_device("auto") == torch.device("cuda")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:3")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)  # each process may be shown its own alone
    assert pick_device("auto") == torch.device("cuda:0")
    assert pick_device("cpu") == torch.device("cpu")
