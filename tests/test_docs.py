"""The documents say what is so: marked snippets run, every command parses, links lead somewhere, tables match the code.

A fenced block whose first line is ```` ```sh test ```` or ```` ```python test ```` is run, the blocks of a page one after the
other in one folder. In that folder lie the datasets the pages speak of: ``heart``, ``abdomen`` (several classes and
channels) and ``scans`` (DICOM), all made of small phantoms. A ``train`` command is made small by `SMALL`.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml

from scarceseg import cli
from scarceseg.config import Config
from scarceseg.data.phantoms import PhantomConfig, make_phantom, write_phantom_dataset
from scarceseg.methods import METHODS
from scarceseg.networks import NETWORKS
from tests.contract import test_networks as network_contract
from tests.contract import test_terms as contract
from tests.data.volumes import write_dicom

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
SHELL = {"sh", "bash", "shell", "console"}

SMALL = "--iterations 4 --patch 32,32,32 --device cpu --precision fp32"
SMALL += " --set network.args.n_filters=1 --set memory_format=contiguous --set checkpoint_every=4"
TINY = PhantomConfig(shape=(24, 22, 20), spacing_mm=(4.0, 4.0, 4.0), classes=1)
FIRST = {"docs/how-to/dicom.md": ["scarceseg train heart --out run"]}
"""What the reader of a page has done before."""


class Block(NamedTuple):
    """A fenced block: language, whether it is marked to be run, text."""

    language: str
    marked: bool
    text: str


def blocks(text: str) -> list[Block]:
    found = re.findall(r"^ *```(\w+)( test)?[^\n]*\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)
    return [Block(language, bool(marked), textwrap.dedent(body)) for language, marked, body in found]


def commands(block: str) -> list[list[str]]:
    """The `scarceseg` commands of a shell block, as words."""
    lines = block.replace("\\\n", " ").splitlines()
    words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [line for line in words if line and line[0] == "scarceseg"]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


RUN = [page for page in PAGES if page.name != "CONTRIBUTING.md" and any(block.marked for block in blocks(read(page)))]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_phantom_dataset(tmp_path / "heart", cases=5, labelled=3, config=TINY, test_cases=1)
    several = PhantomConfig(shape=TINY.shape, spacing_mm=TINY.spacing_mm, classes=2, channels=2)
    write_phantom_dataset(tmp_path / "abdomen", cases=4, labelled=2, config=several, test_cases=1)
    for number in (1, 2):
        volume, _, geometry = make_phantom(number, TINY)
        write_dicom(tmp_path / "scans" / f"patient_{number}", volume[0] * 1000, geometry, uid=f"1.2.3.{number}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_command(words: list[str]) -> None:
    arguments = words[1:] + (SMALL.split() if words[1] == "train" else [])
    try:
        cli.main(arguments)
    except SystemExit as stop:
        assert not stop.code, f"{shlex.join(words)}: exit status {stop.code}"


def run_block(block: Block, page: str, names: dict[str, Any]) -> None:
    if block.language == "python":
        exec(compile(block.text, page, "exec", dont_inherit=True), names)
        return
    found = commands(block.text)
    rest = [line for line in block.text.replace("\\\n", " ").splitlines() if line.strip() and line.lstrip()[0] != "#"]
    assert block.language in SHELL and len(found) == len(rest), f"{page}: a marked block holds scarceseg commands alone"
    for words in found:
        run_command(words)


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_marked_snippets_run(page: Path, workspace: Path) -> None:
    for line in FIRST.get(name_of(page), []):
        run_command(shlex.split(line))
    names: dict[str, Any] = {"__name__": "snippet"}
    for block in blocks(read(page)):
        if block.marked:
            run_block(block, name_of(page), names)
    described = read(ROOT / "docs" / "reference" / "run-folder.md")
    unknown = [item.name for item in (workspace / "run").iterdir() if f"`{item.name}" not in described]
    assert not unknown, f"docs/reference/run-folder.md does not name {unknown}"


def test_the_examples_keep_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    known, networks = METHODS.names(), NETWORKS.names()
    for registry in (METHODS, NETWORKS):
        monkeypatch.setattr(registry, "_parts", dict(registry._parts))  # the examples must not stay for other tests
    for block in blocks(read(ROOT / "CONTRIBUTING.md")):
        if block.marked:
            run_block(block, "CONTRIBUTING.md", {"__name__": "snippet"})
    (name,) = set(METHODS.names()) - set(known)
    contract.test_finite_scalar_for_any_split(name, 3, 2, 1, 2)
    contract.test_gradient_on_unlabelled_voxels(name)
    contract.test_documented(name)
    (name,) = set(NETWORKS.names()) - set(networks)
    network_contract.test_one_logit_per_class_and_voxel_for_any_channels_and_classes(name)
    network_contract.test_divisor_is_known_without_building(name)
    network_contract.test_gradient_reaches_every_parameter(name)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_parses(page: Path) -> None:
    for block in blocks(read(page)):
        for words in commands(block.text) if block.language in SHELL else []:
            parse(words[1:])


def parse(words: list[str]) -> None:
    """Let the command line read the words without running anything."""
    command: Any = typer.main.get_command(cli.app)
    path = ["scarceseg"]
    while hasattr(command, "commands"):
        assert words and words[0] in command.commands, f"{' '.join(path)}: there is no command {words[:1]}"
        path.append(words[0])
        command, words = command.commands[words[0]], words[1:]
    command.make_context(" ".join(path), list(words))


def test_a_wrong_command_would_be_seen() -> None:
    parse(shlex.split("train DATASET --out RUN --labeled 4"))
    for wrong in ("train DATASET --out RUN --labelled 4", "trian DATASET", "predict RUN --out", "datasets fetch x"):
        with pytest.raises(Exception, match=r"labelled|trian|[Mm]issing|requires|fetch"):
            parse(shlex.split(wrong))
    assert blocks("```sh test\na\n```\n") == [Block("sh", True, "a\n")]
    assert commands("# text\n$ scarceseg plan X \\\n  --seed 1  # why\nls\n") == [
        ["scarceseg", "plan", "X", "--seed", "1"]
    ]


def options(command: Any) -> set[str]:
    found = {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}
    return found.union(*map(options, getattr(command, "commands", {}).values()))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_and_make_targets_in_the_text_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", text)
    flags = {word for code in inline if code.startswith("--") for word in re.findall(r"(?<!\S)--[a-z-]+", code)}
    unknown = flags - options(typer.main.get_command(cli.app)) - {"--help"}
    assert not unknown, f"{name_of(page)} names options that no command has: {sorted(unknown)}"
    targets = set(re.findall(r"(?:^|`|\n)\s*make ([a-z]+)", read(page)))
    missing = {target for target in targets if not re.search(rf"^{target}:", read(ROOT / "Makefile"), re.MULTILINE)}
    assert not missing, f"{name_of(page)} names targets the Makefile does not have: {sorted(missing)}"


def links(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ +(.*)$", read(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)}: {link} leads nowhere"
        assert target.is_relative_to(ROOT), f"{name_of(page)}: {link} leaves the repository"
        assert not anchor or anchor in anchors(target), f"{name_of(page)}: {link}: there is no such heading"


def test_every_page_is_found_from_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in links(index)}
    pages = set((ROOT / "docs").rglob("*.md")) - {index}
    assert pages <= linked, f"docs/index.md does not lead to {sorted(name_of(page) for page in pages - linked)}"


def test_settings_table_is_the_config() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| `([^`]*)` \|", read(ROOT / "docs/reference/settings.md"), flags=re.MULTILINE)
    defaults = Config().model_dump(mode="json")
    flat: dict[str, Any] = {}
    for key, value in defaults.items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) and value else {key: value}
    assert {key: yaml.safe_load(default) for key, default in rows} == flat


def test_the_page_of_options_is_that_of_the_code() -> None:
    path = ROOT / "docs" / "reference" / "make.py"
    names: dict[str, Any] = {"__name__": "make", "__file__": str(path)}
    exec(compile(read(path), str(path), "exec", dont_inherit=True), names)
    assert names["page"]() == read(path.with_name("options.md")), "run python docs/reference/make.py"
