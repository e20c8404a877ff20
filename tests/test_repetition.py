"""How much of a file stands in its neighbours too: copies between the files of one folder are seen here.

Lines are compared without indentation and comments. Docstrings, imports and the headers of functions do not count: parts
of one kind have the same interface by design. A run of at least `RUN` equal lines in two files of one folder fails; move
it where both can use it.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections import defaultdict
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "scarceseg"
RUN = 6
FOLDERS = sorted({path.parent for path in SOURCE.rglob("*.py")})


class Line(NamedTuple):
    """A line of code without its indentation, and where it stands."""

    number: int
    text: str


class Copy(NamedTuple):
    """A run of equal lines: the number of its first line in each file, and its length."""

    first: int
    second: int
    length: int


def code_lines(source: str) -> list[Line]:
    """Lines that hold code, normalised; docstrings, imports and function headers do not count."""
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            start = min(part.lineno for part in [node, *node.decorator_list])
            skipped.update(range(start, max(node.body[0].lineno, node.lineno + 1)))
        elif isinstance(node, ast.Import | ast.ImportFrom) or _is_text(node):
            assert isinstance(node, ast.stmt)
            skipped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    words: dict[int, list[str]] = defaultdict(list)
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent and token.start[0] not in skipped:
            words[token.start[0]].append(token.string)
    # A line of brackets alone says nothing and would lengthen or break runs by chance of formatting.
    return [Line(n, " ".join(w)) for n, w in sorted(words.items()) if not set("".join(w)) <= set("()[]{},:")]


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def copies(first: list[Line], second: list[Line], run: int = RUN) -> list[Copy]:
    """Longest runs of at least `run` equal lines that the two files share."""
    places: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for j in range(len(second) - run + 1):
        places[tuple(line.text for line in second[j : j + run])].append(j)
    found: list[Copy] = []
    covered: set[tuple[int, int]] = set()
    for i in range(len(first) - run + 1):
        for j in places.get(tuple(line.text for line in first[i : i + run]), []):
            if (i, j) in covered:
                continue
            length = run
            while (
                i + length < len(first)
                and j + length < len(second)
                and first[i + length].text == second[j + length].text
            ):
                length += 1
            covered.update((i + k, j + k) for k in range(length))
            found.append(Copy(first[i].number, second[j].number, length))
    return found


def listing(sources: Mapping[str, str], run: int = RUN) -> list[str]:
    """One line for each copy between two of the named sources."""
    lines = {name: code_lines(source) for name, source in sources.items()}
    return [
        f"{a}:{copy.first} and {b}:{copy.second} share {copy.length} lines of code"
        for a, b in combinations(sorted(lines), 2)
        for copy in copies(lines[a], lines[b], run)
    ]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(SOURCE.parent)))
def test_files_of_a_folder_share_no_run_of_lines(folder: Path) -> None:
    found = listing({path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.py")})
    assert not found, f"in {folder.relative_to(SOURCE.parent)}:\n" + "\n".join(found)


BODY = """
def {name}(values):
    total = 0
    for value in values:
        total += value
        if total > 10:
            total = 10
        print(total)
    return total
"""


def test_the_measure_sees_a_copy() -> None:
    original = '"""One file."""\nimport os\n' + BODY.format(name="first")
    copy = '"""Another."""\n\n\nfrom sys import path\n\nX = 1\n' + BODY.format(name="second").replace(
        "    total = 0\n", "    total   =   0  # starts at nothing\n\n"
    )
    assert listing({"a.py": original, "b.py": copy}) == ["a.py:5 and b.py:9 share 7 lines of code"]


def test_the_measure_does_not_see_what_is_not_there() -> None:
    original = BODY.format(name="first")
    changed = original.replace("if total > 10", "if total > 11")
    assert listing({"a.py": original, "b.py": changed}) == []
    prose = '"""\n' + "\n".join("the same words" for _ in range(12)) + '\n"""\n'
    imports = "\n".join(f"import module_{i}" for i in range(12)) + "\n"
    assert listing({"a.py": prose + imports + "X = 1\n", "b.py": prose + imports + "Y = 2\n"}) == []


def test_every_folder_is_measured() -> None:
    names = {folder.name for folder in FOLDERS}
    assert {"methods", "networks", "data", "engine"} <= names
