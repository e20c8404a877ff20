"""Sections on unlabelled volumes: mosaics, pseudo-labels beside the student's masks, prompts; and published rows."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scarceseg.config import Config
from scarceseg.report import build_report
from scarceseg.types import IGNORE_LABEL
from tests.report.fake_pool import add_pictures, add_pool
from tests.report.fake_run import make_run
from tests.report.test_build import NASTY, Page, assert_self_contained

CASES = ["phantom_002", "phantom_003", "phantom_004"]


def images(page: Page, section: str) -> list[np.ndarray]:
    """Decoded pictures of the section with this heading."""
    part = page.source.split(f"<h2>{section}</h2>")[1].split("</section>")[0]
    found = re.findall(r'src="data:image/\w+;base64,([\w+/=]+)"', part)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))).convert("RGBA")).astype(int) for uri in found]


def test_pseudo_labels_stand_beside_the_student_s_masks(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", method="mean-teacher+sfr+atlas")
    add_pool(run, CASES, ("sfr", "atlas"))
    page = Page(build_report(run))
    assert_self_contained(page)
    for case, rank in zip(CASES, ("least confident", "median", "most confident"), strict=True):
        assert f"{case} ({rank})" in page.text
    for words in ("guess of sfr", "guess of atlas", "student", "sfr: 60.0 % sure, atlas: 62.0 % sure", "tiny-sam"):
        assert words in page.text, words
    panes = [value for _, name, value in page.attributes if name == "data-layers"]
    assert (
        panes.count("image:0 uncertainty:0 mask:2 outline:0") == 3
    )  # the student's, with the outline of the first guess
    rows = re.findall(r'<td class="name">(phantom_00\d)</td><td>([\d.]+ %)</td>', page.source)
    assert rows == [("phantom_002", "60.0 %"), ("phantom_003", "70.0 %"), ("phantom_004", "80.0 %")]


def test_guesses_that_are_not_learnt_are_marked(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", method="mean-teacher+sfr+atlas")
    add_pool(run, CASES, ("sfr", "atlas"))
    (run / "figures" / "unlabelled" / "learnt.json").write_text(json.dumps({"sfr-label": CASES[1:]}))
    page = Page(build_report(run))
    rows = re.findall(r'<td class="name">phantom_00\d</td><td>([^<]+)</td><td>([^<]+)</td>', page.source)
    assert [[*map(str.endswith, row, ("not learnt",) * 2)] for row in rows] == [[False, True], *[[False, False]] * 2]
    (run / "figures" / "unlabelled" / "learnt.json").write_text("[1]")
    assert "learnt.json could not be read" in Page(build_report(run)).text


def test_the_mosaic_is_small_and_carries_the_mask(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    add_pool(run, CASES)
    page = Page(build_report(run))
    grey, mask, _ = images(page, "What the foundation model saw")
    assert grey.shape == mask.shape and max(grey.shape) <= 1000
    scale = grey.shape[0] // 96
    painted = np.argwhere(mask[..., 3] > 0)
    assert painted.min(0).tolist() == [30 * scale] * 2 and painted.max(0).tolist() == [40 * scale - 1] * 2
    assert abs(grey[..., 0].mean() - np.median(grey)) < 5
    assert "16 slices along z" in page.text and "the whole volume" in page.text


def test_ignored_voxels_are_not_painted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    add_pool(run, CASES)
    path = run / "figures" / "mosaic" / "0.npz"
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    arrays["label"] = np.full_like(arrays["label"], IGNORE_LABEL)
    np.savez_compressed(path, **arrays)
    _, mask, _ = images(Page(build_report(run)), "What the foundation model saw")
    assert not mask[..., 3].any()


@pytest.mark.parametrize(("measure", "shown"), [("volume", "97.0 %"), ("foreground", "42.0 %")])
def test_rounds_of_sfr_plus_show_how_sure_the_student_was(tmp_path: Path, measure: str, shown: str) -> None:
    run = make_run(tmp_path / "run", method="sfr+")
    add_pool(run, CASES)
    folder = run / "stages" / "sfr+-round1"
    folder.mkdir()
    row = {"confidence": 0.5, "foreground_confidence": 0.5}
    row |= {"student_confidence": 0.97, "student_foreground_confidence": 0.42}
    table = {"threshold": 0.985, "measure": measure, "cases": dict.fromkeys(CASES, row)}
    (folder / "confidence.json").write_text(json.dumps(table))
    text = Page(build_report(run)).text
    assert "sfr+-round1, student" in text and shown in text and "threshold 0.985" in text


def test_prompts_are_shown_in_order_and_not_too_many(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", method="mean-teacher+semisam")
    add_pictures(run, 12)
    (run / "pictures" / "train-semisam-000550.png").write_bytes(b"no picture")
    page = Page(build_report(run))
    assert_self_contained(page)
    numbers = [int(n) for n in re.findall(r"<figcaption>iteration (\d+)", page.source)]
    assert numbers == sorted(numbers) and numbers[0] == 0 and len(numbers) == 7
    shades = [image[0, 0, 0] for image in images(page, "Prompts")]
    assert shades == sorted(shades) and len(set(shades)) == 7
    assert "green clicks" in page.text and "questions of semisam" in page.text
    assert "000550.png could not be read" in page.text


def test_runs_without_these_have_no_such_sections(tmp_path: Path) -> None:
    page = Page(build_report(make_run(tmp_path / "run")))
    assert not {"What the foundation model saw", "Pseudo-labels of the unlabelled volumes", "Prompts"} & {
        *page.headings
    }


@pytest.mark.parametrize("content", [b"PK not a zip", None], ids=["damaged", "of another kind"])
def test_damaged_files_are_told(tmp_path: Path, content: bytes | None) -> None:
    run = make_run(tmp_path / "run")
    add_pool(run, CASES)
    for path in [*run.glob("figures/unlabelled/*.npz"), *run.glob("figures/mosaic/*.npz")]:
        if content is None:
            np.savez(path, image=np.zeros((3, 3)), about=json.dumps([1]), title="x")
        else:
            path.write_bytes(content)
    (run / "stages" / "sfr-label" / "confidence.json").write_text('{"cases": 3}')
    page = Page(build_report(run))
    for name in ("0_case.npz", "1_case.npz", "2_case.npz", "mosaic/0.npz", "confidence.json"):
        assert re.search(rf"{re.escape(name)} could not be read", page.text), name
    assert "What the foundation model saw" not in page.headings


def test_names_of_cases_terms_and_models_are_escaped(tmp_path: Path) -> None:
    nasty = '"><img src=x onerror=alert(2)>'
    run = make_run(tmp_path / "run", classes=[NASTY, nasty])
    add_pool(run, [NASTY, nasty, "c"], (nasty, NASTY.replace("/", "|")))
    add_pictures(run, 2, nasty)
    page = Page(build_report(run))
    assert_self_contained(page)
    assert page.tags.count("script") == 1
    assert not [a for a in page.attributes if a[0] == "img" and not a[2].startswith("data:") and a[1] == "src"]
    assert f"{NASTY} (least confident)" in page.text and f"guess of {nasty}" in page.text
    assert f"questions of {nasty}" in page.text


def test_published_rows_stand_beside_the_run_s_own(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", classes=["atrium"])
    plan = json.loads((run / "plan.json").read_text())
    (run / "plan.json").write_text(json.dumps(plan | {"dataset": "LA"}))
    split = json.loads((run / "split.json").read_text())
    (run / "split.json").write_text(json.dumps(split | {"labelled": ["one"]}))
    page = Page(build_report(run))
    assert "Beside published figures of LA" in page.text
    assert "30.6 %" in page.text and "25.98 voxel" in page.text  # mean teacher with one label, SemiSAM paper
    assert "SemiSAM paper" in page.text and "not the published split" in page.text
    assert "voxels of 2 x 2 x 2.5 mm" in page.text
    own = re.search(r'<tr class="own">(.*?)</tr>', page.source)
    assert own and "this run" in own[1] and " mm" in own[1]
    config = Config.load(run / "config.yaml")
    assert own[1].startswith(f'<td class="name">{config.method}</td><td>1 + 14</td>')


def test_other_datasets_have_no_published_rows(tmp_path: Path) -> None:
    assert "published" not in Page(build_report(make_run(tmp_path / "run"))).text
