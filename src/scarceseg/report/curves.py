"""Curves of a run -> charts."""

from __future__ import annotations

from markupsafe import Markup

from scarceseg.report.charts import Line, line_chart
from scarceseg.report.folder import VALIDATION, Curve, RunRecord


def curve_charts(record: RunRecord) -> list[Markup]:
    """Per stage: the sum, each term, the weights that change, the learning rate; then validation Dice."""
    charts = []
    for stage, curves in record.curves.items():
        if stage == VALIDATION:
            continue
        note = "" if stage == "train" else stage
        terms = [key for key in curves if key.startswith("loss/")]
        if "loss" in curves and len(terms) != 1:
            charts.append(line_chart("loss, weighted sum", [_line("loss", curves["loss"], 6, smooth=True)], note))
        for index, key in enumerate(terms):
            name = key.removeprefix("loss/")
            charts.append(line_chart(f"loss of {name}", [_line(name, curves[key], index, smooth=True)], note))
        weights = [key for key in curves if key.startswith("weight/") and len(set(curves[key][1])) > 1]
        moving = [
            _line(k.removeprefix("weight/"), curves[k], terms.index(k.replace("weight/", "loss/", 1)))
            for k in weights
            if k.replace("weight/", "loss/", 1) in terms
        ]
        if moving:
            charts.append(
                line_chart("weights that change", moving, note or (moving[0].name if len(moving) == 1 else ""))
            )
        if "lr" in curves:
            charts.append(line_chart("learning rate", [_line("lr", curves["lr"], 7)], note))
    dice = {k: v for k, v in record.curves.get(VALIDATION, {}).items() if k.startswith("dice/")}
    if dice:
        lines = [_line(key.removeprefix("dice/"), curve, index) for index, (key, curve) in enumerate(dice.items())]
        charts.append(line_chart("Dice on validation cases", lines, y_range=(0.0, 1.0)))
    return [chart for chart in charts if chart]


def _line(name: str, curve: Curve, colour: int, smooth: bool = False) -> Line:
    return Line(name, curve[0], curve[1], colour, smooth)
