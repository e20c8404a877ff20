"""Every recipe of the package: its facts, its real settings, and two steps of it on small volumes of the right kind."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import scarceseg
from scarceseg.config import Config, merge, read_recipe, recipe_names
from scarceseg.data.catalogue import DATASETS
from scarceseg.data.dataset import Case, Dataset, Split, UnlabelledCase
from scarceseg.data.fingerprint import CaseFacts, Fingerprint, Intensities
from scarceseg.data.plan import Plan, make_plan
from scarceseg.engine.run import train
from scarceseg.evaluation.published import benchmarks
from scarceseg.evaluation.tables import published_rows
from scarceseg.methods import build_terms
from scarceseg.networks.base import build_network, divisor_of
from scarceseg.settings import read_assignments
from tests.test_docs import blocks, commands, parse
from tests.tiny import tiny_config, tiny_dataset

FOLDER = Path(scarceseg.__file__).parent / "recipes"
ABDOMEN_CT_1K = ("background", "liver", "kidney", "spleen", "pancreas")
TABLES = {
    "la": "LA",
    "brats19": "BraTS2019-FLAIR",
    "btcv": "BTCV",
    "mact": "MACT",
    "abdomenct1k": "AbdomenCT-1K",
}
VOLUMES = {
    "la": ((200, 150, 88), (0.625, 0.625, 0.625)),
    "brats19": ((140, 170, 140), (1.0, 1.0, 1.0)),
    "btcv": ((240, 200, 120), (1.5, 1.5, 2.0)),
    "mact": ((160, 140, 120), (1.0, 1.0, 1.0)),
    "abdomenct1k": ((512, 512, 104), (0.8, 0.8, 2.5)),
}
"""Size in voxels and spacing of a typical volume."""


def text_of(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def head_of(name: str) -> list[str]:
    """The facts a recipe opens with; a command that goes on in the next line is one."""
    return [line for line in text_of(name).replace("\\\n# ", "").splitlines()[:4] if line.startswith("# ")]


def command_of(name: str) -> list[str]:
    (command,) = (line.removeprefix("# Command:") for line in head_of(name) if line.startswith("# Command:"))
    return shlex.split(command)


def dataset_of(name: str) -> str:
    return name.split("-")[0]


def kind_of(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Channels and classes of the recipe's dataset."""
    data = dataset_of(name)
    if data == "abdomenct1k":
        return ("CT",), ABDOMEN_CT_1K
    known = DATASETS.get(data)
    return known.channels, known.classes


def config_of(name: str) -> Config:
    return Config.build({"dataset": "data"} | read_recipe(name))


def planned(name: str, config: Config) -> Plan:
    """The plan for a dataset of typical volumes that has as many labelled cases as the recipe wants."""
    size, spacing = VOLUMES[dataset_of(name)]
    channels, classes = kind_of(name)
    count = config.labeled if isinstance(config.labeled, int) else 1
    cases = tuple(Case(f"c{i:03d}", (), Path("label") if i < count else None) for i in range(count + 1))
    dataset = Dataset(Path("data"), name, channels, classes, ".nii.gz", cases)
    split = Split(cases[:count], (UnlabelledCase(cases[-1].name, ()),), ())
    values = [Intensities(low=-100, median=40, high=200, mean=40, std=60, zeros=0) for _ in channels]
    facts = [
        CaseFacts(
            name=case.name,
            labelled=case.label is not None,
            size=size,
            spacing_mm=spacing,
            intensities=values,
            class_voxels=[10**4] * len(classes) if case.label else None,
        )
        for case in cases
    ]
    fingerprint = Fingerprint(cases=facts, overall=values, foreground=values)
    return make_plan(fingerprint, dataset, split, config, divisor_of(config.network.name, config.network.args))


@pytest.mark.parametrize("name", recipe_names())
def test_it_opens_with_its_facts(name: str) -> None:
    head = head_of(name)
    assert len(head) >= 3 and not head[0].startswith("# Command")
    assert all(any(word in line for line in head) for word in ("Time", "xpected"))
    words = command_of(name)
    assert words[:2] == ["scarceseg", "train"] and words[words.index("--recipe") + 1] == name
    parse(words[1:])
    # A recipe that says how many labels needs no flag for it, and the other way round.
    assert ("--labeled" in words) is (read_recipe(name).get("labeled") is None)


@pytest.mark.parametrize("name", recipe_names())
def test_published_figures_are_those_of_the_tables(name: str) -> None:
    head = " ".join(line for line in text_of(name).splitlines() if line.startswith("#"))
    found = re.findall(r"(\d+\.\d+) \(([\w+-]+)\)", head)
    labels = read_recipe(name).get("labeled")
    assert bool(found) is (labels is not None)
    table = re.search(r"Table ([IVX]+)", head)
    for value, method in found:
        rows = published_rows(TABLES[dataset_of(name)], labels, method)
        assert float(value) in [row.dice for row in rows if "SFR" in row.source], (value, method)
        assert table is not None
        tables = " ".join(row.source for row in rows)
        assert "Table" not in tables or re.search(rf"\b{table[1]}\b", tables)


@pytest.mark.parametrize("name", recipe_names())
def test_its_real_settings_make_a_plan_a_network_and_terms(name: str) -> None:
    config = config_of(name)
    plan = planned(name, config)
    assert plan.patch == config.plan.patch and not plan.warnings
    assert config.plan.spacing_mm is None or plan.spacing_mm == config.plan.spacing_mm
    assert plan.normalisation[0].kind == ("ct" if "abdomen" in name else "zscore")
    channels, classes = kind_of(name)
    build_terms(config.method, config.terms, len(classes))
    with torch.device("meta"):
        network = build_network(config.network.name, len(channels), len(classes), config.network.args)
        patch = torch.zeros(1, len(channels), *plan.patch)
        assert network.eval()(patch).shape == (1, len(classes), *plan.patch)


def test_what_the_papers_say() -> None:
    """The settings the papers print, written down here once more."""
    for name in ("la-1", "la-16"):
        config = config_of(name)
        assert (config.plan.patch, config.iterations, config.optim.schedule) == ((112, 112, 80), 6000, "step")
        assert (config.network.name, config.network.args, config.augment) == ("vnet", {}, "reflections")
    for name in ("brats19-1", "brats19-50"):
        assert (config_of(name).plan.patch, config_of(name).network.name) == ((96, 96, 96), "unet3d")
    for name in ("btcv-1", "btcv-7", "abdomenct1k-1", "abdomenct1k-180"):
        config = config_of(name)
        assert (config.plan.patch, config.iterations) == ((96, 96, 96), 70000)
        assert (config.optim.schedule, config.optim.power, config.augment) == ("poly", 0.9, "none")
    for name in ("mact-1", "mact-14"):
        config = config_of(name)
        assert (config.iterations, config.optim.schedule, config.optim.step) == (30000, "step", 12000)
    for name in recipe_names():
        config = config_of(name)
        assert (config.optim.name, config.optim.lr, config.optim.momentum) == ("sgd", 0.01, 0.9)
        assert (config.batch_labeled, config.batch_unlabeled) == (2, 2)


def test_commands_with_sfr_tune_as_the_paper_does() -> None:
    page = (Path(__file__).parents[1] / "docs" / "reference" / "recipes.md").read_text(encoding="utf-8")
    (first,) = [words for block in blocks(page) for words in commands(block.text) if block.language == "sh"]
    found = [words for words in (first, *map(command_of, recipe_names())) if "mean-teacher+sfr" in words]
    assert len(found) == 14
    for words in found:
        assert words[words.index("--foundation") + 1] == "sam-vit-b"
        given = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
        config = Config.build(
            merge(
                {"dataset": "data", "method": "mean-teacher+sfr"} | read_recipe(words[words.index("--recipe") + 1]),
                merge({"method": "mean-teacher+sfr"}, read_assignments(given)),
            )
        )
        options: Any = build_terms(config.method, config.terms, 2)["sfr"].options
        assert (options.patch_augment, options.tune_warmup, options.tune_clip) == ("reflections", 0, None)
        assert options.surest is None
        assert (options.tune_weight_decay, options.tune_power, options.tune_rows, options.axes) == (0.1, 0.9, 2, (2,))


def test_every_benchmark_has_a_recipe_for_few_and_for_more_labels() -> None:
    """For the numbers of labels SFR's tables have: one, and those of the rows with both mean-teacher and sfr."""
    for known in benchmarks():
        rows = [row for row in published_rows(known.name) if row.method == "mean-teacher+sfr"]
        (short,) = (name for name, table in TABLES.items() if table == known.name)
        wanted = {f"{short}-{row.labeled}" for row in rows}
        assert len(wanted) == 2 and wanted <= set(recipe_names())
        assert {read_recipe(name)["labeled"] for name in wanted} == {row.labeled for row in rows}


def test_the_page_lists_them_all() -> None:
    page = (Path(__file__).parents[1] / "docs" / "reference" / "recipes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \|[^|]*\| (\w+) \|", page, flags=re.MULTILINE)
    assert dict(rows) == {name: str(read_recipe(name).get("labeled", "any")) for name in recipe_names()}


@pytest.mark.parametrize("name", recipe_names())
def test_two_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scarceseg.engine.run.build_report", lambda folder: None)  # half the time, and not the recipe's
    channels, classes = kind_of(name)
    data = tiny_dataset(tmp_path / "data", cases=3, classes=len(classes), channels=len(channels), size=(34, 33, 20))
    recipe = read_recipe(name)
    slim = {"feature_scale": 32} if recipe.get("network", {}).get("name") == "unet3d" else {"n_filters": 1}
    small: dict[str, Any] = {"plan": {"patch": [32, 32, 16], "spacing_mm": 1.0}, "iterations": 2, "labeled": 1}
    quick = tiny_config(data).model_dump(mode="json") | {"network": {"name": "vnet", "args": {}}}
    config = Config.build(merge(merge(quick, recipe), merge(small, {"network": {"args": slim}})))
    assert config.optim == config_of(name).optim and config.terms == config_of(name).terms
    result = train(config, tmp_path / "run")
    assert (result.folder / "model.safetensors").exists()
