"""Which benchmark a dataset is, and the published rows that belong beside a method on it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from scarceseg.evaluation.tables import PublishedRow, published_rows


@dataclass(frozen=True)
class Benchmark:
    """A dataset that published tables are about.

    Attributes:
        name: as in the tables.
        names: a dataset's name in small letters and digits alone, by which it is known.
        classes: number of foreground classes.
        training, test: volumes behind the published rows; None where no list tells.
    """

    name: str
    names: tuple[str, ...]
    classes: int
    training: int
    test: int | None


@cache
def benchmarks() -> tuple[Benchmark, ...]:
    """All benchmarks of the packaged tables."""
    text = (resources.files("scarceseg.evaluation") / "published.json").read_text(encoding="utf-8")
    return tuple(
        Benchmark(name, tuple(facts["names"]), facts["classes"], facts["training"], facts["test"])
        for name, facts in json.loads(text)["benchmarks"].items()
    )


def find_benchmark(dataset: str, classes: int) -> Benchmark | None:
    """The benchmark of that name and number of foreground classes, or None.

    nnU-Net's prefixes (``Dataset012_``, ``Task05_``) and signs between letters do not count.
    """
    plain = re.sub(r"^(dataset|task)\d+_", "", dataset.lower())
    plain = re.sub(r"[^a-z0-9]", "", plain)
    return next((known for known in benchmarks() if plain in known.names and classes == known.classes), None)


def summands(method: str) -> tuple[str, ...]:
    """Terms of a sum as written, without ``supervised`` unless it is alone; ``sfr+`` is one name.

    Other than `methods.parse_method` it takes any name, since the tables hold methods that are not here.
    """
    names: list[str] = []
    for part in method.split("+"):
        if part or not names:
            names.append(part.strip())
        else:
            names[-1] += "+"
    return tuple(name for name in names if name != "supervised") or ("supervised",)


OUR_NAMES = {"mc-net+": "mc-net"}
"""What published tables call a term of ours: `mc-net` has the three decoders of MC-Net+ unless told otherwise."""


def same_sum(first: str, second: str) -> bool:
    """Whether two sums have the same terms, in whatever order."""
    ours, theirs = (sorted(OUR_NAMES.get(name, name) for name in summands(method)) for method in (first, second))
    return ours == theirs


def beside(benchmark: Benchmark, methods: Iterable[str], labels: int) -> list[PublishedRow]:
    """Published rows with that number of labels: those of the methods, and the one with the highest Dice of all."""
    wanted = list(methods)
    rows = published_rows(benchmark.name, labels)
    chosen = [row for row in rows if any(same_sum(row.method, method) for method in wanted)]
    best = max((row for row in rows if row.dice is not None), key=lambda row: row.dice or 0.0, default=None)
    return chosen if best is None or best in chosen else [*chosen, best]


def row_metrics(row: PublishedRow) -> dict[str, tuple[float | None, str]]:
    """Value and unit of each metric of a row, overlaps in [0, 1] as `evaluate` has them; distances are in voxels."""
    overlaps = {"dice": row.dice, "jaccard": row.jaccard}
    distances = {"asd": row.asd_voxel, "hd95": row.hd95_voxel}
    shares = {name: (None if value is None else round(value / 100, 6), "") for name, value in overlaps.items()}
    return shares | {name: (value, "voxel") for name, value in distances.items()}


def split_note(benchmark: Benchmark, training: int, cases: Sequence[str]) -> str:
    """One sentence: what the published rows were measured on, and what the runs were.

    Args:
        benchmark: of the rows.
        training: volumes the runs were trained on, labelled and unlabelled.
        cases: names of the cases the runs were measured on.
    """
    test = "their own" if benchmark.test is None else str(benchmark.test)
    theirs = f"published rows: {test} test cases, {benchmark.training} training volumes"
    # Converted benchmarks have their test cases, and only those, named so.
    tested = bool(cases) and all("_test_" in case for case in cases)
    ours = f"these runs: {len(cases)} {'test' if tested else 'validation'} cases, {training} training volumes"
    if tested and len(cases) == benchmark.test and training == benchmark.training:
        return f"{theirs}; {ours}: the published split by names and numbers"
    return f"{theirs}; {ours}: not the published split, so the rows are only roughly comparable"
