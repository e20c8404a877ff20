"""A run folder -> its page, ``report.html``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from scarceseg.errors import DataError
from scarceseg.evaluation.tables import class_average
from scarceseg.files import write_text
from scarceseg.methods.models import foundation_words
from scarceseg.report.curves import curve_charts
from scarceseg.report.figures import CLASS_COLOURS
from scarceseg.report.folder import RunRecord, ShownCase, read_case, read_run
from scarceseg.report.numbers import duration, metrics_section, published_section, show, stage_rows
from scarceseg.report.pool import mosaic_section, pool_section, prompt_section
from scarceseg.report.suggested import suggested_section
from scarceseg.report.viewers import Viewer, planes_viewer, within_budget

MOST_CASES = 6
AUGMENTATION = {
    "deform": "small deformations and contrast",
    "all": "turns and flips",
    "reflections": "turns, always flipped, as published",
    "none": "none",
}
STATISTICS = {"pool": "of all training images", "running": "of the last training steps"}


def build_report(run: Path) -> Path:
    """Write ``RUN/report.html``: what was asked, warnings, curves, segmentations, metrics, time and memory.

    Whatever a run has not (yet) left is left out; a damaged file is named among the warnings.

    Args:
        run: run folder, finished or not.

    Returns:
        Path of the page, one file that needs no other.

    Raises:
        RunError: no run folder, no ``config.yaml`` in it, or it cannot be written.
    """
    record = read_run(run)
    cases = _cases(record)  # this and the next may add notes, so they come first
    mosaics, pool, prompts = mosaic_section(record), pool_section(record), prompt_section(record)
    suggested = suggested_section(record)
    total = record.config.iterations if record.config else record.trained
    finished = (run / "model.safetensors").exists()
    page = {
        "title": f"{record.config.method if record.config else run.name} on {_dataset(record)}",
        "sentence": _sentence(record),
        "finished": finished,
        "state": "finished" if finished else f"stopped at iteration {record.trained} of {total}",
        "tiles": _tiles(record),
        "warnings": [*record.warnings, *record.notes],
        "asked": _asked(record),
        "made_with": _made_with(record),
        "terms": _terms(record),
        "split": [(words, record.split[role]) for role, words in ROLES.items() if role in record.split],
        "curves": curve_charts(record),
        "cases": cases,
        "case_words": _case_words(record, cases),
        "any_reference": any(kind == "reference" for viewer in cases for kind, _ in viewer["toggles"]),
        "legend": class_legend(record.classes),
        "metrics": metrics_section(record),
        "published": published_section(record),
        "mosaics": mosaics,
        "pool": pool,
        "prompts": prompts,
        "suggested": suggested,
        "stages": stage_rows(record),
        "total_time": duration(record.seconds),
        "run_path": shlex.quote(str(run)),
        "config_text": record.config_text,
        "environment_text": _pretty(record.environment),
        "plan_text": _pretty(record.plan),
    }
    return write_page("template.html", page, run / "report.html")


def write_page(template: str, page: Mapping[str, Any], path: Path) -> Path:
    """Fill a template (every value is escaped) and write the page, in ASCII so that no tool can misread it."""
    pages = Environment(
        loader=PackageLoader("scarceseg", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    try:
        ours = version("scarceseg")
    except PackageNotFoundError:
        ours = ""
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    text = pages.get_template(template).render(page, version=ours, made=made)
    write_text(path, text.encode("ascii", "xmlcharrefreplace").decode("ascii"))
    return path


ROLES = {"labelled": "Labelled", "unlabelled": "Unlabelled", "val": "Validation"}


def _dataset(record: RunRecord) -> str:
    named = record.plan.get("dataset") or (Path(record.config.dataset).name if record.config else "")
    return str(named or "an unnamed dataset")


def _counts(record: RunRecord) -> dict[str, int]:
    return {role: len(record.split.get(role, [])) for role in ROLES}


def _sentence(record: RunRecord) -> str:
    config = record.config
    if config is None:
        return f"Run folder {record.folder.name}."
    counts = _counts(record)
    words = f"A {config.network.name} trained with {config.method}"
    if record.split:
        words += f" on {counts['labelled']} labelled"
        words += f" and {counts['unlabelled']} unlabelled volumes" if counts["unlabelled"] else " volumes"
    structures = record.classes
    words += f", to segment {', '.join(structures[:6])}{' ...' if len(structures) > 6 else ''}" if structures else ""
    return f"{words}. Run folder {record.folder.name}."


def _tiles(record: RunRecord) -> list[tuple[str, str]]:
    tiles = []
    if record.evaluation and record.evaluation["mean"]:
        mean = class_average(record.evaluation)
        units = record.evaluation["units"]
        over = "mean over classes" if len(record.evaluation["mean"]) > 1 else "validation"
        tiles.append((show(mean["dice"], "dice") + " %", f"Dice, {over}"))
        distance = show(mean["hd95"], "hd95")
        tiles.append((distance if distance == "-" else f"{distance} {units}", f"HD95, {over}"))
    if record.split:
        counts = _counts(record)
        tiles.append((str(counts["labelled"]), "labelled volumes"))
        tiles.append((str(counts["unlabelled"]), "unlabelled volumes"))
        if counts["val"]:
            tiles.append((str(counts["val"]), "validation volumes"))
    if record.stages:
        tiles.append((duration(record.seconds), "in all stages"))
    return tiles


def _asked(record: RunRecord) -> list[tuple[str, str]]:
    config, plan = record.config, record.plan
    if config is None:
        return []
    arguments = ", ".join(f"{k}={v}" for k, v in config.network.args.items())
    rows = [
        ("method", config.method),
        ("dataset", config.dataset),
        ("network", f"{config.network.name}{f' ({arguments})' if arguments else ''}"),
        ("classes", ", ".join(record.classes)),
        ("channels", ", ".join(map(str, plan.get("channels", [])))),
        ("spacing", _times(plan.get("spacing_mm", []), " mm")),
        ("patch", _times(plan.get("patch", []), " voxels")),
        ("normalisation", ", ".join(str(n.get("kind")) for n in plan.get("normalisation", []) if isinstance(n, dict))),
        ("batch", f"{config.batch_labeled} labelled, up to {config.batch_unlabeled} unlabelled patches"),
        ("labelled patches", f"{config.foreground:.0%} centred on a structure" if config.foreground else ""),
        ("augmentation", AUGMENTATION[config.augment]),
        ("batch norm", "labelled and unlabelled rows by themselves" if config.batch_norm == "split" else ""),
        ("statistics", STATISTICS.get(config.batch_norm_statistics, "")),
        ("iterations", str(config.iterations)),
        ("optimiser", f"{config.optim.name}, learning rate {config.optim.lr:g}, {config.optim.schedule} schedule"),
        ("foundation model", foundation_words(config)),
        ("checkpoint kept", "the best on validation" if config.select == "best" else "the last"),
        ("seed", str(config.seed)),
    ]
    return [(word, value) for word, value in rows if value]


def _made_with(record: RunRecord) -> list[tuple[str, str]]:
    there = record.environment
    rows = [(key.replace("_", " "), there.get(key)) for key in ("device", "precision", "memory_format", "threads")]
    rows += [
        ("python", there.get("python")),
        ("system", f"{there.get('system', '')} {there.get('machine', '')}".strip()),
    ]
    versions = there.get("versions")
    rows += list(versions.items()) if isinstance(versions, dict) else []
    return [(str(word), str(value)) for word, value in rows if value not in (None, "")]


def _times(values: Sequence[object], unit: str) -> str:
    return " × ".join(f"{v:g}" if isinstance(v, int | float) else str(v) for v in values) + unit if values else ""


def _terms(record: RunRecord) -> list[dict[str, str]]:
    train = record.curves.get("train", {})
    names = [key.removeprefix("loss/") for key in train if key.startswith("loss/")]
    options = record.config.terms if record.config else {}
    names += [name for name in options if name not in names]
    rows = []
    for name in names:
        weights = train.get(f"weight/{name}", ([], []))[1]
        chosen = ", ".join(f"{k}={v}" for k, v in options.get(name, {}).items())
        rows.append({"name": name, "weight": f"{weights[-1]:.4g}" if weights else "-", "options": chosen or "defaults"})
    return rows


def _cases(record: RunRecord) -> list[Viewer]:
    makers = []
    for path in record.figures[:MOST_CASES]:
        try:
            case = read_case(path)
        except DataError as error:
            record.notes.append(str(error))
            continue
        makers.append(planes_viewer(case, _case_note(record, case)))
    viewers = within_budget(makers)
    if len(viewers) < len(makers) or len(record.figures) > MOST_CASES:
        record.notes.append(
            f"{len(viewers)} of the {len(record.figures)} cases in figures are shown, to keep this page small"
        )
    return viewers


def _case_note(record: RunRecord, case: ShownCase) -> str:
    """Dice by class, when the case was evaluated; a title may carry a rank in brackets behind the name."""
    cases = (record.evaluation or {}).get("cases", {})
    classes = cases.get(case.title) or cases.get(case.title.rsplit(" (", 1)[0]) or {}
    return ", ".join(f"Dice {name} {show(values['dice'], 'dice')} %" for name, values in classes.items())


def _case_words(record: RunRecord, cases: Sequence[Viewer]) -> str:
    if not cases:
        return ""
    kind = (
        "Validation cases, never trained on." if record.split.get("val") else "Unlabelled cases; there is no reference."
    )
    has_letters = any(pane["letters"] for viewer in cases for pane in viewer["panes"])
    sides = (
        "Letters: patient's right, left, anterior, posterior, head, feet."
        if has_letters
        else "Planes are named after the axes of the file; left and right are as stored, not as in a radiological view."
    )
    return f"{kind} {sides} Uncertainty, where there is a box for it, goes from red (some) to yellow (most)."


def class_legend(classes: Sequence[str]) -> list[tuple[str, str]]:
    """Class names with the colours of their masks, as ``(r,g,b)``."""
    return [(name, str(CLASS_COLOURS[i % len(CLASS_COLOURS)])) for i, name in enumerate(classes)]


def _pretty(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) if values else ""
