"""Numbers -> inline SVG that takes its colours from the page, so that it is legible in light and dark mode."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 26
COLOURS = 8
MOST_POINTS = 240
MOST_LETTERS = 24
"""Of the name of a row of a box plot; the whole name is its tooltip."""


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: for the legend.
        x, y: equally long; a value that is not finite leaves a gap.
        colour: 0 to 7.
        smooth: draw the values faintly, and their running mean over a thirtieth of the curve.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    smooth: bool = False


@dataclass(frozen=True)
class Group:
    """One row of a box plot: values by case."""

    name: str
    values: Mapping[str, float]
    colour: int = 0


def line_chart(title: str, lines: Sequence[Line], note: str = "", y_range: tuple[float, float] | None = None) -> Markup:
    """A figure with a caption, axes, legend (for several lines) and the values for a read-out under the pointer.

    Args:
        title: caption.
        lines: curves.
        note: further words in the caption.
        y_range: of the axis; None fits the values.

    Returns:
        HTML, empty when no line has a finite value.
    """
    finite = [(x, y) for line in lines for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    if not finite:
        return Markup("")
    x_low, x_high = min(x for x, _ in finite), max(x for x, _ in finite)
    x_low, x_high = (x_low, x_high) if x_high > x_low else (x_low - 1, x_high + 1)
    axes = _Axes(x_low, x_high, *(y_range or _fit([y for _, y in finite])))
    parts = [axes.frame()]
    for line in lines:
        x, y = _thin(line)
        kind = f"line c{line.colour % COLOURS}"
        parts.append(axes.path(x, y, f"{kind} faint" if line.smooth else kind))
        if line.smooth:
            parts.append(axes.path(x, _running_mean(y), kind))
        if len(x) == 1 and math.isfinite(y[0]):
            parts.append(_svg("circle", _class=f"dot c{line.colour % COLOURS}", cx=axes.x(x[0]), cy=axes.y(y[0]), r=3))
    parts.append(_svg("line", _class="cursor", x1=-9, x2=-9, y1=TOP, y2=HEIGHT - BOTTOM))
    legend = _legend(lines) if len(lines) > 1 else Markup("")
    return Markup('<figure class="chart" data-chart="{}">{}{}{}<output class="readout"></output></figure>').format(
        axes.data(lines), _caption(title, note), _picture(title, WIDTH, HEIGHT, parts), legend
    )


def box_plot(title: str, groups: Sequence[Group], note: str = "", x_range: tuple[float, float] | None = None) -> Markup:
    """Horizontal boxes (quartiles, median, whiskers to the last value within 1.5 box lengths) with all cases as dots.

    Args:
        title: caption.
        groups: rows; one without finite values is left out.
        note: further words in the caption.
        x_range: of the axis; None goes from zero to the largest value.

    Returns:
        HTML, empty when there is no value.
    """
    shown = [(g, {case: v for case, v in g.values.items() if math.isfinite(v)}) for g in groups]
    shown = [(group, values) for group, values in shown if values]
    if not shown:
        return Markup("")
    largest = max(value for _, values in shown for value in values.values())
    low, high = x_range or (0.0, largest * 1.05 or 1.0)
    row, width = 34, 400
    left = min(max(24 + 6 * max(len(group.name) for group, _ in shown), 60), 24 + 6 * MOST_LETTERS)
    height = TOP + row * len(shown) + BOTTOM
    parts = []

    def across(value: float) -> float:
        return left + (value - low) / (high - low) * (width - left - 14)

    for tick in _ticks(low, high, 5):
        parts.append(_svg("line", _class="grid", x1=across(tick), x2=across(tick), y1=TOP, y2=height - BOTTOM))
        parts.append(_svg("text", _short(tick), _class="tick mid", x=across(tick), y=height - 9))
    for index, (group, values) in enumerate(shown):
        y = TOP + row * (index + 0.5)
        name = group.name if len(group.name) <= MOST_LETTERS else f"{group.name[: MOST_LETTERS - 2]}..."
        parts.append(_svg("text", name, group.name, _class="tick end", x=left - 8, y=y + 4))
        parts += _box(values, y, f"c{group.colour % COLOURS}", across)
    return Markup('<figure class="chart">{}{}</figure>').format(
        _caption(title, note), _picture(title, width, height, parts)
    )


def _box(values: Mapping[str, float], y: float, colour: str, across: Callable[[float], float]) -> list[Markup]:
    data = np.array(list(values.values()))
    q1, median, q3 = (float(q) for q in np.percentile(data, (25, 50, 75)))
    parts = []
    if len(data) >= 3:
        reach = 1.5 * (q3 - q1)
        ends = data[(data >= q1 - reach) & (data <= q3 + reach)]
        x1, x2, wide = across(float(ends.min())), across(float(ends.max())), max(across(q3) - across(q1), 1.0)
        parts.append(_svg("line", _class=f"line {colour}", x1=x1, x2=x2, y1=y, y2=y))
        parts.append(_svg("rect", _class=f"box {colour}", x=across(q1), y=y - 9, width=wide, height=18, rx=2))
    for index, (case, value) in enumerate(values.items()):
        # Spread by the golden ratio, so that neighbours in the list lie apart and every page looks the same.
        shift = ((index * 0.618) % 1 - 0.5) * 12 if len(data) > 1 else 0.0
        tip = f"{case}: {value:.4g}"
        parts.append(_svg("circle", "", tip, _class=f"dot {colour}", cx=across(value), cy=y + shift, r=2.6))
    x = across(median)
    parts.append(_svg("line", "", f"median {median:.4g}", _class="median", x1=x, x2=x, y1=y - 10, y2=y + 10))
    return parts


class _Axes:
    """Data coordinates -> SVG coordinates."""

    def __init__(self, x_low: float, x_high: float, y_low: float, y_high: float) -> None:
        self.x_low, self.x_high, self.y_low, self.y_high = x_low, x_high, y_low, y_high

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)

    def frame(self) -> Markup:
        parts = []
        for tick in _ticks(self.y_low, self.y_high, 4):
            y = self.y(tick)
            parts.append(_svg("line", _class="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
            parts.append(_svg("text", _short(tick), _class="tick end", x=LEFT - 6, y=y + 3.5))
        for tick in _ticks(self.x_low, self.x_high, 5):
            parts.append(_svg("text", _short(tick), _class="tick mid", x=self.x(tick), y=HEIGHT - 9))
        return Markup("").join(parts)

    def path(self, x: Sequence[float], y: Sequence[float], kind: str) -> Markup:
        steps, pen_up = [], True
        for a, b in zip(x, y, strict=True):
            if not math.isfinite(b):
                pen_up = True
                continue
            shown = min(max(b, self.y_low), self.y_high)
            steps.append(f"{'M' if pen_up else 'L'}{self.x(a):.1f} {self.y(shown):.1f}")
            pen_up = False
        return _svg("path", _class=kind, d="".join(steps))

    def data(self, lines: Sequence[Line]) -> str:
        """What the read-out needs: plot limits, and the thinned values of each line."""
        curves = []
        for line in lines:
            x, y = _thin(line)
            curves.append(
                {"name": line.name, "x": x, "y": [float(f"{v:.5g}") if math.isfinite(v) else None for v in y]}
            )
        return json.dumps({"span": [self.x_low, self.x_high, LEFT, WIDTH - RIGHT, WIDTH], "curves": curves})


def _svg(tag: str, _text: str = "", _tip: str = "", /, **attributes: float | str) -> Markup:
    """One element; numbers are rounded, everything is escaped. `_class` stands for ``class``."""
    written = Markup(" ").join(
        Markup('{}="{}"').format(key.lstrip("_"), value if isinstance(value, str) else f"{value:.1f}")
        for key, value in attributes.items()
    )
    tip = Markup("<title>{}</title>").format(_tip) if _tip else Markup("")
    return Markup("<{0} {1}>{2}{3}</{0}>").format(tag, written, _text, tip)


def _picture(title: str, width: int, height: int, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        width, height, title, Markup("").join(parts)
    )


def _caption(title: str, note: str) -> Markup:
    return Markup('<figcaption><b>{}</b> <span class="muted">{}</span></figcaption>').format(title, note)


def _fit(values: Sequence[float]) -> tuple[float, float]:
    """Axis limits: from zero where the values come near it, with some room."""
    low, high = min(values), max(values)
    room = max((high - low) * 0.06, abs(high) * 1e-3, 1e-9)
    return (0.0 if 0 <= low < 0.5 * high else low - room), high + room


def _ticks(low: float, high: float, count: int) -> list[float]:
    return [float(tick) for tick in MaxNLocator(count).tick_values(low, high) if low <= tick <= high]


def _legend(lines: Sequence[Line]) -> Markup:
    items = (
        Markup('<span><i class="swatch c{}"></i>{}</span>').format(line.colour % COLOURS, line.name) for line in lines
    )
    return Markup('<div class="legend">{}</div>').format(Markup("").join(items))


def _thin(line: Line) -> tuple[list[float], list[float]]:
    """At most `MOST_POINTS` points: means over equal runs of values."""
    x, y = np.asarray(line.x, dtype=float), np.asarray(line.y, dtype=float)
    if len(x) > MOST_POINTS:
        parts = np.array_split(np.arange(len(x)), MOST_POINTS)
        x, y = np.array([x[p[-1]] for p in parts]), np.array([y[p].mean() for p in parts])
    return x.tolist(), y.tolist()


def _running_mean(values: Sequence[float]) -> list[float]:
    data = np.asarray(values, dtype=float)
    half = max(len(data) // 60, 1)
    return [float(data[max(i - half, 0) : i + half + 1].mean()) for i in range(len(data))]


def _short(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10000 else f"{round(value, 10):.4g}"
