"""The pages in a browser, from their file: scripts run, sliders move pictures, nothing is fetched, nothing sticks out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from scarceseg.evaluation.compare import compare
from scarceseg.report import build_demo_report, build_report, viewers
from tests.report.browser import chromium, probe, widths
from tests.report.fake_pool import add_pictures, add_pool
from tests.report.fake_run import make_run

WINDOWS = [360, 800, 1600]
LONG = "a_case_with_a_name_that_is_much_longer_than_any_narrow_window_could_show_in_one_line_0123456789"


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    chromium()
    monkeypatch.setattr(viewers, "SIZES", ((64, 8),))


def whole_run(folder: Path) -> Path:
    """A run with every section its page can have, with long names."""
    run = make_run(folder, method="mean-teacher+sfr+semisam", classes=["chamber", "lobe" * 12], cases=[LONG, "b", "c"])
    add_pool(run, [LONG, "phantom_003", "phantom_004"], ("sfr", "atlas"))
    add_pictures(run, 3)
    (run / "warnings.json").write_text(json.dumps([LONG * 3]))
    (run / "stages.json").write_text(json.dumps({LONG: {"seconds": 9999.0, "peak_memory_mb": 20000}}))
    return run


def assert_sound(found: dict[str, Any]) -> None:
    assert found["errors"] == [] and found["console"] == [] and found["blocked"] == [] and found["requests"] == []


def test_the_page_of_a_run_works(tmp_path: Path) -> None:
    found = probe(build_report(whole_run(tmp_path / "run")))
    assert_sound(found)
    # Two mosaics, three unlabelled and two validation cases.
    assert sorted(viewer["slides"] for viewer in found["viewers"]) == [0, 0, 1, 1, 1, 3, 3]
    for viewer in found["viewers"]:
        assert all(shot["grey"] > 20 for shot in viewer["before"]), viewer["title"]
        assert any(shot["colour"] > 5 for shot in viewer["before"]), viewer["title"]
        if viewer["slides"]:
            moved = [one["hash"] != two["hash"] for one, two in zip(viewer["before"], viewer["after"], strict=True)]
            assert all(moved), viewer["title"]
    assert all(found["toggles"])
    assert found["readout"].startswith("iteration ")


def test_the_page_of_a_run_fits_every_window(tmp_path: Path) -> None:
    seen = widths(build_report(whole_run(tmp_path / "run")), WINDOWS)
    assert sorted(seen) == WINDOWS
    for width, row in seen.items():
        assert row["wide"] <= row["room"] and row["out"] == [], (width, row)


def test_names_that_are_markup_do_nothing(tmp_path: Path) -> None:
    bad = [
        "<script>document.title='broken'</script>",
        '"><img src=x onerror=document.title="broken">',
        "</pre></style>",
    ]
    run = make_run(tmp_path / "run", classes=bad[:2], cases=bad)
    add_pool(run, bad, (bad[1],))
    add_pictures(run, 1)
    for path in (build_report(run), compare([run], html=tmp_path / "compare.html") and tmp_path / "compare.html"):
        found = probe(path)
        assert_sound(found)
        assert all(viewer["title"].split(" (")[0] in bad for viewer in found["viewers"])


@pytest.mark.parametrize("kind", ["demo", "compare"])
def test_pages_of_several_runs_work_and_fit(tmp_path: Path, kind: str) -> None:
    runs = {name: make_run(tmp_path / name, method=name, cases=[LONG, *"abcdef"]) for name in ("supervised", "ua-mt")}
    for run in runs.values():
        shutil.copy(run / "figures" / "best_a.npz", run / "figures" / "more.npz")
    page = tmp_path / "report.html"
    if kind == "demo":
        build_demo_report(tmp_path, runs)
    else:
        compare(list(runs.values()), baseline="supervised", html=page)
    found = probe(page)
    assert_sound(found)
    assert found["viewers"] and all(found["toggles"])
    for viewer in found["viewers"]:
        assert viewer["before"] != viewer["after"]
    for width, row in widths(page, WINDOWS).items():
        assert row["wide"] <= row["room"] and row["out"] == [], (width, row)
