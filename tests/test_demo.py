"""The demo, cut short."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scarceseg import demo
from scarceseg.config import Config
from scarceseg.errors import RunError

METHODS = ["mean-teacher", "mean-teacher+sfr", "mean-teacher+semisam"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo of two iterations with few volumes."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    full = demo.demo_config

    def short(data: Path, method: str, seed: int) -> Config:
        terms = {"sfr": {"tune_iterations": 1}} if "sfr" in method else full(data, method, seed).terms
        return full(data, method, seed).model_copy(update={"iterations": 2, "terms": terms})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "demo_config", short)
        patch.setattr(demo, "CASES", 3)
        patch.setattr(demo, "TEST", 1)
        report = demo.run_demo(folder)
        assert report == folder / "report.html"
        trained = {file: file.stat().st_mtime_ns for file in folder.glob("*/checkpoints/last.pt")}
        demo.run_demo(folder)
        assert len(trained) == 3
        assert trained == {file: file.stat().st_mtime_ns for file in trained}, "what was finished was done again"
    return folder


def test_the_base_method_stands_beside_both_foundation_models(out: Path) -> None:
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary) == METHODS
    for means in summary.values():
        assert set(means) == {"chamber", "lobe"} and all(0 <= mean["dice"] <= 1 for mean in means.values())
    page = (out / "report.html").read_text(encoding="utf-8")
    for method in METHODS:
        assert method in page and (out / method / "report.html").exists()


def test_one_volume_is_labelled_and_the_unseen_ones_are_predicted(out: Path) -> None:
    split = json.loads((out / "mean-teacher+sfr" / "split.json").read_text())
    assert (len(split["labelled"]), len(split["unlabelled"])) == (1, 2)
    assert [file.name for file in (out / "predictions" / "mean-teacher").glob("*.nii.gz")] == ["phantom_003.nii.gz"]


def test_a_folder_of_another_demo_is_left_alone(out: Path) -> None:
    with pytest.raises(RunError, match="is not a demo with seed 1: choose another --out"):
        demo.run_demo(out, seed=1)
