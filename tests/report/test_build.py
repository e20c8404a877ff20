"""The page of a run: whole, safe, self-contained, and honest about what is missing."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scarceseg.config import Config
from scarceseg.data.phantoms import PhantomConfig, write_phantom_dataset
from scarceseg.errors import RunError
from scarceseg.methods.models import settle_foundations
from scarceseg.report import build_demo_report, build_report, viewers
from scarceseg.report.figures import picture
from scarceseg.report.folder import ShownCase
from tests.report.fake_run import evaluation, figure, make_run

VOID = {"meta", "img", "input", "br", "link", "hr", "line"}
NASTY = "<script>alert(1)</script>&\"'"


class Page(HTMLParser):
    """Checks that tags close in order; keeps the text and the attributes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.tags: list[str] = []
        self.source = path.read_text(encoding="ascii")
        self.feed(self.source)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"doubled attribute in <{tag}>"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def headings(self) -> list[str]:
        return re.findall(r"<h2>(.*?)</h2>", self.source)


def assert_self_contained(page: Page) -> None:
    for tag, name, value in page.attributes:
        if name in ("src", "href", "srcset", "poster", "data", "action"):
            local = value.startswith("data:") or (tag == "a" and re.fullmatch(r"[\w./-]+", value))
            assert local, f"<{tag} {name}={value[:60]}>"
        assert not name.startswith("on"), f"inline handler {name}"
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"data:image/\w+;base64,[\w+/=]+", "", page.source))
    assert "url(" not in page.source and "@import" not in page.source
    assert "default-src 'none'" in page.source


def test_a_whole_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", method="mean-teacher+sfr")
    path = build_report(run)
    assert path == run / "report.html" and path.stat().st_size < 8_000_000
    page = Page(path)
    assert_self_contained(page)
    assert page.headings == [
        "Warnings",
        "What was asked",
        "Segmentations",
        "Accuracy on 8 validation cases",
        "Training",
        "Time and memory",
        "Use it",
    ]
    for words in (
        "mean-teacher+sfr on phantoms",
        "finished",
        "2 labelled and 14 unlabelled",
        "loss of sfr",
        "Dice on validation cases",
        "phantom_097, chamber: empty prediction",
        "absent in 1 of 8 cases",
        "phantom_090 (best)",
        "phantom_003' is smaller than the patch",
        "2 × 2 × 2.5 mm",
        "1.8 GiB",
        "validate_every: 0",
        "bf16",
        "x-y plane",
    ):
        assert words in page.text, words
    result = json.loads((run / "evaluation.json").read_text())
    chamber = [case["chamber"]["dice"] for case in result["cases"].values()]
    assert f"{100 * np.mean(chamber):.1f} ± {100 * np.std(chamber, ddof=1):.1f}" in page.text
    assert f"{100 * np.mean([m['dice'] for m in result['mean'].values()]):.1f} %" in page.text
    kinds = {value for _, name, value in page.attributes if name == "data-layer"}
    assert {f"{kind}:{n}" for kind in ("image", "prediction", "reference", "uncertainty") for n in range(3)} == kinds


def test_known_directions_are_named(tmp_path: Path) -> None:
    page = Page(build_report(make_run(tmp_path / "run", direction=True)))
    assert "sagittal" in page.text and "x-y plane" not in page.text


def test_what_was_asked_names_settings_that_differ_from_the_published_ones(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    words = ("25% centred on a structure", "labelled and unlabelled rows by themselves", "augmentation none")
    plain = Page(build_report(run)).text
    assert not any(word in plain for word in words)
    assert "augmentation small deformations and contrast" in plain
    config = Config.load(run / "config.yaml")
    changes = {"batch_norm": "split", "foreground": 0.25, "augment": "none"}
    (run / "config.yaml").write_text(config.model_copy(update=changes).dump())
    asked = Page(build_report(run)).text
    assert all(word in asked for word in words)


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("mean-teacher+sfr", {}, "foundation model tiny-sam checkpoint"),
        ("mean-teacher+sfr+semisam", {}, "foundation model tiny-sam (sfr), tiny-sam3d (semisam) checkpoint"),
        ("mean-teacher+sfr", {"foundation": "medsam"}, "foundation model medsam checkpoint"),
        (
            "mean-teacher+sfr+semisam",
            {"terms": {"semisam": {"foundation": ["sam-med3d", "tiny-sam3d"]}}},
            "foundation model tiny-sam (sfr), sam-med3d and tiny-sam3d (semisam) checkpoint",
        ),
    ],
)
def test_the_foundation_models_are_named(method: str, settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    config = Config.load(run / "config.yaml")
    values = config.model_dump(mode="json") | {"method": method, "terms": {}, "foundation": None} | settings
    (run / "config.yaml").write_text(settle_foundations(Config.build(values), 1).dump())  # as a run keeps it
    assert words in Page(build_report(run)).text


def test_names_are_escaped_everywhere(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", classes=[NASTY, "b"], cases=[NASTY, "case </pre>", "c"])
    config = Config.build({"dataset": f"/data/{NASTY}", "labeled": [NASTY], "network": {"args": {NASTY: NASTY}}})
    (run / "config.yaml").write_text(config.dump())
    for name, value in (
        ("split.json", {"labelled": [NASTY], "unlabelled": [NASTY], "val": [NASTY]}),
        ("warnings.json", [NASTY]),
        ("stages.json", {NASTY: {"seconds": 1.0}}),
        ("environment.json", {"device": NASTY, "versions": {NASTY: NASTY}}),
    ):
        (run / name).write_text(json.dumps(value))
    lines = [{"iteration": t, "stage": NASTY, f"loss/{NASTY}": 1.0 / (t + 1), f"dice/{NASTY}": 0.5} for t in range(3)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = Page(build_report(run))
    assert_self_contained(page)
    assert page.tags.count("script") == 1
    assert page.text.count("<script>alert(1)</script>") > 12
    demo = Page(build_demo_report(tmp_path, {NASTY: run, "other": make_run(tmp_path / "o", classes=[NASTY, "b"])}))
    assert demo.tags.count("script") == 1
    assert_self_contained(demo)


@pytest.mark.parametrize(
    "kept",
    [
        (),
        ("split.json",),
        ("plan.json", "split.json", "environment.json"),
        ("plan.json", "split.json", "environment.json", "metrics.jsonl"),
        ("evaluation.json",),
        ("figures",),
        ("stages.json", "warnings.json"),
    ],
)
def test_partial_runs_give_partial_reports(tmp_path: Path, kept: tuple[str, ...]) -> None:
    run = make_run(tmp_path / "run")
    for item in run.iterdir():
        if item.name not in (*kept, "config.yaml"):
            shutil.rmtree(item) if item.is_dir() else item.unlink()
    page = Page(build_report(run))
    assert_self_contained(page)
    assert ("Training" in page.headings) == ("metrics.jsonl" in kept)
    assert ("Segmentations" in page.headings) == ("figures" in kept)
    assert any(h.startswith("Accuracy") for h in page.headings) == ("evaluation.json" in kept)
    stopped = "iteration 391 of 400" if "metrics.jsonl" in kept else "iteration 0 of 400"
    assert f"stopped at {stopped}" in page.text and "--resume" in page.text


def test_damaged_files_are_told_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "plan.json").write_text('{"classes": ["backgr')
    (run / "split.json").write_text("[1, 2]")
    (run / "evaluation.json").write_text('{"cases": {}}')
    (run / "figures" / "best_a.npz").write_bytes(b"PK not a zip")
    np.savez(run / "figures" / "object.npz", image=np.array([{}], dtype=object), prediction=np.zeros(1))
    np.savez(run / "figures" / "sizes.npz", image=np.zeros((4, 4, 4)), prediction=np.zeros((4, 4, 5), np.uint8))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 400, "stage": "train", "loss": NaN}\n{"iteration": 401, "sta')
    page = Page(build_report(run))
    for name in ("plan.json", "split.json", "evaluation.json", "best_a.npz", "object.npz", "sizes.npz"):
        assert re.search(rf"{re.escape(name)}[^<]{{0,40}}(could not be read|expected)", page.text), name
    assert "phantom_097 (worst)" in page.text and "Training" in page.headings


def test_a_config_of_another_version_still_gives_a_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_text("method: mean-teacher\nsetting_of_the_future: 3\n")
    page = Page(build_report(run))
    assert "setting_of_the_future: 3" in page.text and "config.yaml could not be read" in page.text
    assert "Training" in page.headings


def test_folders_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no run folder"):
        build_report(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"expected a config\.yaml"):
        build_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(RunError, match="at least one run"):
        build_demo_report(tmp_path, {})


def test_all_viewers_get_the_largest_size_at_which_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewers, "BUDGET", 3 * 160 * 160 + 100)

    def make(side: int, count: int) -> viewers.Viewer:
        return {"layers": [{"uri": "x" * side * side}], "still": "x", "count": count}

    assert [v["count"] for v in viewers.within_budget([make] * 3)] == [16] * 3
    assert [v["count"] for v in viewers.within_budget([make])] == [32]
    assert len(viewers.within_budget([make] * 20)) == 8  # as many as fit at the smallest size
    assert viewers.within_budget([]) == []


def test_a_volume_is_drawn_once_whatever_sizes_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    label = np.zeros((20, 18, 16), np.uint8)
    label[5:12, 4:13, 6:11] = 1
    case = ShownCase("a", label.astype(np.float32), label, label, None, (1.0, 1.0, 1.0), None)
    drawn = []
    monkeypatch.setattr(viewers, "picture", lambda *args: drawn.append(1) or picture(*args))  # type: ignore[func-returns-value]
    makers = [
        viewers.planes_viewer(case, ""),
        viewers.compare_viewer(case, {"one": label, "two": label}, {}),
        viewers.pool_viewer(case, {"sfr": label}, ""),
    ]
    assert not drawn
    assert viewers.within_budget(makers, budget=10) == []  # every size was tried
    assert len(drawn) == 1
    assert len(viewers.within_budget(makers)) == 3
    assert len(drawn) == 3


def test_a_page_without_room_for_cases_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewers, "BUDGET", 10)
    monkeypatch.setattr(viewers, "SIZES", ((32, 2),))
    page = Page(build_report(make_run(tmp_path / "run")))
    assert "Segmentations" not in page.headings and "0 of the 2 cases" in page.text


def test_only_some_of_many_cases_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewers, "SIZES", ((32, 2),))
    run = make_run(tmp_path / "run")
    for k in range(6):
        shutil.copy(run / "figures" / "best_a.npz", run / "figures" / f"more_{k}.npz")
    page = Page(build_report(run))
    assert sum(name == "class" and value == "viewer" for _, name, value in page.attributes) == 6
    assert "6 of the 8 cases" in page.text


def test_comparison_reads_predictions_beside_the_runs(tmp_path: Path) -> None:
    data = write_phantom_dataset(tmp_path / "data", 1, 1, PhantomConfig(shape=(20, 18, 16)), test_cases=2)
    cases = ["phantom_001", "phantom_002"]
    runs = {}
    for shift, name in ((0.0, "supervised"), (0.1, "mean-teacher")):
        runs[name] = make_run(tmp_path / name, method=name, shift=shift)
        (runs[name] / "test.json").write_text(json.dumps(evaluation(cases, ["chamber", "lobe"], shift)))
        shutil.copytree(data / "labelsTs", tmp_path / "predictions" / name)
    build_report(runs["mean-teacher"])
    page = Page(build_demo_report(tmp_path, runs))
    assert_self_contained(page)
    assert "2 methods on the same volumes" in page.text and "phantom_002" in page.text
    assert "phantom_090" not in page.text  # test.json goes before evaluation.json, imagesTs before figures
    assert [value for _, name, value in page.attributes if name == "href"] == ["mean-teacher/report.html"]
    best = re.findall(r'<td class="best">([\d.]+)</td>', page.source)
    result = evaluation(cases, ["chamber", "lobe"], 0.1)
    assert f"{100 * np.mean([m['dice'] for m in result['mean'].values()]):.1f}" in best
    panes = [value for _, name, value in page.attributes if name == "data-layers"]
    assert panes == ["image:0 mask:0", "image:0 mask:1 reference:0", "image:0 mask:2 reference:0"] * 2


def test_comparison_falls_back_on_the_cases_all_runs_kept(tmp_path: Path) -> None:
    runs = {name: make_run(tmp_path / name, method=name) for name in ("supervised", "ua-mt")}
    figure(runs["ua-mt"] / "figures" / "extra.npz", "only here", 3, PhantomConfig(shape=(20, 18, 16)))
    (runs["supervised"] / "evaluation.json").unlink()
    page = Page(build_demo_report(tmp_path, runs))
    assert "phantom_090" in page.text and "only here" not in page.text
    assert re.search(r"supervised</td>\s*<td>-</td>", page.source)
