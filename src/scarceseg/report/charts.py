"""Numbers -> inline SVG that takes its colours from the page, so that it is legible in light and dark mode."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup, escape
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 26
COLOURS = 8
MOST_POINTS = 240


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
    note: str = field(default="")


def line_chart(title: str, lines: Sequence[Line], note: str = "", y_range: tuple[float, float] | None = None) -> Markup:
    """A figure with a caption, axes, legend (for several lines) and the values for a read-out under the pointer.

    Args:
        title: caption.
        lines: curves, not all empty.
        note: further words in the caption.
        y_range: of the axis; None fits the values.
    """
    finite = [(x, y) for line in lines for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    if not finite:
        return Markup("")
    x_low, x_high = min(x for x, _ in finite), max(x for x, _ in finite)
    low, high = y_range or (min(y for _, y in finite), max(y for _, y in finite))
    x_low, x_high = (x_low, x_high) if x_high > x_low else (x_low - 1, x_high + 1)
    pad = 0.0 if y_range else max((high - low) * 0.06, abs(high) * 1e-3, 1e-9)
    low, high = (low - pad if low < 0 or low > pad else min(low, 0.0)), high + pad
    place = _Axes(x_low, x_high, low, high)
    parts = [place.frame()]
    for line in lines:
        x, y = _thin(line)
        parts.append(place.path(x, y, f"line c{line.colour % COLOURS}" + (" faint" if line.smooth else "")))
        if line.smooth:
            parts.append(place.path(x, _running_mean(y), f"line c{line.colour % COLOURS}"))
        if len(x) == 1:
            parts.append(place.dot(x[0], y[0], line.colour))
    parts.append(Markup('<line class="cursor" y1="{}" y2="{}" x1="-9" x2="-9"/>').format(TOP, HEIGHT - BOTTOM))
    picture = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, title, Markup("").join(parts)
    )
    caption = Markup('<figcaption><b>{}</b> <span class="muted">{}</span></figcaption>').format(title, note)
    legend = _legend(lines) if len(lines) > 1 else Markup("")
    return Markup('<figure class="chart" data-chart="{}">{}{}{}<output class="readout"></output></figure>').format(
        place.data(lines), caption, picture, legend
    )


def box_plot(title: str, groups: Sequence[Group], note: str = "", x_range: tuple[float, float] | None = None) -> Markup:
    """Horizontal boxes (quartiles, median, whiskers to the last value within 1.5 box lengths) with all cases as dots."""
    shown = [(g, {k: v for k, v in g.values.items() if v is not None and math.isfinite(v)}) for g in groups]
    shown = [(group, values) for group, values in shown if values]
    if not shown:
        return Markup("")
    everything = [v for _, values in shown for v in values.values()]
    low, high = x_range or (min(0.0, *everything, 0.0), max(everything) * 1.05 + 1e-9)
    row, width, left = 34, 460, 110
    height = TOP + row * len(shown) + BOTTOM
    ticks = [t for t in MaxNLocator(5).tick_values(low, high) if low - 1e-9 <= t <= high + 1e-9]

    def across(value: float) -> float:
        return left + (value - low) / (high - low) * (width - left - 14)

    parts = [
        Markup('<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/><text class="tick mid" x="{0:.1f}" y="{3}">{4:g}</text>').format(
            across(t), TOP, height - BOTTOM, height - 9, round(t, 6)
        )
        for t in ticks
    ]
    for index, (group, values) in enumerate(shown):
        parts.append(_box(group, values, TOP + row * (index + 0.5), left, across))
    picture = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        width, height, title, Markup("").join(parts)
    )
    caption = Markup('<figcaption><b>{}</b> <span class="muted">{}</span></figcaption>').format(title, note)
    return Markup('<figure class="chart">{}{}</figure>').format(caption, picture)


def _box(group: Group, values: Mapping[str, float], y: float, left: float, across: object) -> Markup:
    assert callable(across)
    data = np.array(list(values.values()))
    q1, median, q3 = np.percentile(data, (25, 50, 75))
    reach = 1.5 * (q3 - q1)
    ends = data[(data >= q1 - reach) & (data <= q3 + reach)]
    colour = f"c{group.colour % COLOURS}"
    name = group.name if len(group.name) <= 16 else group.name[:15] + "…"
    parts = [
        Markup('<text class="tick end" x="{}" y="{:.1f}">{}<title>{}</title></text>').format(
            left - 8, y + 4, name, group.name
        )
    ]
    if len(data) >= 3:
        parts.append(
            Markup('<line class="line {4}" x1="{0:.1f}" x2="{1:.1f}" y1="{2:.1f}" y2="{2:.1f}"/><rect class="box {4}" x="{3:.1f}" width="{5:.1f}" y="{6:.1f}" height="18" rx="2"/>').format(
                across(ends.min()), across(ends.max()), y, across(q1), colour, max(across(q3) - across(q1), 1), y - 9
            )
        )
    for index, (case, value) in enumerate(values.items()):
        shift = 0.0 if len(data) < 2 else ((index * 0.618) % 1 - 0.5) * 12
        parts.append(
            Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="2.6"><title>{}: {:.4g}</title></circle>').format(
                colour, across(value), y + shift, case, value
            )
        )
    parts.append(
        Markup('<line class="median" x1="{0:.1f}" x2="{0:.1f}" y1="{1:.1f}" y2="{2:.1f}"><title>median {3:.4g}</title></line>').format(
            across(median), y - 10, y + 10, median
        )
    )
    return Markup("").join(parts)


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
        for tick in MaxNLocator(4).tick_values(self.y_low, self.y_high):
            if self.y_low <= tick <= self.y_high:
                parts.append(
                    Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/><text class="tick end" x="{}" y="{:.1f}">{}</text>').format(
                        LEFT, WIDTH - RIGHT, self.y(tick), self.y(tick), LEFT - 6, self.y(tick) + 3.5, _short(tick)
                    )
                )
        for tick in MaxNLocator(5, integer=True).tick_values(self.x_low, self.x_high):
            if self.x_low <= tick <= self.x_high:
                parts.append(
                    Markup('<text class="tick mid" x="{:.1f}" y="{}">{}</text>').format(
                        self.x(tick), HEIGHT - 9, _short(tick)
                    )
                )
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
        return Markup('<path class="{}" d="{}"/>').format(kind, "".join(steps))

    def dot(self, x: float, y: float, colour: int) -> Markup:
        return Markup('<circle class="dot c{}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(
            colour % COLOURS, self.x(x), self.y(y)
        )

    def data(self, lines: Sequence[Line]) -> str:
        """What the read-out needs: plot limits, and the thinned values of each line."""
        curves = []
        for line in lines:
            x, y = _thin(line)
            curves.append({"name": line.name, "x": x, "y": [round(v, 6) if math.isfinite(v) else None for v in y]})
        span = [self.x_low, self.x_high, LEFT, WIDTH - RIGHT, WIDTH]
        return json.dumps({"span": span, "curves": curves})


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
    return str(escape(f"{value / 1000:g}k" if abs(value) >= 10000 else f"{round(value, 10):.4g}"))
