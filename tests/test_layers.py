"""Which folder may import which: the flow of DESIGN, from bottom to top, and the exceptions that are still there."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "scarceseg"

LAYERS = (
    {"errors", "types"},
    {"plugins", "files", "seeds"},
    {"registry"},
    {"config"},
    {"functional"},
    {"data"},
    {"networks", "atlas", "settings"},
    {"foundation"},
    {"methods"},
    {"engine"},
    {"inference"},
    {"evaluation"},
    {"report"},
    {"active"},
    {"benchmark", "demo", "show"},
    {"cli"},
    {"pretrain", "__main__"},
)
"""What stands higher may import what stands lower, and every folder itself."""

KNOWN = {
    ("methods", "report"),  # pictures of prompts
    ("engine", "inference"),  # the saved model, and predictions with it
    ("engine", "evaluation"),  # validation at the end of a run
    ("engine", "report"),
    ("evaluation", "report"),  # the page of a comparison
}
"""Edges upwards that are still there. One that is gone must be taken out of this set; none may be added."""


def test_every_part_has_its_layer() -> None:
    parts = {p.stem for p in SOURCE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()} - {"__init__"}
    placed = [part for layer in LAYERS for part in layer]
    assert set(placed) == parts and len(placed) == len(parts)


def test_nothing_imports_upwards_but_what_is_known() -> None:
    level = {part: number for number, layer in enumerate(LAYERS) for part in layer}
    found = {(own, other) for own, other in imports() if own != other and level[own] <= level[other]}
    assert found == KNOWN


def imports() -> Iterator[tuple[str, str]]:
    """Folders and the folders they import, at any depth of the code, but for what is imported for types alone."""
    for path in sorted(SOURCE.rglob("*.py")):
        own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        skipped = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if id(node) in skipped:
                continue
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("scarceseg."):
                yield own, (node.module or "").split(".")[1]
            elif isinstance(node, ast.ImportFrom) and node.module == "scarceseg":
                parts = {part for layer in LAYERS for part in layer}
                yield from ((own, alias.name) for alias in node.names if alias.name in parts)
            elif isinstance(node, ast.Import):
                yield from ((own, a.name.split(".")[1]) for a in node.names if a.name.startswith("scarceseg."))
