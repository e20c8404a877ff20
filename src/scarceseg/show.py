"""The `plan` command: what training would use, and what is worth knowing about the data."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from scarceseg.config import Config
from scarceseg.data.dataset import load_dataset, make_split
from scarceseg.data.plan import Plan, fingerprint, make_plan
from scarceseg.methods.base import check_options
from scarceseg.networks.base import sides_of


def plan_dataset(config: Config) -> Plan:
    """The plan `train` would make from the same settings.

    Raises:
        DataError, ConfigError: as `train`.
    """
    check_options(config.method, config.terms)
    dataset = load_dataset(Path(config.dataset))
    split = make_split(dataset, config.labeled, config.val)
    sides = sides_of(config.network.name, config.network.args, len(dataset.channels), len(dataset.classes))
    made = make_plan(fingerprint(dataset, split), dataset, split, config, *sides)
    return made.model_copy(update={"warnings": (*split.warnings, *made.warnings)})


def print_plan(plan: Plan) -> None:
    """Show a plan as a table, its warnings below."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for key, value in plan.model_dump(exclude={"warnings", "normalisation", "version"}).items():
        shown = " x ".join(f"{v:g}" for v in value) if isinstance(value, tuple) and _numbers(value) else value
        text = ", ".join(map(str, shown)) if isinstance(shown, tuple | list) else str(shown)
        table.add_row(key.replace("_", " "), escape(text))
    for channel, rule in zip(plan.channels, plan.normalisation, strict=True):
        table.add_row(escape(f"intensities of {channel}"), str(rule.kind))
    console = Console()
    console.print(table)
    for warning in plan.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False)


def _numbers(value: tuple[object, ...]) -> bool:
    return bool(value) and all(isinstance(v, int | float) for v in value)
