"""How good a promptable model is after 1, 2, 5, 10 clicks: the published evaluation, on any labelled dataset.

A simulated user clicks in the deepest place of the largest error of the last mask, starting from an empty one; clicks accumulate
(the protocol of RITM and SAM-Med3D). Each class of each case is a target of its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import cast, get_args

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from scarceseg.data.dataset import Case, Dataset, load_dataset
from scarceseg.data.geometry import respace
from scarceseg.data.images import read_label, read_volume
from scarceseg.data.plan import resampling_plan
from scarceseg.data.prepare import prepare_label, prepare_volume
from scarceseg.errors import ConfigError, DataError
from scarceseg.files import write_text
from scarceseg.foundation.base import Embedding, Masks, Promptable
from scarceseg.foundation.clicks import Style, next_click
from scarceseg.foundation.load import load_foundation
from scarceseg.inference.predictor import pick_device
from scarceseg.settings import read_numbers
from scarceseg.types import Prompt


@dataclass(frozen=True)
class Target:
    """One class of one case.

    Attributes:
        case: name.
        label: class name.
        dice: after each wanted number of clicks, in [0, 1].
        quality: the model's own estimate of the IoU there.
        seconds_embed: of the volume.
        seconds_click: mean of one answer (simulator not counted).
    """

    case: str
    label: str
    dice: dict[int, float]
    quality: dict[int, float]
    seconds_embed: float
    seconds_click: float


@dataclass
class ClickResult:
    """All targets of one model on one dataset; `failed` says why a case has none."""

    dataset: str
    foundation: str
    clicks: tuple[int, ...]
    style: Style
    seed: int
    spacing_mm: tuple[float, float, float] | None
    device: str
    targets: list[Target] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def mean(self) -> dict[int, float]:
        """Mean Dice over all targets, per number of clicks."""
        return {n: float(np.mean([t.dice[n] for t in self.targets])) for n in self.clicks}

    def to_json(self) -> str:
        """Everything, as text."""
        seconds = {
            key: float(np.mean([getattr(t, key) for t in self.targets])) for key in ("seconds_embed", "seconds_click")
        }
        return json.dumps(asdict(self) | {"mean": self.mean()} | seconds, indent=1)


@torch.no_grad()
def benchmark_clicks(
    dataset: Path,
    foundation: str | Path,
    clicks: Sequence[int] = (1, 2, 5, 10),
    cases: Sequence[str] = ("*",),
    spacing_mm: tuple[float, float, float] | None = None,
    style: Style = "largest",
    seed: int = 0,
    device: str = "cpu",
    show: bool = False,
) -> ClickResult:
    """Simulate a user on every class of the labelled cases.

    Args:
        dataset: folder in nnU-Net raw layout; only its labelled cases are used.
        foundation: name or file of a promptable model.
        clicks: numbers of clicks after which the mask is scored.
        cases: names or patterns of cases.
        spacing_mm: resample volumes and labels first, and score there; None takes them as they are.
        style: how the simulator chooses inside the error, see `foundation.clicks.next_click`.
        seed: of the simulator's chance.
        device: where the model runs.
        show: print a progress bar.

    Raises:
        ConfigError: the model takes no points, or a number of clicks below 1.
        DataError: no labelled case matches, or none could be scored.
    """
    if not clicks or min(clicks) < 1:
        raise ConfigError(f"clicks: expected numbers from 1, got {list(clicks)}")
    model = load_foundation(foundation, device)
    if not isinstance(model, Promptable) or "point" not in model.prompt_kinds:
        raise ConfigError(f"{foundation} cannot be prompted with points: choose another foundation model")
    facts = load_dataset(dataset)
    chosen = [c for c in facts.cases if c.label is not None and any(fnmatchcase(c.name, pattern) for pattern in cases)]
    if not chosen:
        raise DataError(f"{dataset} has no labelled case that matches {', '.join(cases)}: check --cases and labelsTr")
    wanted = tuple(sorted(set(clicks)))
    result = ClickResult(facts.name, str(foundation), wanted, style, seed, spacing_mm, device)
    with Progress(disable=not show) as progress:
        for number, case in enumerate(progress.track(chosen, description="clicks")):
            generator = torch.Generator().manual_seed(seed * 100_003 + number)
            try:
                result.targets += _case(model, facts, case, wanted, spacing_mm, style, generator, torch.device(device))
            except DataError as error:  # what the other cases gave is kept
                result.failed[case.name] = str(error)
    if not result.targets:
        reason = next(iter(result.failed.values()), "their labels are all empty")
        raise DataError(f"none of the {len(chosen)} chosen cases of {dataset} could be scored: {reason}")
    return result


def _case(
    model: Promptable,
    facts: Dataset,
    case: Case,
    clicks: tuple[int, ...],
    spacing_mm: tuple[float, float, float] | None,
    style: Style,
    generator: torch.Generator,
    device: torch.device,
) -> list[Target]:
    volume, geometry = read_volume(case.images)
    assert case.label is not None
    label = read_label(case.label, range(len(facts.classes)), geometry)
    if spacing_mm is not None:
        plan = resampling_plan(facts, spacing_mm)
        volume, prepared = prepare_volume(volume, geometry, plan)
        label = prepare_label(label, geometry, plan)
        geometry = respace(prepared, spacing_mm)
    since = time.perf_counter()
    embedding = model.embed(torch.from_numpy(np.ascontiguousarray(volume))[None].to(device), geometry.spacing_mm)
    _finish(device)
    embed = time.perf_counter() - since
    targets = []
    for value, name in enumerate(facts.classes):
        target = torch.from_numpy(label == value)
        if value and target.any():
            dice, quality, seconds = _dialogue(model, embedding, target, clicks, style, generator, device)
            targets.append(Target(case.name, name, dice, quality, embed, seconds))
    return targets


def _dialogue(
    model: Promptable,
    embedding: Embedding,
    target: torch.Tensor,
    clicks: tuple[int, ...],
    style: Style,
    generator: torch.Generator,
    device: torch.device,
) -> tuple[dict[int, float], dict[int, float], float]:
    mask = torch.zeros_like(target)
    points: list[tuple[int, int, int]] = []
    labels: list[int] = []
    previous: Masks | None = None
    dice: dict[int, float] = {}
    quality: dict[int, float] = {}
    spent = 0.0
    for count in range(1, clicks[-1] + 1):
        click = next_click(mask, target, generator, style)
        if click is not None:  # a perfect mask gets no further click
            points.append(click[0])
            labels.append(click[1])
            prompt = Prompt(
                torch.tensor(points, dtype=torch.float32, device=device), torch.tensor(labels, device=device)
            )
            since = time.perf_counter()
            previous = model.segment(embedding, [prompt], previous)
            _finish(device)
            spent += time.perf_counter() - since
            mask = (previous.logits[0] > 0).cpu()
        if count in clicks:
            both = int((mask & target).sum())
            dice[count] = 2 * both / int(mask.sum() + target.sum())
            quality[count] = float(previous.quality[0]) if previous is not None else 1.0
    return dice, quality, spent / max(len(points), 1)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run_clicks(
    dataset: Path,
    foundation: str,
    clicks: str,
    cases: str,
    spacing: str | None,
    style: str,
    seed: int,
    device: str,
    json_file: Path | None,
) -> ClickResult:
    """`benchmark_clicks` with what was typed; prints the table and writes the JSON file.

    Raises:
        ConfigError: numbers or a style that cannot be read.
    """
    if style not in get_args(Style):
        raise ConfigError(f"--style: expected {', '.join(get_args(Style))}, got {style!r}")
    try:
        counts = [int(part) for part in clicks.split(",")]
    except ValueError:
        raise ConfigError(f"--clicks: expected whole numbers such as 1,2,5,10, got {clicks!r}") from None
    millimetres = read_numbers(spacing, "--spacing", float) if spacing is not None else None
    if millimetres is not None and not all(0 < mm < float("inf") for mm in millimetres):
        raise ConfigError(f"--spacing: expected millimetres above 0, got {spacing!r}")
    result = benchmark_clicks(
        dataset,
        foundation,
        counts,
        [pattern.strip() for pattern in cases.split(",")],
        None if millimetres is None else (millimetres[0], millimetres[len(millimetres) // 2], millimetres[-1]),
        cast(Style, style),
        seed,
        str(pick_device(device)),
        show=True,
    )
    if json_file is not None:
        write_text(json_file, result.to_json() + "\n")
    print_clicks(result)
    if result.failed:
        reasons = "; ".join(result.failed.values())
        raise DataError(
            f"{len(result.failed)} of the chosen cases could not be scored, the others are above: {reasons}"
        )
    return result


def print_clicks(result: ClickResult, console: Console | None = None) -> None:
    """Per case and mean, Dice in percent, with the times."""
    table = Table(title=f"{result.foundation} on {result.dataset}: Dice after clicks (%)")
    table.add_column("case")
    table.add_column("class")
    for n in result.clicks:
        table.add_column(str(n), justify="right")
    table.add_column("embed s", justify="right")
    table.add_column("s / click", justify="right")
    for t in result.targets:
        scores = [f"{100 * t.dice[n]:.1f}" for n in result.clicks]
        table.add_row(t.case, t.label, *scores, f"{t.seconds_embed:.2f}", f"{t.seconds_click:.3f}")
    table.add_section()
    times = [float(np.mean([getattr(t, key) for t in result.targets])) for key in ("seconds_embed", "seconds_click")]
    means = [f"{100 * value:.1f}" for value in result.mean().values()]
    table.add_row(f"mean of {len(result.targets)}", "", *means, f"{times[0]:.2f}", f"{times[1]:.3f}")
    (console or Console()).print(table)
