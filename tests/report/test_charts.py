"""Charts: values at their places, gaps, and names that cannot break out."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest

from scarceseg.report.charts import MOST_POINTS, Group, Line, box_plot, line_chart


def svg(html: str) -> ElementTree.Element:
    found = re.search(r"<svg.*</svg>", html, re.S)
    assert found
    return ElementTree.fromstring(found[0])


def chart_data(html: str) -> dict:
    class Reader(HTMLParser):
        data: dict

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            text = dict(attrs).get("data-chart")
            if text:
                self.data = json.loads(text)

    reader = Reader()
    reader.feed(html)
    return reader.data


def test_a_curve_rises_where_its_values_rise_and_has_gaps() -> None:
    html = line_chart("loss", [Line("a", [0, 1, 2, 3], [0.0, 1.0, float("nan"), 2.0])])
    (path,) = svg(html).findall("path")
    assert path.get("d", "").count("M") == 2
    points = [tuple(map(float, p.split())) for p in re.split("[ML]", path.get("d", ""))[1:]]
    assert [p[0] for p in points] == sorted(p[0] for p in points)
    assert points[0][1] > points[1][1] > points[2][1]  # SVG's y runs down
    assert chart_data(html)["curves"][0]["y"] == [0.0, 1.0, None, 2.0]


def test_smooth_lines_are_drawn_twice_and_long_ones_thinned() -> None:
    x = list(range(5000))
    html = line_chart("loss", [Line("a", x, np.sin(x).tolist(), smooth=True), Line("b", x, x)])
    assert len(svg(html).findall("path")) == 3
    data = chart_data(html)
    assert [len(curve["x"]) for curve in data["curves"]] == [MOST_POINTS, MOST_POINTS]
    assert data["curves"][1]["x"][-1] == 4999 and data["span"][:2] == [0, 4999]


@pytest.mark.parametrize("lines", [[], [Line("a", [], [])], [Line("a", [1], [float("nan")])]])
def test_nothing_gives_nothing(lines: list[Line]) -> None:
    assert line_chart("x", lines) == "" == box_plot("x", [Group("a", {})])


def test_single_and_constant_values_can_be_drawn() -> None:
    assert svg(line_chart("one", [Line("a", [5], [0.3])])).findall("circle")
    assert svg(line_chart("flat", [Line("a", [0, 1], [0.0, 0.0])])).findall("path")
    assert svg(box_plot("zero", [Group("a", {"x": 0.0})])).findall("circle")


def test_boxes_show_quartiles_and_every_case() -> None:
    values = {f"case {k}": float(k) for k in range(0, 101, 10)}
    root = svg(box_plot("Dice", [Group("heart", values)], x_range=(0, 100)))
    (box,) = root.findall("rect")
    at = {c.findtext("title", "").split(":")[0]: float(c.get("cx", "")) for c in root.findall("circle")}
    assert len(at) == 11
    left, width = float(box.get("x", "")), float(box.get("width", ""))
    assert left == pytest.approx((at["case 20"] + at["case 30"]) / 2, abs=0.2)
    assert left + width == pytest.approx((at["case 70"] + at["case 80"]) / 2, abs=0.2)


def test_names_are_escaped() -> None:
    name = "<script>alert('x')</script>\"&"
    for html in (
        line_chart(name, [Line(name, [0, 1], [0, 1]), Line("b", [0], [1])], name),
        box_plot(name, [Group(name, {name: 1.0})], name),
    ):
        assert "<script" not in html
        assert svg(html).get("aria-label") == name
