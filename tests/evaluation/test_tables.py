"""Tables: what is printed, Markdown, and the published figures."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from scarceseg.errors import ConfigError, DataError
from scarceseg.evaluation.metrics import METRICS
from scarceseg.evaluation.result import EvaluationResult, Failure, mean_metrics
from scarceseg.evaluation.tables import (
    class_average,
    markdown_published,
    markdown_results,
    markdown_table,
    print_evaluation,
    published_rows,
    read_evaluation,
)


def result(count: int = 2, units: str = "mm") -> EvaluationResult:
    cases = {
        f"case[{i}]": {
            "heart": dict(zip(METRICS, (0.5 + i / 100, 0.25, 1.0, 1.5, 4.0), strict=True)),
            "liver": dict(zip(METRICS, (0.0, 0.0, math.nan, math.nan, math.nan), strict=True)),
        }
        for i in range(count)
    }
    failed = tuple(Failure(case, "liver", "empty prediction") for case in cases)
    return EvaluationResult(units, cases, mean_metrics(cases), failed, ("one reference was left out",))  # type: ignore[arg-type]


def printed(value: object) -> str:
    console = Console(file=io.StringIO(), width=140)
    print_evaluation(value, console)  # type: ignore[arg-type]
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_screen_shows_cases_means_and_failures() -> None:
    text = printed(result())
    for part in (
        "case[1]",
        "Dice [%]",
        "HD95 [mm]",
        "51.00",
        "50.50",
        "all classes",
        "2 undefined",
        "2 failed",
        "left out",
    ):
        assert part in text, part
    assert "left out" not in printed(result().to_json())
    assert "HD95 [voxel]" in printed(result(units="voxel"))
    many = printed(result(30))
    assert "case[3]  " not in many and "30 cases" in many and "64.50" in many


def test_screen_tells_of_classes_in_neither_mask() -> None:
    found = replace(result(), absent={"heart": 0, "liver": 1})
    told = "liver: absent in 1 of 2 cases"
    assert told in printed(found) and "heart: absent" not in printed(found) and told in printed(found.to_json())
    assert "absent" not in printed({key: value for key, value in found.to_json().items() if key != "absent"})


def test_screen_without_any_class() -> None:
    assert "Dice" in printed(EvaluationResult("mm", {"a": {}}, {}))


def test_class_average_leaves_undefined_out() -> None:
    average = class_average(result())
    assert average["dice"] == pytest.approx(0.2525) and average["hd95"] == 4.0
    assert math.isnan(class_average(EvaluationResult("mm", {}, {}))["dice"])


def test_markdown() -> None:
    table = markdown_table([{"name": "a|b", "n": 1, "x": None}, {"name": "c", "n": 2.5, "x": "-"}])
    assert table.splitlines() == ["| name | n | x |", "| --- | ---: | ---: |", "| a\\|b | 1 | - |", "| c | 2.5 | - |"]
    lines = markdown_results({"mean-teacher": result(), "ua-mt": result().to_json()}).splitlines()
    assert lines[0].startswith("| method | cases | Dice [%] |") and lines[1].startswith("| --- | ---: | ---: |")
    assert lines[2] == "| mean-teacher | 2 | 25.25 | 12.50 | 1.00 | 1.50 | 4.00 | 2 |"
    assert lines[3] == lines[2].replace("mean-teacher", "ua-mt")
    with pytest.raises(DataError, match="one unit"):
        markdown_results({"a": result(), "b": result(units="voxel")})


def test_saved_results_are_read_back(tmp_path: Path) -> None:
    values = result().to_json()
    for name, content in (("plain", values), ("run", {"commit": "abc", "evaluation": values})):
        (tmp_path / name).write_text(json.dumps(content))
        assert read_evaluation(tmp_path / name) == values
    for name, text in (
        ("text", "hello"),
        ("list", "[]"),
        ("other", '{"mean": {}}'),
        ("half", '{"mean": {"a": {}}, "cases": {}}'),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=name):
            read_evaluation(tmp_path / name)
    with pytest.raises(DataError, match="nowhere"):
        read_evaluation(tmp_path / "nowhere")


def test_published_rows() -> None:
    (row,) = published_rows("LA", labeled=4, method="mean-teacher+semisam")
    assert (row.dice, row.hd95_voxel, row.unlabeled) == (80.42, 18.23, 76) and "SemiSAM" in row.source
    assert len(published_rows()) == 148 and all(row.source for row in published_rows())
    assert published_rows("LA", labeled=3) == []
    assert {row.labeled for row in published_rows("LA", labeled=8)} == {8}
    with pytest.raises(ConfigError, match="BraTS2019-FLAIR"):
        published_rows("BraTS2019")
    assert "| LA | 4 | mean-teacher | 72.4 |" in markdown_published(published_rows("LA", labeled=4))


def test_published_rows_equal_the_source(shared: Path) -> None:
    rows = json.loads((shared / "published" / "results.json").read_text())["rows"]
    ours = [{key: value for key, value in vars(row).items() if key != "note" or value} for row in published_rows()]
    assert ours == rows
