"""Results in benchmarks/results/ -> the tables in README.md and benchmarks/README.md, between their markers.

    python benchmarks/tables.py [--check]

A row whose code has changed since it was measured is marked as stale. With --check nothing is written and the exit
status says whether the tables are up to date.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

from common import CLICKS, INFERENCE, PIPELINE, RESULTS, ROOT, code_hash, direct_code, step_code, training_code
from scarceseg.evaluation.tables import markdown_table, published_rows
from scarceseg.methods.semisam import SemiSamOptions, need
from step_profile import KINDS, REST

STALE = "†"
SEMISAM_PROMPTS = ("methods/panel.py", "functional/reliability.py", "foundation/dialogue.py", "foundation/prompts.py",
                   "foundation/clicks.py", "foundation/tiny_sam3d.py", "foundation/tiny_sam3d_net.py",
                   "foundation/redrawing.py")  # fmt: skip
FOUNDATION_STEP = (
    "engine/loop.py",
    "engine/step.py",
    "networks/ema.py",
    "networks/vnet.py",
    "methods",
    "foundation",
    "functional",
)
SETTINGS = {"la_development": "LA, 1.25 mm", "la_coarse": "LA, 2.5 mm", "phantoms_development": "phantoms"}
METHODS = ("supervised", "mean-teacher", "ua-mt")
GAINING = {
    "": "tuned (default)",
    "factor 3": "tuned, factor 3 as with 1 label",
    "gate off": "tuned, gate off",
    "frozen": "frozen",
    "frozen, gate off": "frozen, gate off",
}


def load(folder: str) -> list[dict[str, Any]]:
    """All results of one folder, by file name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((RESULTS / folder).glob("*.json"))]


def la_development() -> str:
    """LA development split, with the published figures (full resolution, other test cases) beside ours."""
    return _beside_published([*_teachers("la_teachers"), *load("la_development")])


def la_summary() -> str:
    """The same at a glance: methods as they are by default, by labels."""
    plain = [row for row in load("la_development") if not row.get("name")]
    return _by_method([*_teachers("la_teachers"), *plain], guesses=False)


def la_reflections() -> str:
    """The same with the augmentation of the published scripts."""
    return _beside_published(load("reflections/la_development"))


def _teachers(folder: str) -> list[dict[str, Any]]:
    return [row | {"name": "alone, no network"} for row in load(folder)]


def _beside_published(rows: list[dict[str, Any]]) -> str:
    lines = []
    for seeds in _by_seed(rows):
        published = [p.dice for p in published_rows("LA", seeds[0]["labels"]) if p.method == seeds[0]["method"]]
        lines.append(_row(seeds) | {"published Dice": " / ".join(f"{p:.1f}" for p in published) or "-"})
    return markdown_table(lines) if lines else "Not measured yet."


def la_coarse() -> str:
    """The coarse setting: methods by labels, each with Dice, HD95 and the Dice of its pseudo-labels; means over seeds."""
    return _by_method(load("la_coarse"))


def coarse_reflections() -> str:
    """The coarse setting with the augmentation of the published scripts."""
    return _by_method(load("reflections/la_coarse"))


def augmentation() -> str:
    """Mean Teacher in the coarse setting by what is done to its patches; the default's rows are those of the coarse table."""
    rows = [row | {"name": row["config"]["augment"]} for row in (*load("augmentation"), *load("reflections/la_coarse"))]
    rows += [row | {"name": "deform"} for row in load("la_coarse") if not row.get("name")]
    return _by_method([row for row in rows if row["method"] == "mean-teacher" and row["labels"] in (1, 4, 8)])


def semisam_gains() -> str:
    """What SemiSAM adds to a base method, here and in its paper: means over the seeds that both have."""
    settings = {
        "1.25 mm": load("la_development"),
        "1.25 mm, published augmentation": load("reflections/la_development"),
        "coarse": load("la_coarse"),
        "coarse, published augmentation": load("reflections/la_coarse"),
    }
    counts = (1, 2, 4, 8, 16)
    lines = []
    for base in ("mean-teacher", "ua-mt", "acmt", "mean-teacher+sfr", "mean-teacher+atlas"):
        paper = {
            _counted(labels): _gain(*(_published(labels, name) for name in (base, f"{base}+semisam")))
            for labels in counts
        }
        if set(paper.values()) != {"-"}:
            lines.append(
                {"method": base, "models": "frozen", "setting": "its paper: full resolution, 20 test cases"} | paper
            )
        for setting, rows in settings.items():
            for name in GAINING:
                cells = {_counted(labels): _paired(rows, base, name, labels) for labels in counts}
                if set(cells.values()) - {"-", "nothing asked"}:
                    lines.append({"method": base, "models": GAINING[name], "setting": setting} | cells)
    return markdown_table(lines)


def _published(labels: int, method: str) -> float | None:
    return next((row.dice for row in published_rows("LA", labels, method) if "SemiSAM" in row.source), None)


def _paired(rows: list[dict[str, Any]], base: str, name: str, labels: int) -> str:
    """A base's Dice without and with SemiSAM, over the seeds that both have."""
    plain, helped = (
        {
            row["config"]["seed"]: row
            for row in rows
            if (row["method"], row["labels"], row.get("name", "")) == (method, labels, variant)
        }
        for method, variant in ((base, ""), (f"{base}+semisam", name))
    )
    if not (seeds := sorted(plain.keys() & helped.keys())):
        asks = "gate off" in name or need(labels, SemiSamOptions().enough or labels)
        return "-" if asks else "nothing asked"
    without, with_it = ([runs[seed] for seed in seeds] for runs in (plain, helped))
    cell = _gain(*(mean(100 * row["dice"] for row in runs) for runs in (without, with_it)))
    return cell + (f", {len(seeds)} seeds" if len(seeds) > 1 else "") + _mark(*without, *with_it)


def _gain(without: float | None, with_it: float | None) -> str:
    if without is None or with_it is None:
        return "-"
    return f"{without:.1f} to {with_it:.1f} ({with_it - without:+.1f})"


def batch_norm() -> str:
    """Networks trained with other normalisations of labelled and unlabelled rows, beside those of the coarse table."""
    base = [r for r in load("la_coarse") if r["method"] in ("supervised", "mean-teacher") and not r.get("name")]
    return _by_method([*base, *load("batch_norm")])


def semisam_weight() -> str:
    """The same for the variants of SemiSAM that its default weight was chosen from."""
    kinds = ("mean-teacher", "mean-teacher+semisam")
    return _by_method([row for row in load("reflections/running/la_coarse") if row["method"] in kinds])


def _by_method(rows: list[dict[str, Any]], guesses: bool = True) -> str:
    columns = sorted({row["labels"] for row in rows})
    methods = dict.fromkeys(
        (row["method"], row.get("name", "")) for row in sorted(rows, key=lambda r: _by_labels(r)[1:])
    )
    lines = []
    for method, name in methods:
        line: dict[str, object] = {"method": f"{method} {name}".strip()}
        for labels in columns:
            found = [r for r in rows if (r["method"], r.get("name", ""), r["labels"]) == (method, name, labels)]
            line[_counted(labels)] = _cell(found, guesses) if found else "-"
        lines.append(line)
    return markdown_table(lines) if lines else "Not measured yet."


def _cell(rows: list[dict[str, Any]], guesses: bool) -> str:
    distances = [row["hd95_mm"] for row in rows if row["hd95_mm"] is not None]
    found = [[guess["dice"] for guess in row["pseudo_labels"].values()] for row in rows] if guesses else []
    labels = [f"{100 * mean(stage):.0f}" for stage in zip(*found, strict=True)]
    parts = [_dice(rows), _number(mean(distances) if distances else None), *([", ".join(labels)] if labels else [])]
    return " / ".join(parts) + _mark(*rows)


def _counted(labels: int) -> str:
    return "1 label" if labels == 1 else f"{labels} labels"


def statistics() -> str:
    """The same trained networks with the running statistics of batch norm and with those of the pool."""
    lines = []
    for folder, setting in SETTINGS.items():
        by_kind: dict[str, dict[object, dict[str, Any]]] = {"pool": {}, "running": {}}
        for row in (row for kind in ("", "pool/", "running/") for row in load(f"reflections/{kind}{folder}")):
            by_kind[_statistics_of(row["config"])][_run(row)] = row
        for old in sorted(by_kind["running"].values(), key=_by_labels):
            if (new := by_kind["pool"].get(_run(old))) is not None:
                lines.append(
                    {
                        "setting": setting,
                        "labels": old["labels"],
                        "method": f"{old['method']} {old.get('name', '')}".strip(),
                        "Dice [%], running": f"{100 * old['dice']:.1f}{_mark(old)}",
                        "pool": f"{100 * new['dice']:.1f}{_mark(new)}",
                        "difference": f"{100 * (new['dice'] - old['dice']):+.1f}",
                        "HD95 [mm], running": _number(old["hd95_mm"]),
                        "HD95 [mm], pool": _number(new["hd95_mm"]),
                    }
                )
    if lines:
        gains = [float(str(line["difference"])) for line in lines]
        lines.append(dict.fromkeys(lines[0], "") | {"setting": "mean", "difference": f"{mean(gains):+.1f}"})
    return markdown_table(lines) if lines else "Not measured yet."


def _statistics_of(config: dict[str, Any]) -> str:
    """What a run predicted with; those from before there was a choice, with the running statistics."""
    kind = config.get("batch_norm_statistics", "running")
    return {"auto": "pool" if config.get("batch_norm", "joint") == "joint" else "running"}.get(kind, kind)


def _run(row: dict[str, Any]) -> tuple[object, ...]:
    return (*_by_labels(row), row["config"]["seed"])


def _mark(*rows: dict[str, Any]) -> str:
    """The mark, unless all of these runs, or labels of a teacher alone, are of today's code."""
    return "" if all(row["code"] == code_hash(_code(row)) for row in rows) else f" {STALE}"


def _code(row: dict[str, Any]) -> tuple[str, ...]:
    return training_code(row["method"]) if "train_minutes" in row else direct_code(row["method"])


def la_suggest() -> str:
    """One more labelled case: the suggested one, and random ones."""
    lines = []
    for row in load("la_suggest"):
        now = code_hash(training_code(row["method"]))
        arms = row["arms"]
        random = [100 * arm["dice"] for name, arm in arms.items() if name != "suggested"]
        current = all(arm["code"] == now for arm in arms.values())
        lines.append(
            {
                "start": f"{row['method']}, {_counted(row['labels'])}, {row['config']['plan']['spacing_mm'][0]:g} mm",
                "Dice [%]": f"{100 * row['start']['dice']:.1f}" + ("" if current else f" {STALE}"),
                "with the suggested case": f"{100 * arms['suggested']['dice']:.1f}",
                "with a random case": ", ".join(f"{dice:.1f}" for dice in random),
                "their mean": f"{mean(random):.1f}" if random else "-",
            }
        )
    return markdown_table(lines) if lines else "Not measured yet."


def phantoms_development() -> str:
    """Four structures in two channels: the mean over them."""
    rows = [*_teachers("phantoms_teachers"), *load("phantoms_development")]
    lines = [_row(seeds) for seeds in _by_seed(rows)]
    return markdown_table(lines) if lines else "Not measured yet."


def _by_labels(row: dict[str, Any]) -> tuple[object, ...]:
    order = {name: number for number, name in enumerate(METHODS)}
    return row["labels"], order.get(row["method"], len(order)), row["method"], row.get("name", "")


def _by_seed(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows of each setting, which differ in the seed alone."""
    return [list(seeds) for _, seeds in groupby(sorted(rows, key=_by_labels), key=_by_labels)]


def _row(seeds: list[dict[str, Any]]) -> dict[str, object]:
    """Means over seeds, and the Dice of each."""
    first = seeds[0]
    guesses = [[guess["dice"] for guess in row.get("pseudo_labels", {}).values()] for row in seeds]
    minutes = [
        row["train_minutes"] + sum(row.get("stage_minutes", {}).values()) if "train_minutes" in row else row["minutes"]
        for row in seeds
    ]
    distances = {key: [row[key] for row in seeds if row[key] is not None] for key in ("hd95_mm", "asd_mm")}
    return {
        "labels": first["labels"],
        "method": f"{first['method']} {first.get('name', '')}".strip(),
        "Dice [%]": _dice(seeds) + _mark(*seeds),
        **{f"{key[:-3].upper()} [mm]": _number(mean(found) if found else None) for key, found in distances.items()},
        "failed": sum(row["failed"] for row in seeds),
        "pseudo-label Dice": " / ".join(f"{100 * mean(stage):.1f}" for stage in zip(*guesses, strict=True)) or "-",
        "minutes": f"{mean(minutes):.0f}",
    }


def _dice(seeds: list[dict[str, Any]]) -> str:
    """Mean Dice; of several seeds each one's in brackets."""
    values = sorted(100 * row["dice"] for row in seeds)
    return f"{mean(values):.1f}" + (f" ({', '.join(f'{value:.1f}' for value in values)})" if len(values) > 1 else "")


def foundation_step() -> str:
    """Seconds of a step with a foundation model's help beside the base step measured just before it."""
    now = code_hash(FOUNDATION_STEP)
    lines = []
    for row in load("foundation_step"):
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in row.get("parts", {}).items())
        lines.append(
            {
                "step": row["case"],
                "patch": "x".join(map(str, row["patch"])),
                "base [s]": f"{row['base']:.2f}",
                "s/step": f"{row['seconds']:.2f}" + ("" if row["code"] == now else f" {STALE}"),
                "ratio": f"{row['ratio']:.2f}",
                "of it [s]": parts or "-",
            }
        )
    return markdown_table(lines) if lines else "Not measured yet."


def step_speed() -> str:
    """Seconds of a step in each arithmetic, and how much faster the fastest is than float32 in the default layout."""
    rows = load("step_speed")
    columns = list(dict.fromkeys(key for row in rows for key in row["seconds"]))
    lines: list[dict[str, object]] = []
    for row in rows:
        mark = "" if row["code"] == code_hash(step_code(row["method"])) else f" {STALE}"
        best = max(row["ratio"].values())
        line: dict[str, object] = {"method": row["method"], "patch": "x".join(map(str, row["patch"])) + mark}
        times = {key: f"{seconds:.2f}" for key, seconds in row["seconds"].items()}
        line |= {f"{key.replace('/', ', ')} [s]": times.get(key, "-") for key in columns}
        line |= {"times faster": f"{best:.1f}", "processor": f"{row['processor']}, {row['threads']} threads"}
        lines.append(line)
    return markdown_table(lines) if lines else "Not measured yet."


def speed_summary() -> str:
    """A few ratios: a training step, prediction, metrics, and a foundation model in the loop or beside it."""
    lines: list[dict[str, object]] = []

    def add(what: str, plain: tuple[str, float], ours: tuple[str, float], current: bool) -> None:
        mark = "" if current else f" {STALE}"
        times = f"{plain[1] / ours[1]:.1f}"
        lines.append({"what": what, "plain way": plain[0], "ours": ours[0] + mark, "times faster": times})

    for row in load("step_speed"):
        if row["method"] in ("mean-teacher", "ua-mt") and "bf16" in row["processor"]:
            plain, key = row["seconds"]["fp32/contiguous"], min(row["seconds"], key=row["seconds"].get)
            best, patch = row["seconds"][key], "x".join(map(str, row["patch"]))
            ours = f"{best:.2f} s ({key.replace('/', ', ')})"
            current = row["code"] == code_hash(step_code(row["method"]))
            add(f"a step of {row['method']}, patch {patch}", (f"{plain:.2f} s", plain), (ours, best), current)
    steps = {row["case"]: row for row in load("foundation_step")}
    if {"sfr", "sfr-crop-sam-vit-b"} <= steps.keys():
        plain, best = (steps[case]["seconds"] for case in ("sfr-crop-sam-vit-b", "sfr"))
        what = "a step of mean-teacher+sfr in float32: labels by SAM ViT-B in every step, or once before"
        add(
            what, (f"{plain:.1f} s", plain), (f"{best:.2f} s", best), steps["sfr"]["code"] == code_hash(FOUNDATION_STEP)
        )
    for row in load("inference_speed"):
        size, current = "x".join(map(str, row["size"])), row["code"] == code_hash(INFERENCE)
        plain = (f"{row['legacy_seconds']:.0f} s", row["legacy_seconds"])
        add(
            f"predicting {size}: windows in steps of 18x18x4, or half a window",
            plain,
            (f"{row['seconds']:.1f} s", row["seconds"]),
            current,
        )
        add(
            "the same in one piece (`--whole`)", plain, (f"{row['whole_seconds']:.1f} s", row["whole_seconds"]), current
        )
    metrics = json.loads((RESULTS / "metrics_speed.json").read_text(encoding="utf-8"))
    close = next(row for row in metrics["rows"] if row["masks"] == "close prediction")
    add("metrics of a case", (f"{close['plain_ms']:.0f} ms", close["plain_ms"]), (f"{close['ms']:.0f} ms", close["ms"]),
        metrics["code"] == code_hash(("evaluation/metrics.py",)))  # fmt: skip
    return markdown_table(lines)


def step_profile() -> str:
    """Shares of a step by kind of operation, and what compilation brings."""
    lines = []
    for row in load("step_profile"):
        mark = "" if row["code"] == code_hash(step_code(row["method"])) else f" {STALE}"
        line: dict[str, object] = {"method": row["method"], "patch": "x".join(map(str, row["patch"])) + mark}
        line |= {kind: f"{100 * row['shares'].get(kind, 0.0):.0f} %" for kind in (*KINDS, REST)}
        if "compiled" in row:
            line["torch.compile"] = f"{row['plain']['best']:.2f} -> {row['compiled']['best']:.2f} s"
            line["compilation"] = f"{row['compiled']['first']:.0f} s"
        lines.append(line)
    columns = list(dict.fromkeys(key for line in lines for key in line))
    return markdown_table([{c: line.get(c, "-") for c in columns} for line in lines]) if lines else "Not measured yet."


def speed() -> str:
    """One line for each thing beside the training step: what was measured, and its ratio where there is a plain way."""
    lines: list[dict[str, object]] = []

    def add(what: str, plain: str, ours: str, ratio: str, code: bool) -> None:
        mark = "" if code else f" {STALE}"
        lines.append({"what": what, "plain way": plain, "ours": ours + mark, "times faster": ratio})

    for row in load("inference_speed"):
        size, patch = ("x".join(map(str, row[key])) for key in ("size", "patch"))
        add(
            f"predicting {size}, patch {patch}: {row['legacy_windows']} windows one by one, {row['windows']} in batches",
            f"{row['legacy_seconds']:.0f} s", f"{row['seconds']:.1f} s", f"{row['ratio']:.1f}",
            row["code"] == code_hash(INFERENCE),
        )  # fmt: skip
        current = row["code"] == code_hash(INFERENCE)
        batches = row["seconds_by_batch"]
        seconds = " / ".join(f"{value:.1f}" for value in batches.values())
        add(f"the same, {' / '.join(batches)} windows in a batch", "", f"{seconds} s", "", current)
        add("the same volume in one piece (`--whole`)", f"{row['legacy_seconds']:.0f} s", f"{row['whole_seconds']:.1f} s",
            f"{row['whole_ratio']:.1f}", current)  # fmt: skip
        for key, way in (("dice", "windows"), ("whole_dice", "one piece")):
            if key in row:
                legacy, dice = (f"{100 * row[name]:.2f}" for name in ("legacy_dice", key))
                add(f"Dice [%] of {row['cases']} LA cases, {way}", legacy, dice, "", current)
    parts = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (RESULTS / "pipeline_speed").glob("*")}
    if (row := parts.get("loader", {})) and "step_seconds" in row:
        add("a batch of patches, beside the step it feeds", f"{row['step_seconds']:.2f} s",
            f"{1000 * row['loader_seconds']:.0f} ms", f"{1 / row['loader_share']:.0f}",
            row["code"] == code_hash(PIPELINE["loader"]))  # fmt: skip
        if len(several := row.get("seconds_by_threads", {})) > 1:
            (_, plain), (threads, ours) = several.items()
            add(f"the same by {threads} threads that have nothing else to do", f"{1000 * plain:.0f} ms", f"{1000 * ours:.0f} ms",
                f"{plain / ours:.1f}", row["code"] == code_hash(PIPELINE["loader"]))  # fmt: skip
    if row := parts.get("labels", {}):
        for model, count in row["labels_per_minute"].items():
            add(f"volumes of 104x104x44 labelled by `{model}`", "", f"{count:.0f} a minute", "",
                row["code"] == code_hash(PIPELINE["labels"]))  # fmt: skip
    if row := parts.get("help", {}):
        code = row["code"] == code_hash(PIPELINE["help"])
        add("`scarceseg --help`", "", f"{row['help_seconds']:.2f} s", "", code)
    metrics = json.loads((RESULTS / "metrics_speed.json").read_text(encoding="utf-8"))
    for row in metrics["rows"]:
        add(f"metrics of a case, {row['masks']}", f"{row['plain_ms']:.0f} ms", f"{row['ms']:.0f} ms", f"{row['ratio']:.1f}",
            metrics["code"] == code_hash(("evaluation/metrics.py",)))  # fmt: skip
    return markdown_table(lines)


FOUNDATION_CODE = ("foundation",)


def foundation_clicks() -> str:
    """Dice after 1, 2, 5, 10 clicks, with the published rows of LA beside ours."""
    now = code_hash(CLICKS)
    names = {"la": "LA, cases 64-79", "unseen": "synthetic, unseen setting", "phantoms": "phantoms, 6 classes"}
    lines: list[dict[str, object]] = []
    for row in load("foundation_clicks"):
        mark = "" if row["code"] == now else f" {STALE}"
        line: dict[str, object] = {"data": names[row["set"]], "model": row["foundation"]}
        line |= {_clicks(n): f"{100 * dice:.1f}{mark}" for n, dice in row["mean"].items()}
        lines.append(line | {"targets": len(row["targets"]), "s/click": f"{row['seconds_click']:.3f}"})
    if not lines:
        return "Not measured yet."
    sources: dict[tuple[str, str], dict[str, object]] = {}
    for published in published_rows("LA", 0):
        model, _, count = published.method.partition(" zero-shot, ")
        key = (model, published.source.split(" (")[0])
        per_slice = "N" in count
        line = sources.setdefault(key, {"data": "LA, 20 test cases", "model": f"{model}, {key[1]}"})
        number = count.split()[0].replace("N", "") or "1"
        line[_clicks(number)] = f"{published.dice:.1f}" + (" (a slice)" if per_slice else "")
    columns = list(lines[0])
    shown = [{c: line.get(c, "-") for c in columns} for line in [*lines, *sources.values()]]
    return markdown_table(shown, columns)


def foundation_cost() -> str:
    """Seconds and memory of one volume on the CPU."""
    now = code_hash(FOUNDATION_CODE)
    lines = []
    for row in sorted(load("foundation_cost"), key=lambda r: r["embed"]):
        lines.append(
            {
                "model": row["model"],
                "embed [s]": f"{row['embed']:.2f}" + ("" if row["code"] == now else f" {STALE}"),
                "one prompt [s]": f"{row['prompt']:.3f}" if "prompt" in row else "-",
                "ten prompts [s]": f"{row['ten_prompts']:.2f}" if "prompt" in row else "-",
                "ten prompts / embed": f"{row['ten_over_embed']:.2f}" if "prompt" in row else "-",
                "peak memory [MB]": f"{row['peak_mb']:.0f}",
            }
        )
    return markdown_table(lines) if lines else "Not measured yet."


def sfr_tuning() -> str:
    """What the labels of differently tuned foundation models are worth, and the students of them."""
    lines = []
    for row in sorted(load("sfr_tuning"), key=lambda r: (r["labels"], r["dice"])):
        label = row["pseudo_labels"]["sfr-label"]["dice"]
        taken_over = row["config"]["terms"].get("sfr", {}).get("tuned_in")
        lines.append(
            {
                "labels": row["labels"],
                "tuning": row["name"],
                "label Dice, the pool [%]": f"{100 * label:.1f}{_mark(row)}",
                "student Dice [%]": f"{100 * row['dice']:.1f}",
                "HD95 [mm]": _number(row["hd95_mm"]),
                "minutes of tuning": "-" if taken_over else _number(row["stage_minutes"]["sfr-tune"]),
            }
        )
    return markdown_table(lines) if lines else "Not measured yet."


def confidence() -> str:
    """How far each confidence of a guess says how good it is."""
    known = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("la_development/*.json")}
    lines = []
    for row in sorted(load("confidence"), key=lambda row: (known[row["run"]]["labels"], row["run"])):
        trained = known[row["run"]]
        for stage, found in row["stages"].items():
            both = [found["confidence"], found["foreground_confidence"]]
            lines.append(
                {
                    "labels": trained["labels"],
                    "run": f"{trained['method']} {trained.get('name', '')}".strip(),
                    "guesses": stage,
                    "volumes": found["volumes"],
                    "Dice, all [%]": f"{100 * found['dice']:.1f}{_mark(trained)}",
                    "rank correlation: volume": f"{both[0]['rank_correlation']:.2f}",
                    "foreground": f"{both[1]['rank_correlation']:.2f}",
                    "Dice of the surer half: volume": f"{100 * both[0]['dice']:.1f}",
                    "foreground ": f"{100 * both[1]['dice']:.1f}",
                }
            )
    return markdown_table(lines) if lines else "Not measured yet."


def semisam_prompts() -> str:
    """Masks of a promptable model against those of the student that prompted it."""
    now = code_hash(SEMISAM_PROMPTS)
    lines = []
    for row in sorted(load("semisam_prompts"), key=lambda row: int(row["run"].rsplit("_", 2)[1])):
        mark = "" if row["code"] == now else f" {STALE}"
        kinds = row["kinds"]
        for kind in dict.fromkeys(key.rpartition(", ")[0] for key in kinds):
            plain, gated = kinds[f"{kind}, all"], kinds[f"{kind}, gate"]
            lines.append(
                {
                    "student": _student(row["run"]),
                    "prompt": kind,
                    "student Dice": f"{100 * plain['student_dice']:.1f}{mark}",
                    "mask Dice": f"{100 * plain['dice']:.1f}",
                    "share": f"{plain['share']:.2f}",
                    "share, gate": f"{gated['share']:.2f}",
                }
            )
    return markdown_table(lines) if lines else "Not measured yet."


def _student(run: str) -> str:
    """A run's folder in words."""
    method, labels, _ = run.rsplit("_", 2)
    return f"{method}, {labels} label{'' if labels == '1' else 's'}"


def _clicks(number: str) -> str:
    return "1 click" if number == "1" else f"{number} clicks"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


TABLES = {
    "la-development": la_development,
    "la-summary": la_summary,
    "la-coarse": la_coarse,
    "la-reflections": la_reflections,
    "coarse-reflections": coarse_reflections,
    "augmentation": augmentation,
    "batch-norm": batch_norm,
    "statistics": statistics,
    "semisam-weight": semisam_weight,
    "la-suggest": la_suggest,
    "phantoms-development": phantoms_development,
    "foundation-step": foundation_step,
    "semisam-gains": semisam_gains,
    "semisam-prompts": semisam_prompts,
    "confidence": confidence,
    "step-speed": step_speed,
    "step-profile": step_profile,
    "speed-summary": speed_summary,
    "speed": speed,
    "foundation-clicks": foundation_clicks,
    "foundation-cost": foundation_cost,
    "sfr-tuning": sfr_tuning,
}


def fill(text: str) -> str:
    """Put every table between its two markers."""
    for name, make in TABLES.items():
        start, end = f"<!-- table {name} -->", f"<!-- end {name} -->"
        if start in text:
            before, rest = text.split(start, 1)
            after = rest.split(end, 1)[1]
            text = f"{before}{start}\n{make().strip()}\n{end}{after}"
    return text


def main() -> None:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    late = []
    for path in (ROOT / "README.md", Path(__file__).with_name("README.md")):
        text = path.read_text(encoding="utf-8")
        if fill(text) != text:
            late.append(path.name)
            if not check:
                path.write_text(fill(text))
    if check and late:
        sys.exit(f"tables out of date in {', '.join(late)}: run python benchmarks/tables.py")


if __name__ == "__main__":
    main()
