"""What a run keeps of its unlabelled volumes for the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scarceseg.config import Config
from scarceseg.engine import pictures
from scarceseg.engine.run import train
from scarceseg.foundation.sam_volume import SamPromptable
from scarceseg.foundation.stitching import Stitch
from scarceseg.methods.pseudo_labels import PseudoLabels
from tests.foundation.small import small_sam
from tests.tiny import tiny_config, tiny_dataset

pytestmark = pytest.mark.usefixtures("small_foundation")

SFR = {"sfr": {"tune_iterations": 1}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two labelled cases and five unlabelled ones whose label files cannot be read, one case to validate."""
    folder = tmp_path_factory.mktemp("data")
    data = tiny_dataset(folder / "data", cases=8)
    for case in ("case_02", "case_03", "case_04", "case_05", "case_06"):
        (data / "labelsTr" / f"{case}.nii.gz").write_bytes(b"not an image")
    config = tiny_config(data, method="mean-teacher+sfr", terms=SFR, iterations=1, val=["case_07"])
    train(config, folder / "run", cache=folder / "cache")
    return folder / "run"


def arrays(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def test_least_median_and_most_confident_volume_are_kept(run: Path) -> None:
    table = json.loads((run / "stages" / "sfr-label" / PseudoLabels.TABLE).read_text())["cases"]
    order = sorted(table, key=lambda case: table[case][pictures.CONFIDENCE])
    paths = sorted((run / "figures" / "unlabelled").glob("*.npz"))
    assert [path.stem for path in paths] == [f"0_{order[0]}", f"1_{order[2]}", f"2_{order[4]}"]
    labels = PseudoLabels(run / "stages" / "sfr-label")
    for path, rank in zip(paths, ("least confident", "median", "most confident"), strict=True):
        kept, case = arrays(path), path.stem[2:]
        assert str(kept["title"]) == f"{case} ({rank})"
        np.testing.assert_array_equal(kept["guess_0"], labels.label(case))
        assert kept["prediction"].shape == kept["image"].shape == kept["guess_0"].shape
        assert kept["image"].dtype == np.uint8 and "reference" not in kept
        assert kept["uncertainty"].min() >= 0 and kept["uncertainty"].max() <= 1
        about = json.loads(str(kept["about"]))
        sure = pytest.approx(table[case][pictures.CONFIDENCE])
        assert about == {"terms": ["sfr"], "confidence": {"sfr": sure}, "silent": []}
    assert json.loads((run / "figures" / pictures.POOL / pictures.LEARNT).read_text()) == {}


def test_guesses_that_are_not_learnt_are_named(run: Path, tmp_path: Path) -> None:
    """With `surest`, in the folder and on the page."""
    values = Config.load(run / "config.yaml").model_dump()
    values["terms"]["sfr"] |= {"surest": 0.4, "tuned_in": str(run)}
    train(Config.build(values), tmp_path / "run")
    learnt = json.loads((tmp_path / "run" / "figures" / pictures.POOL / pictures.LEARNT).read_text())
    labels = PseudoLabels(tmp_path / "run" / "stages" / "sfr-label")
    assert learnt == {"sfr-label": sorted(labels.surest(0.4))} and len(learnt["sfr-label"]) in (1, 2)
    for path in (tmp_path / "run" / "figures" / pictures.POOL).glob("*.npz"):
        out = path.stem[2:] not in learnt["sfr-label"]
        assert json.loads(str(arrays(path)["about"]))["silent"] == (["sfr"] if out else [])
    assert (tmp_path / "run" / "report.html").read_text().count(" %, not learnt</td>") == 5 - len(learnt["sfr-label"])


def test_the_mosaic_is_the_model_s_own_layout(run: Path) -> None:
    """A mark in the volume stands in the tile of its slice."""
    (path,) = (run / "figures" / "mosaic").iterdir()
    kept, about = arrays(path), json.loads(str(arrays(path)["about"]))
    assert path.stem == "sfr" and about["term"] == "sfr" and about["whole"] and about["axis"] == "z"
    assert about["grid"] == [7, 7] and about["tile"] == [8, 8] and about["slices"] == 49
    layout = Stitch.fit((8, 8, 49), 56)
    assert kept["image"].shape == kept["label"].shape == layout.canvas
    assert kept["image"].std() > 5
    # Cut back and brought to the volume's size, it is the kept pseudo-label but for the change of voxels.
    label = PseudoLabels(run / "stages" / "sfr-label").label(str(kept["title"]))
    small = layout.unstitch_label(torch.from_numpy(kept["label"])[None])[0]
    back = torch.nn.functional.interpolate(small[None, None].float(), size=label.shape, mode="nearest-exact")[0, 0]
    assert (back.numpy() == label).mean() > 0.8


def test_the_report_shows_both(run: Path) -> None:
    text = (run / "report.html").read_text()
    assert "What the foundation model saw" in text and "guess of sfr" in text


def test_runs_without_guesses_keep_nothing(tmp_path: Path) -> None:
    train(tiny_config(tiny_dataset(tmp_path / "data", cases=3), iterations=1), tmp_path / "run")
    assert not (tmp_path / "run" / "figures" / "unlabelled").exists()


def test_a_model_that_is_gone_when_a_run_ends_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scarceseg.errors import DataError

    def gone(*_: object) -> None:
        raise DataError("weights.safetensors is no longer there")

    monkeypatch.setattr(pictures, "_layout", gone)
    data = tiny_dataset(tmp_path / "data", cases=3)
    result = train(tiny_config(data, method="sfr", terms=SFR, iterations=1), tmp_path / "run")
    assert any("no picture of the mosaic of sfr: weights.safetensors" in warning for warning in result.warnings)
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("axis", [0, 2])
def test_a_model_that_sees_patches_is_shown_one(tmp_path: Path, axis: int) -> None:
    """The patch lies around the guess, sliced along the axis the model was tuned on; beyond the volume it is empty."""

    class Work:
        class plan:
            patch = (8, 6, 5)

        @staticmethod
        def model(_: str) -> SamPromptable:
            return SamPromptable(small_sam())

    class Case:
        name = "a"
        image = np.random.default_rng(0).random((1, 20, 6, 4)).astype(np.float32) + 1

    layout = pictures._layout(Work, "sam", axis)  # type: ignore[arg-type]
    assert layout is not None and not layout[1] and layout[0].size == ((8, 6, 5) if axis == 2 else (5, 6, 8))
    label = np.zeros((20, 6, 4), np.uint8)
    label[12:15, 2:4, 1:3] = 1
    pictures._keep_mosaic(tmp_path / "m.npz", Case, label, layout, axis, {})  # type: ignore[arg-type]
    kept = arrays(tmp_path / "m.npz")
    assert (kept["label"] == 1).sum() == label.sum()
    assert json.loads(str(kept["about"]))["axis"] == "xyz"[axis]
    assert ((kept["label"] == 255) <= (kept["image"] == 0)).all()
