"""Comparison of runs: the numbers against plain sums and an exhaustive test, groups, baselines, and what is refused."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy.stats import rankdata

import scarceseg
from scarceseg.config import Config, merge
from scarceseg.data.catalogue import list_datasets
from scarceseg.data.images import write_image
from scarceseg.errors import ConfigError, DataError, RunError
from scarceseg.evaluation.compare import compare
from scarceseg.evaluation.comparison import Comparison, Group
from scarceseg.evaluation.comparison_tables import print_comparison
from scarceseg.evaluation.evaluate import evaluate
from scarceseg.evaluation.metrics import METRICS
from scarceseg.evaluation.paired import MIN_CASES, holm, paired_test
from scarceseg.evaluation.published import benchmarks, beside, find_benchmark, summands
from scarceseg.evaluation.tables import published_rows
from scarceseg.types import Geometry

CASES = [f"case_{i:02d}" for i in range(10, 18)]
CLASSES = ("liver", "spleen")


def make_run(
    folder: Path,
    shift: float = 0.0,
    seed: int = 0,
    *,
    method: str = "mean-teacher",
    labels: int = 2,
    cases: list[str] = CASES,
    classes: tuple[str, ...] = CLASSES,
    dataset: str = "phantoms",
    training: int = 10,
    empty: bool = False,
    units: str = "mm",
    **settings: Any,
) -> Path:
    """A finished run with made-up metrics; with `empty` the first class of the first case has no distances."""
    (folder / "checkpoints").mkdir(parents=True)
    values = {"dataset": "/data", "method": method, "labeled": labels, "seed": seed, "val": cases}
    (folder / "config.yaml").write_text(Config.build(merge(values, settings)).dump(), encoding="utf-8")
    names = [f"case_{i:02d}" for i in range(training)]
    rng = np.random.default_rng([seed, len(method), labels])
    rows: dict[str, dict[str, dict[str, float | None]]] = {}
    for case in cases:
        rows[case] = {}
        for name in classes:
            dice = float(np.clip(0.6 + shift + rng.normal(0, 0.05), 0, 1))
            distances = {metric: float(rng.gamma(4.0 - 5 * shift)) for metric in ("asd", "assd", "hd95")}
            rows[case][name] = {"dice": dice, "jaccard": dice / (2 - dice), **distances}
    if empty:
        rows[cases[0]][classes[0]] = {"dice": 0.0, "jaccard": 0.0, "asd": None, "assd": None, "hd95": None}
    evaluation = {"units": units, "cases": rows, "mean": {}, "failed": []}
    split = {"labelled": names[:labels], "unlabelled": names[labels:], "val": cases}
    plan = {"dataset": dataset, "classes": ["background", *classes]}
    for file, content in (("evaluation", evaluation), ("split", split), ("plan", plan)):
        (folder / f"{file}.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def metrics_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "evaluation.json").read_text())["cases"]


def printed(comparison: Comparison, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_comparison(comparison, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def titles(comparison: Comparison) -> list[str]:
    return [group.title for group in comparison.groups]


def by_title(comparison: Comparison, title: str) -> Group:
    return next(group for group in comparison.groups if group.title == title)


def exact_wilcoxon(differences: list[float]) -> float:
    """Two-sided p by going through every assignment of signs."""
    moved = [d for d in differences if d != 0]
    ranks = rankdata(np.abs(moved))
    observed = sum(rank for rank, d in zip(ranks, moved, strict=True) if d > 0)
    sums = [sum(itertools.compress(ranks, signs)) for signs in itertools.product((0, 1), repeat=len(moved))]
    share = min(sum(s <= observed for s in sums), sum(s >= observed for s in sums)) / len(sums)
    return min(1.0, 2 * share)


# numbers


def test_mean_and_deviation_over_seeds_are_plain_sums(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(seed), seed=seed, empty=seed == 1) for seed in range(3)]
    (group,) = compare(runs).groups
    for metric in METRICS:
        by_run = []
        for run in runs:
            means = []
            for name in CLASSES:
                values = [v for case in metrics_of(run).values() if (v := case[name][metric]) is not None]
                means.append(sum(values) / len(values))
            by_run.append(means)
        for index, name in enumerate(CLASSES):
            column = [means[index] for means in by_run]
            mean = sum(column) / 3
            spread = group.metrics[name][metric]
            assert spread.mean == pytest.approx(mean)
            assert spread.std == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in column) / 2))
        overall = [sum(means) / 2 for means in by_run]
        assert group.metrics[None][metric].mean == pytest.approx(sum(overall) / 3)
        undefined = 0 if metric in ("dice", "jaccard") else 1
        assert group.metrics["liver"][metric].undefined == group.metrics[None][metric].undefined == undefined
        assert group.metrics["spleen"][metric].undefined == 0
    assert math.isnan(compare(runs[:1]).groups[0].metrics[None]["dice"].std)


def test_the_unit_of_the_test_is_the_case(tmp_path: Path) -> None:
    """Three seeds against two: a pair of averages a case, not one a seed, over what all runs have; p by exhaustion."""
    ours = [make_run(tmp_path / f"a{seed}", 0.04, seed, empty=seed == 0) for seed in range(3)]
    base = [make_run(tmp_path / f"b{seed}", 0.0, seed, method="supervised") for seed in range(2)]
    comparison = compare([*ours, *base], baseline="supervised")
    group = by_title(comparison, "mean-teacher, 2 labels")
    for scope in (*CLASSES, None):
        names = CLASSES if scope is None else (scope,)
        for metric in METRICS:
            differences = []
            for case in CASES:
                known = [n for n in names if all(metrics_of(r)[case][n][metric] is not None for r in (*ours, *base))]
                values = [[metrics_of(run)[case][n][metric] for run in runs for n in known] for runs in (ours, base)]
                differences += [float(np.mean(values[0]) - np.mean(values[1]))] if known else []
            test = group.tests[scope][metric]
            missing = scope == "liver" and metric not in ("dice", "jaccard")
            assert test.cases == len(differences) == len(CASES) - missing
            assert test.difference == pytest.approx(np.mean(differences))
            assert test.p == pytest.approx(exact_wilcoxon(differences))
            assert test.p_holm == test.p  # one comparison alone
    assert by_title(comparison, "supervised, 2 labels").tests == {}


def test_missing_a_structure_is_no_gain_in_distance(tmp_path: Path) -> None:
    """The hard class is far off in the baseline and not found at all by the other; the easy one is the same in both."""
    runs = [make_run(tmp_path / name, method=name) for name in ("supervised", "mean-teacher")]
    for run in runs:
        evaluation = json.loads((run / "evaluation.json").read_text())
        for number, case in enumerate(CASES):
            evaluation["cases"][case]["spleen"]["hd95"] = 5.0
            evaluation["cases"][case]["liver"]["hd95"] = None if run is runs[1] else 20.0 + number
        (run / "evaluation.json").write_text(json.dumps(evaluation))
    comparison = compare(runs, baseline="supervised")
    tests = by_title(comparison, "mean-teacher, 2 labels").tests
    assert tests[None]["hd95"].difference == 0 and tests[None]["hd95"].p == 1
    assert tests["liver"]["hd95"].cases == 0 and tests["liver"]["hd95"].p is None


def test_undefined_pairs_are_left_out_and_counted() -> None:
    baseline = {f"c{i}": 0.5 for i in range(8)}
    values = {f"c{i}": 0.5 + 0.01 * (i + 1) for i in range(8)} | {"c7": math.nan}
    test = paired_test(values, baseline)
    assert test.cases == 7 and test.p == pytest.approx(2 / 2**7)
    assert test.difference == pytest.approx(np.mean([0.01 * (i + 1) for i in range(7)]))
    few = paired_test({key: values[key] for key in list(values)[: MIN_CASES - 1]}, baseline)
    assert few.p is None and few.cases == MIN_CASES - 1
    assert paired_test({}, baseline).to_json() == {"cases": 0, "difference": None, "p": None, "p_holm": None}


def test_equal_values_are_no_difference() -> None:
    """0.1 + 0.2 is not 0.3 in binary; a case must not count as better for that."""
    values = {f"c{i}": (0.1 + 0.2) for i in range(8)}
    assert paired_test(values, dict.fromkeys(values, 0.3)).p == 1.0
    one = paired_test(values | {"c0": 0.9}, dict.fromkeys(values, 0.3))
    assert one.p == pytest.approx(1.0)


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_is_the_definition(p_values: list[float]) -> None:
    found = holm(p_values)
    ordered = sorted(p_values)
    for p, adjusted in zip(p_values, found, strict=True):
        steps = [min(1.0, (len(p_values) - j) * q) for j, q in enumerate(ordered) if q <= p]
        assert adjusted == max(steps)


def test_holm_over_the_groups_compared(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "base", method="supervised")]
    runs += [make_run(tmp_path / f"i{n}", 0.03 * n, iterations=100 * n) for n in (1, 2, 3)]
    comparison = compare(runs, baseline="supervised")
    tested = [group for group in comparison.groups if group.tests]
    assert len(tested) == 3
    for metric in METRICS:
        p_values = [group.tests[None][metric].p for group in tested]
        assert [group.tests[None][metric].p_holm for group in tested] == holm([p for p in p_values if p is not None])
    assert any("Holm's correction for 3" in note for note in comparison.notes)


# groups


def test_what_makes_a_group(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "0", seed=0),
        make_run(tmp_path / "1", seed=1, terms={"mean-teacher": {"weight": 0.1}}),  # the default, written out
        make_run(tmp_path / "2", seed=2, method="supervised+mean-teacher", device="cpu", log_every=3),
        make_run(tmp_path / "3", terms={"mean-teacher": {"weight": 0.5}}),
        make_run(tmp_path / "4", network={"name": "vnet", "args": {"n_filters": 8}}),
        make_run(tmp_path / "5", labels=4),
        make_run(tmp_path / "6", method="supervised"),
    ]
    comparison = compare(runs)
    assert [len(group.runs) for group in comparison.groups] == [3, 1, 1, 1, 1]
    assert titles(comparison) == [
        "mean-teacher, 2 labels, mean-teacher.weight=0.1",
        "mean-teacher, 2 labels, mean-teacher.weight=0.5",
        "mean-teacher, 2 labels, mean-teacher.weight=0.1, network.args.n_filters=8",
        "supervised, 2 labels",
        "mean-teacher, 4 labels, mean-teacher.weight=0.1",
    ]
    assert [run.config.seed for run in comparison.groups[0].runs] == [0, 1, 2]


def test_where_a_model_was_tuned_makes_no_group(tmp_path: Path) -> None:
    runs = [
        make_run(
            tmp_path / str(seed),
            seed=seed,
            method="acmt+sfr+atlas+semisam",
            terms={"sfr": {"tuned_in": f"runs/{seed}"}, "atlas": {"workers": seed + 1}, "semisam": {"remember": seed}},
        )
        for seed in range(2)
    ]
    (group,) = scarceseg.compare([str(run) for run in runs], json=str(tmp_path / "all.json")).groups
    assert len(group.runs) == 2 and (tmp_path / "all.json").is_file()
    other = make_run(tmp_path / "other", seed=2, method="acmt+sfr+atlas+semisam", terms={"sfr": {"tune_warmup": 7}})
    assert len(compare([*runs, other]).groups) == 2


def test_other_labelled_cases_are_another_group(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "0"), make_run(tmp_path / "1")
    split = json.loads((second / "split.json").read_text())
    split["labelled"], split["unlabelled"][:2] = split["unlabelled"][:2], split["labelled"]
    (second / "split.json").write_text(json.dumps(split))
    assert titles(compare([first, second])) == [
        "mean-teacher, 2 labels, labelled cases=case_00 case_01",
        "mean-teacher, 2 labels, labelled cases=case_02 case_03",
    ]


def test_a_folder_given_twice_counts_once_and_a_seed_twice_is_told(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "0"), make_run(tmp_path / "1")
    assert len(compare([first, tmp_path / "1" / ".." / "0"]).groups[0].runs) == 1
    (warning,) = compare([first, second]).warnings
    assert "same settings and seed 0" in warning


# baselines


def test_a_method_stands_for_its_group_with_as_many_labels(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / f"{method}{labels}", method=method, labels=labels)
        for labels in (1, 2)
        for method in ("mean-teacher", "supervised")
    ]
    runs.append(make_run(tmp_path / "alone", labels=4))
    groups = {group.title: group for group in compare(runs, baseline="supervised").groups}
    assert groups["mean-teacher, 1 label"].baseline == "supervised, 1 label"
    assert groups["mean-teacher, 2 labels"].baseline == "supervised, 2 labels"
    assert "same number of labels" in groups["mean-teacher, 4 labels"].untested
    assert not groups["supervised, 1 label"].tests and not groups["supervised, 1 label"].untested


def test_the_nearest_group_of_a_method_is_taken(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / f"{method}{n}", method=method, iterations=n)
        for n in (100, 200)
        for method in ("mean-teacher", "supervised")
    ]
    comparison = compare(runs, baseline="supervised")
    for n in (100, 200):
        group = by_title(comparison, f"mean-teacher, 2 labels, iterations={n}")
        assert group.baseline == f"supervised, 2 labels, iterations={n}"
    between = make_run(tmp_path / "other", iterations=300)
    group = by_title(compare([*runs, between], baseline="supervised"), "mean-teacher, 2 labels, iterations=300")
    assert "2 groups of supervised" in group.untested and not group.tests


def test_a_run_stands_for_its_group(tmp_path: Path) -> None:
    base = [make_run(tmp_path / f"b{seed}", seed=seed, method="supervised") for seed in range(2)]
    ours = make_run(tmp_path / "a", 0.1, labels=4)
    for given_runs in ([ours, *base], [ours, base[0]], [ours]):  # named among the runs, or in --baseline alone
        comparison = compare(given_runs, baseline=str(base[0]))
        assert by_title(comparison, "mean-teacher, 4 labels").baseline == "supervised, 2 labels"
        assert by_title(comparison, "mean-teacher, 4 labels").tests


@pytest.mark.parametrize(
    ("cases", "words"),
    [(CASES[:5], "5 cases are too few"), ([*CASES[1:], "case_09"], "other cases than the baseline (8 and 8, 7 in")],
)
def test_what_cannot_be_tested_is_said(tmp_path: Path, cases: list[str], words: str) -> None:
    base = make_run(tmp_path / "base", method="supervised", cases=CASES[:5] if len(cases) == 5 else CASES)
    comparison = compare([base, make_run(tmp_path / "a", cases=cases)], baseline="supervised")
    (group,) = (group for group in comparison.groups if group.method == "mean-teacher")
    assert words in group.untested and not group.tests
    assert words in printed(comparison)
    assert (len(cases) == 5) is not any("not comparable" in warning for warning in comparison.warnings)


# what is refused


def test_wrong_input_is_one_message(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    bare = make_run(tmp_path / "bare", val=[])
    (bare / "evaluation.json").unlink()
    broken = make_run(tmp_path / "broken")
    (broken / "evaluation.json").write_text('{"units": "mm"}')
    words = make_run(tmp_path / "words")
    values = json.loads((words / "evaluation.json").read_text())
    values["cases"][CASES[3]]["spleen"]["hd95"] = "far"
    (words / "evaluation.json").write_text(json.dumps(values))
    other = make_run(tmp_path / "other", dataset="hearts")
    halves = make_run(tmp_path / "halves", units="voxel")
    for error, match, arguments in (
        (RunError, "no such folder", {"runs": [tmp_path / "nowhere"]}),
        (RunError, "no config.yaml", {"runs": [run, tmp_path / "empty"]}),
        (RunError, "a file", {"runs": [run / "plan.json"]}),
        (RunError, "without validation cases", {"runs": [run, bare]}),
        (RunError, r"has no test\.json", {"runs": [run], "scores": "test.json"}),
        (DataError, "expected a result", {"runs": [run, broken]}),
        (DataError, "expected numbers or null", {"runs": [words]}),
        (DataError, "'phantoms'.*'hearts'", {"runs": [run, other]}),
        (ConfigError, "different units", {"runs": [run, halves]}),
        (ConfigError, "units: expected", {"runs": [run], "units": "cm"}),
        (ConfigError, "--baseline 'ua-mt'.*mean-teacher", {"runs": [run], "baseline": "ua-mt"}),
        (RunError, "nothing to compare", {"runs": []}),
    ):
        with pytest.raises(error, match=match) as caught:
            compare(**arguments)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_an_unfinished_run_is_named_and_left_out(tmp_path: Path) -> None:
    done = make_run(tmp_path / "done")
    training, validating = make_run(tmp_path / "training", seed=1), make_run(tmp_path / "validating", seed=2)
    for name in ("model.safetensors", "evaluation.json", "split.json"):
        (training / name).unlink()
    (validating / "evaluation.json").unlink()
    comparison = compare([training, done, validating])
    assert [run.folder for run in comparison.groups[0].runs] == [done]
    assert len(comparison.warnings) == 2
    assert all(str(folder) in printed(comparison) for folder in (training, validating))
    with pytest.raises(RunError, match="training has not come to its end"):
        compare([training])
    with pytest.raises(RunError, match="--baseline.*training has not come to its end"):
        compare([done], baseline=str(training))
    with pytest.raises(RunError, match="--baseline.*training has not come to its end"):
        compare([done], baseline=f"{training}/")


# units


def test_units_are_those_of_evaluate(tmp_path: Path) -> None:
    """Distances in voxels must be the ones that measuring the masks anew gives."""
    run = make_run(tmp_path / "run", classes=("1",), cases=["a", "b"])
    rng = np.random.default_rng(0)
    for folder in (run / "validation", tmp_path / "references"):
        folder.mkdir()
        for name in ("a", "b"):
            label = (rng.random((9, 8, 7)) < 0.3).astype(np.uint8)
            geometry = Geometry((9, 8, 7), (0.625,) * 3, (0.0, 0.0, 0.0), (1.0, 0, 0, 0, 1, 0, 0, 0, 1))
            write_image(label, geometry, folder / f"{name}.nii.gz")
    evaluate(run / "validation", tmp_path / "references", json=run / "evaluation.json")
    voxel = evaluate(run / "validation", tmp_path / "references", json=run / "voxel.json", units="voxel")
    for comparison in (compare([run], units="voxel"), compare([run], scores="voxel.json")):
        assert comparison.units == "voxel"
        for metric in METRICS:
            assert comparison.groups[0].metrics[None][metric].mean == pytest.approx(voxel.mean["1"][metric], rel=1e-5)
    millimetres = compare([run], scores="voxel.json", units="mm").groups[0].metrics[None]["hd95"].mean
    assert millimetres == pytest.approx(0.625 * voxel.mean["1"]["hd95"], rel=1e-5)


def test_distances_of_long_voxels_are_not_scaled(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", classes=("1",), cases=["a"])
    (run / "validation").mkdir()
    with pytest.raises(ConfigError, match="there is no .*a.nii.gz"):
        compare([run], units="voxel")
    geometry = Geometry((9, 8, 7), (1.0, 1.0, 2.0), (0.0, 0.0, 0.0), (1.0, 0, 0, 0, 1, 0, 0, 0, 1))
    write_image(np.zeros((9, 8, 7), np.uint8), geometry, run / "validation" / "a.nii.gz")
    with pytest.raises(ConfigError, match=r"not cubes.*--scores voxel\.json"):
        compare([run], units="voxel")


# published rows


def test_published_rows_stand_beside_a_known_benchmark(tmp_path: Path) -> None:
    classes = ("left_atrium",)
    runs = [
        make_run(tmp_path / "a", dataset="LA2018", classes=classes, labels=4, training=64),
        make_run(tmp_path / "b", dataset="LA2018", classes=classes, labels=4, training=64, method="supervised"),
    ]
    comparison = compare(runs)
    methods = [row.method for row in comparison.published]
    assert set(methods) == {"mean-teacher", "supervised", "generic-ssl (A&D)"}  # ours, and the best
    text = printed(comparison)
    assert "published, mean-teacher [1]" in text and "72.40" in text and "SemiSAM paper" in text
    assert "best published, generic-ssl (A&D)" in text
    assert "20 test cases, 80 training volumes" in text
    assert "8 validation cases, 64 training volumes: not the published split" in text
    assert "21.55" not in text and "--units voxel" in text  # voxels do not stand beside mm
    found = comparison.to_json()["published"][methods.index("mean-teacher")]
    assert (found["dice"], found["hd95_voxel"]) == (0.724, 21.55) and "SemiSAM" in found["source"]


def test_the_published_split_is_known_by_names_and_numbers(tmp_path: Path) -> None:
    cases = [f"la_test_{i:03d}" for i in range(20)]
    run = make_run(tmp_path / "a", dataset="la", classes=("left_atrium",), training=80, cases=cases, units="voxel")
    text = printed(compare([run]))
    assert "20 test cases, 80 training volumes: the published split" in text
    assert "44.93" in text and "17.33" in text  # Mean Teacher with 2 labels, in voxels


def test_benchmarks_agree_with_their_tables_and_the_catalogue() -> None:
    for known in benchmarks():
        rows = published_rows(known.name)
        assert max(row.labeled + row.unlabeled for row in rows) == known.training
        assert all(row.labeled + row.unlabeled in (row.labeled, known.training) for row in rows)
    found = {data.name: find_benchmark(data.name, len(data.classes) - 1) for data in list_datasets()}
    assert {key: value.name for key, value in found.items() if value} == {
        "la": "LA",
        "brats19": "BraTS2019-FLAIR",
        "btcv": "BTCV",
        "mact": "MACT",
    }
    assert find_benchmark("Dataset012_AbdomenCT-1K", 4) is not None
    assert find_benchmark("brats19", 3) is None and find_benchmark("own", 1) is None


def test_sums_are_read_whatever_their_order() -> None:
    assert summands("supervised+mean-teacher+sfr+") == ("mean-teacher", "sfr+")
    assert summands("sfr++mean-teacher") == ("sfr+", "mean-teacher")
    assert summands("supervised") == ("supervised",)
    la = next(known for known in benchmarks() if known.name == "LA")
    for method, dice in (("sfr+mean-teacher", 74.4), ("mean-teacher+sfr+", 81.03)):
        assert dice in [row.dice for row in beside(la, [method], 1)]
    assert "mc-net+" in [row.method for row in beside(la, ["mc-net"], 8)]


# output


def test_files_hold_the_same_numbers(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"a{seed}", 0.05, seed) for seed in range(2)]
    runs.append(make_run(tmp_path / "b", method="supervised", empty=True))
    comparison = compare(runs, baseline="supervised", json=tmp_path / "c.json", csv=tmp_path / "deep" / "c.csv")
    saved = json.loads((tmp_path / "c.json").read_text())
    assert saved == json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    rows = list(csv.DictReader(io.StringIO((tmp_path / "deep" / "c.csv").read_text())))
    assert len(rows) == 2 * 3 * len(METRICS)
    groups = {group["method"]: group for group in saved["groups"]}
    for row in rows:
        group = groups[row["method"]]
        part = group["overall"] if row["class"] == "all" else group["classes"][row["class"]]
        spread = part[row["metric"]]
        assert float(row["mean"]) == spread["mean"]
        assert row["std"] == ("" if spread["std"] is None else repr(spread["std"]))
        if row["method"] == "supervised":
            assert row["p"] == "" and group["tests"] is None
        else:
            tests = group["tests"]["overall"] if row["class"] == "all" else group["tests"]["classes"][row["class"]]
            assert float(row["p"]) == tests[row["metric"]]["p"]
    assert groups["mean-teacher"]["seeds"] == [0, 1] and groups["mean-teacher"]["network"] == "vnet"


def test_screen(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"a{seed}", 0.1, seed, empty=seed == 0) for seed in range(2)]
    runs.append(make_run(tmp_path / "b", method="supervised"))
    comparison = compare(runs, baseline="supervised")
    text = printed(comparison)
    spread = comparison.groups[0].metrics[None]["dice"]
    assert f"{100 * spread.mean:.2f} ± {100 * spread.std:.2f}" in text
    test = comparison.groups[0].tests[None]["dice"]
    assert f"{100 * test.difference:+.2f}" in text and "supervised, 2 labels" in text and "[1]" not in text
    assert "liver" in text and "all classes" in text and "(1)" in text and "undefined in n cases" in text
    many = [f"organ{i:02d}" for i in range(25)]
    runs = [make_run(tmp_path / name, method=name, classes=tuple(many)) for name in ("mean-teacher", "supervised")]
    assert "organ03" not in printed(compare(runs))  # the files have the classes
