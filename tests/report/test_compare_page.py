"""The page of `scarceseg compare`: the numbers of the tables, tests, published rows, and masks of the same cases."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scarceseg.data.images import write_image
from scarceseg.errors import DataError
from scarceseg.evaluation.compare import compare
from scarceseg.report import viewers
from scarceseg.report.folder import read_arrays, without_rank
from scarceseg.types import Geometry
from tests.report.fake_run import make_run
from tests.report.test_build import NASTY, Page, assert_self_contained


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewers, "SIZES", ((48, 4),))


def seeded(folder: Path, method: str, seed: int, shift: float = 0.0, **rest: Any) -> Path:
    """A run with another seed, and with other Dice values by it."""
    run = make_run(folder, method=method, shift=shift + seed / 100, **rest)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("seed: 0", f"seed: {seed}"))
    return run


def as_benchmark(run: Path) -> None:
    """The dataset LA with one label."""
    for name, change in (("plan.json", {"dataset": "LA"}), ("split.json", {"labelled": ["one"]})):
        values = json.loads((run / name).read_text())
        (run / name).write_text(json.dumps(values | change))


def test_a_bracket_in_the_name_of_a_case_is_no_rank(tmp_path: Path) -> None:
    assert without_rank("scan (1)") == "scan (1)" and without_rank("scan (1) (best)") == "scan (1)"
    assert without_rank("la_07 (median)") == "la_07"


def test_a_damaged_picture_file_is_one_message(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez_compressed(tmp_path / "a.npz", title="a", image=rng.normal(size=(20, 20, 20)))
    whole = (tmp_path / "a.npz").read_bytes()
    for place in range(100, len(whole), len(whole) // 60):
        (tmp_path / "a.npz").write_bytes(whole[:place] + b"\xff\x07" + whole[place + 2 :])
        with suppress(DataError):
            read_arrays(tmp_path / "a.npz")


def test_means_tests_and_runs(tmp_path: Path) -> None:
    runs = [seeded(tmp_path / f"sup{seed}", "supervised", seed) for seed in (0, 1)]
    runs.append(seeded(tmp_path / "mt", "mean-teacher", 0, 0.1))
    found = compare(runs, baseline="supervised", html=tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert_self_contained(page)
    assert page.headings == [
        "Accuracy",
        "Against the baseline",
        "Case by case",
        "The same slice by each method",
        "What was compared",
    ]
    groups = {group.method: group for group in found.groups}
    dice = groups["supervised"].metrics[None]["dice"]
    assert f"{100 * dice.mean:.2f} ± {100 * dice.std:.2f}" in page.text
    test = groups["mean-teacher"].tests[None]["dice"]
    assert f"{100 * test.difference:+.2f}" in page.text and f"{test.p_holm:.4f}" in page.text
    for run in runs:
        assert str(run) in page.text
    assert page.tags.count("article") == 2
    titles = [value for tag, name, value in page.attributes if tag == "canvas" and name == "aria-label"]
    assert titles[:3] == [f"{who} of phantom_090" for who in ("reference", "supervised", "mean-teacher")]


def test_published_rows_and_sources(tmp_path: Path) -> None:
    run = seeded(tmp_path / "mt", "mean-teacher", 0, classes=["atrium"])
    as_benchmark(run)
    compare([run], html=tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert "published, mean-teacher [1]" in page.text and "30.60" in page.text
    assert "SemiSAM paper" in page.text and "not the published split" in page.text
    assert "published distances are in voxels" in page.text


def test_masks_of_validation_stand_in_for_figures(tmp_path: Path) -> None:
    """A case that only one run kept is shown by the other's mask file; one of another size is left out."""
    one, other = (seeded(tmp_path / name, name, 0) for name in ("supervised", "mean-teacher"))
    shutil.rmtree(other / "figures")
    for case, size in (("phantom_090", (20, 18, 16)), ("phantom_097", (5, 5, 5))):
        grid = Geometry(size, (2.0, 2.0, 2.5), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
        (other / "validation").mkdir(exist_ok=True)
        write_image(np.ones(size, np.uint8), grid, other / "validation" / f"{case}.nii.gz")
    (one / "figures" / "broken.npz").write_bytes(b"PK")
    compare([one, other], html=tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    titles = re.findall(r"<h3>(phantom_\d+)</h3>", page.source)
    assert titles == ["phantom_090"]
    assert re.search(r"broken\.npz could not be read", page.text) and "Warnings" in page.headings


def test_groups_of_one_method_are_told_apart(tmp_path: Path) -> None:
    runs = [seeded(tmp_path / "a", "ua-mt", 0), seeded(tmp_path / "b", "ua-mt", 0)]
    config = (runs[1] / "config.yaml").read_text()
    (runs[1] / "config.yaml").write_text(config.replace("iterations: 400", "iterations: 300"))
    compare(runs, html=tmp_path / "page.html")
    labels = [v for t, n, v in Page(tmp_path / "page.html").attributes if t == "canvas" and n == "aria-label"]
    assert labels[1:3] == ["ua-mt, iterations=400 of phantom_090", "ua-mt, iterations=300 of phantom_090"]


def test_names_are_escaped(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", classes=[NASTY, "b"], cases=[NASTY, "c", "d"])]
    plan = json.loads((runs[0] / "plan.json").read_text())
    (runs[0] / "plan.json").write_text(json.dumps(plan | {"dataset": NASTY}))
    compare(runs, html=tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert_self_contained(page)
    assert page.tags.count("script") == 1 and page.text.count(NASTY) > 3
