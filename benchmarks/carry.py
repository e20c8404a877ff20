"""After a change that must not change a number: rows measured with an older commit's code count as measured with today's.

    python benchmarks/carry.py COMMIT [--without semisam,sfr+]

Every kind of run that stands in `results/` with that commit's code is done for a few steps with both codes, on small phantoms
with fixed arithmetic and one thread; where all weights are equal, bit for bit, the rows get today's hash. The others keep
theirs, and with it the mark that their code has changed. Terms that are known to compute otherwise where these runs do not look
(in bf16, with more labels) are named with --without. The working tree must be clean: what is compared is what is committed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TEACHERS = ("la_teachers", "phantoms_teachers")
LEARNT = (
    "surest",
    "share",
    "measure",
    "sure",
    "rounds",
    "targets",
    "trust",
    "largest_component",
    "learn_from",
    "gate",
    "enough",
)
"""Options that decide what of the teachers' answers is learnt; the others have their defaults here."""
Kind = tuple[bool, str, str, int, str]
"""Several classes and channels, method, augmentation, labelled volumes, options of the terms as JSON."""


def kind_of(path: Path, row: Any) -> Kind | None:
    """What kind of run a row is of, for teachers alone a student's that learns from their labels; None for other rows."""
    if path.parent.name in TEACHERS:
        return path.parent.name.startswith("phantoms"), row["method"], "deform", labelled_of(row), "{}"
    if not isinstance(row, dict) or "code" not in row or not isinstance(row.get("config"), dict):
        return None
    terms = {
        name: {
            key: value for key, value in options.items() if key in LEARNT or (key == "tune_iterations" and value == 0)
        }
        for name, options in row["config"]["terms"].items()
    }
    options = json.dumps({name: chosen for name, chosen in terms.items() if chosen}, sort_keys=True)
    return path.parent.name.startswith("phantoms"), row["method"], row["config"]["augment"], labelled_of(row), options


def labelled_of(row: Any) -> int:
    """Labelled volumes of the run that stands for a row's: as many for terms that count them, else one or several."""
    return int(row["labels"]) if "semisam" in row["method"] else min(int(row["labels"]), 3)


def main() -> None:
    """Compare, and stamp the rows that may be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--kinds", type=json.loads, help=argparse.SUPPRESS)  # the runs of one tree, in its own process
    parser.add_argument("--without", default="", help="terms whose rows keep their hash")
    options = parser.parse_args()
    if options.kinds is not None:
        print(json.dumps(weights(options.kinds)))
        return
    from scarceseg.methods import parse_method

    if subprocess.run(["git", "status", "--porcelain", "src"], cwd=ROOT, capture_output=True, check=True).stdout:
        raise SystemExit("commit the changes in src first")
    rows = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.rglob("*.json"))}
    changed = set(options.without.split(","))
    kinds = {path: kind for path, row in rows.items() if (kind := kind_of(path, row))}
    parts = {path: f"{kind[1]} alone" if path.parent.name in TEACHERS else kind[1] for path, kind in kinds.items()}
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder) / "old"
        subprocess.run(["git", "worktree", "add", "--detach", str(old), options.commit], cwd=ROOT, check=True)
        try:
            before, now = (hashes(tree, sorted(set(parts.values()))) for tree in (old, ROOT))
            stale = {
                path: kind
                for path, kind in kinds.items()
                if rows[path]["code"] == before[parts[path]] != now[parts[path]]
                and not changed.intersection(parse_method(kind[1]))
            }
            wanted = sorted(set(stale.values()))
            print(f"{len(stale)} rows, {len(wanted)} kinds of run", flush=True)
            then, today = (run(tree, wanted, Path(folder) / f"runs{number}") for number, tree in enumerate((old, ROOT)))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(old)], cwd=ROOT, check=True)
    equal = {kind for kind, one, other in zip(wanted, then, today, strict=True) if one == other}
    for kind in wanted:
        print("equal    " if kind in equal else "different", *kind)
    for path, kind in stale.items():
        if kind in equal:
            path.write_text(json.dumps(rows[path] | {"code": now[parts[path]]}, indent=1) + "\n", encoding="utf-8")


HASHES = """
import json, sys
from common import code_hash, direct_code, training_code
alone = " alone"
parts = {p: direct_code(p[: -len(alone)]) if p.endswith(alone) else training_code(p) for p in json.loads(sys.argv[1])}
print(json.dumps({part: code_hash(files) for part, files in parts.items()}))
"""


def hashes(tree: Path, parts: list[str]) -> dict[str, str]:
    """Of the code of methods and of teachers alone in a tree, by that tree's own rules."""
    return dict(json.loads(_python(tree, ["-c", HASHES, json.dumps(parts)], tree / "benchmarks")))


def run(tree: Path, kinds: list[Kind], folder: Path) -> list[str]:
    """The weights that every kind of run leaves with a tree's code."""
    folder.mkdir()
    return list(json.loads(_python(tree, [__file__, "-", "--kinds", json.dumps(kinds)], folder).splitlines()[-1]))


def _python(tree: Path, arguments: list[str], place: Path) -> str:
    more = {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=place, env=os.environ | more, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def weights(kinds: list[Kind]) -> list[str]:
    """Run every kind in the present folder; a hash of what it leaves, or its error."""
    from scarceseg import Config, train
    from scarceseg.data.phantoms import PhantomConfig, write_phantom_dataset
    from scarceseg.methods import parse_method

    cases = {labelled: max(labelled + 3, 6) for _, _, _, labelled, _ in kinds}
    for several, count in {(kind[0], cases[kind[3]]) for kind in kinds}:
        shape = PhantomConfig((28, 28, 24), (3.0, 3.0, 3.0), classes=4 if several else 1, channels=2 if several else 1)
        write_phantom_dataset(Path(f"data{several}{count}"), count, count, shape, seed=1)
    tuning = {"tune_iterations": 2}
    quick = {"sfr": tuning, "sfr+": {**tuning, "refresh_iterations": 2}, "atlas": {"workers": 1}, "semisam": tuning}
    left = []
    for number, (several, method, augment, labelled, options) in enumerate(kinds):
        chosen = json.loads(options)
        values = {
            "dataset": str(Path(f"data{several}{cases[labelled]}").resolve()),
            "method": method,
            "augment": augment,
            "labeled": labelled,
            "batch_norm": "split" if several else "joint",
            "foreground": 0.5 if several else 0.0,
            "network": {"name": "vnet", "args": {"n_filters": 2}},
            "plan": {"patch": [16, 16, 16]},
            "iterations": 12,
            "device": "cpu",
            "precision": "fp32",
            "memory_format": "contiguous",
            "terms": {name: known(name, quick.get(name, {}) | chosen.get(name, {})) for name in parse_method(method)},
        }
        out = Path(f"run{number}")
        try:
            train(Config.build(values), out, cache=Path("cache"))
            left.append(hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()[:16])
        except Exception as error:  # a kind that cannot be run is not equal to anything
            left.append(f"{number}: {error!r} {out.resolve()}")
        print(f"{number + 1}/{len(kinds)} {method}", file=sys.stderr, flush=True)
    return left


def known(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Those options that a tree's term has: what a later one has added is left out where it was not there yet."""
    from scarceseg.methods import METHODS

    return {key: value for key, value in options.items() if key in METHODS.get(name).Options.model_fields}


if __name__ == "__main__":
    main()
