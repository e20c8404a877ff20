"""A whole run: what it leaves, that it can be stopped at any moment, and that hidden labels stay hidden."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from safetensors.torch import load_file
from torch import nn

from scarceseg.config import Config, OptimConfig
from scarceseg.engine import machine as machine_module
from scarceseg.engine import run as run_module
from scarceseg.engine.logging import RunLog
from scarceseg.engine.loop import build_optimizer, own_parameters
from scarceseg.engine.machine import stop_signals
from scarceseg.engine.run import _useless, train
from scarceseg.engine.validation import Validation
from scarceseg.errors import ConfigError, DataError, Interrupted, RunError
from scarceseg.files import write_text
from scarceseg.foundation.tiny_sam import save_tiny_sam
from scarceseg.methods import build_terms
from scarceseg.methods.base import METHODS, Term
from scarceseg.methods.models import settle_foundations, with_places
from scarceseg.show import plan_dataset
from scarceseg.types import Step
from tests.foundation.small import small_sam
from tests.tiny import tiny_config, tiny_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("data"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_the_contract_names(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, val=["case_04"], validate_every=3)
    result = train(config, tmp_path / "run")
    for name in [
        "config.yaml",
        "plan.json",
        "split.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints/last.pt",
        "model.safetensors",
        "model.json",
        "stages.json",
        "environment.json",
        "evaluation.json",
        "validation/case_04.nii.gz",
        "report.html",
    ]:
        assert (tmp_path / "run" / name).exists(), name
    assert Config.load(tmp_path / "run" / "config.yaml") == config
    assert result.evaluation is not None and list(result.evaluation["cases"]) == ["case_04"]
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert split == {"labelled": ["case_00", "case_01"], "unlabelled": ["case_02", "case_03"], "val": ["case_04"]}
    entries = lines(tmp_path / "run")
    assert [e["iteration"] for e in entries if e["stage"] == "train"] == list(range(6))
    assert [e["iteration"] for e in entries if e["stage"] == "validation"] == [3, 6]
    for entry in entries:
        if entry["stage"] == "train":
            total = sum(entry[f"weight/{t}"] * entry[f"loss/{t}"] for t in ("supervised", "mean-teacher"))
            assert entry["loss"] == pytest.approx(total, rel=1e-5)
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_the_same_seed_gives_the_same_weights(data: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tiny_config(data, seed=seed, iterations=3), tmp_path / name)
    assert same(tmp_path / "a", tmp_path / "b")
    assert not same(tmp_path / "a", tmp_path / "c")


def test_training_changes_the_weights_and_lowers_the_loss(data: Path, tmp_path: Path) -> None:
    train(tiny_config(data, method="supervised", iterations=40), tmp_path / "run")
    losses = [e["loss"] for e in lines(tmp_path / "run")]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


@pytest.mark.parametrize("method", ["mean-teacher", "ua-mt"])
def test_stopped_and_resumed_is_bit_for_bit_the_same(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    config = tiny_config(data, method=method)
    train(config, tmp_path / "whole")
    original = run_module.Loop.__init__

    def stop_after_two(self: run_module.Loop, task: run_module.LoopTask, *rest: object) -> None:
        count = iter(range(100))
        original(self, task, *rest[:2], lambda: next(count) == 1)  # type: ignore[arg-type]

    monkeypatch.setattr(run_module.Loop, "__init__", stop_after_two)
    with pytest.raises(Interrupted, match="after iteration 2 of 6"):
        train(config, tmp_path / "cut")
    monkeypatch.setattr(run_module.Loop, "__init__", original)
    train(config, tmp_path / "cut", resume=True)
    assert same(tmp_path / "whole", tmp_path / "cut")
    kept = [(e["iteration"], e["loss"]) for e in lines(tmp_path / "cut")]
    assert kept == [(e["iteration"], e["loss"]) for e in lines(tmp_path / "whole")]


def start(data: Path, out: Path, cache: Path, iterations: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "scarceseg.cli", "train", str(data), "--out", str(out), "--resume"]
    command += ["--method", "mean-teacher", "--labeled", "2", "--patch", "16,16,16", "--spacing", "1"]
    command += ["--iterations", str(iterations), "--precision", "fp32", "--device", "cpu"]
    for setting in ("network.args.n_filters=1", "memory_format=contiguous", "checkpoint_every=1", "log_every=1"):
        command += ["--set", setting]
    environment = os.environ | {"SCARCESEG_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_kill_9_at_random_moments(data: Path, tmp_path: Path) -> None:
    """Ten kills: some while it starts, most in the middle of training and of writing checkpoints."""
    iterations = 200
    out, cache = tmp_path / "killed", tmp_path / "cache"
    draw = random.Random(3)
    kills = 0
    for _ in range(10):
        process = start(data, out, cache, iterations)
        log = out / "metrics.jsonl"
        before = log.stat().st_mtime_ns if log.exists() else 0
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.stat().st_mtime_ns > before and log.stat().st_size:
                break
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.3))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        for left in out.rglob("*.json"):
            json.loads(left.read_text())  # whole or not there
    last = start(data, out, cache, iterations)
    assert last.wait(timeout=300) == 0
    assert kills >= 5
    whole = start(data, tmp_path / "whole", cache, iterations)
    assert whole.wait(timeout=300) == 0
    assert same(out, tmp_path / "whole")
    assert [e["iteration"] for e in lines(out)] == list(range(iterations))


def until_it_trains(run: Path) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def test_ctrl_c_saves_and_says_how_to_go_on(data: Path, tmp_path: Path) -> None:
    process = start(data, tmp_path / "run", tmp_path / "cache", 100000)
    until_it_trains(tmp_path / "run")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)
    assert state["iteration"] == lines(tmp_path / "run")[-1]["iteration"] + 1


def test_sigterm_may_come_twice_and_a_second_ctrl_c_later_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 10.5, 11.5, 12.0])
    monkeypatch.setattr(machine_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with stop_signals() as stop:
        assert not stop()
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
            assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("again", [0.002, "saved"])
def test_sigterm_sent_again_saves(data: Path, tmp_path: Path, again: float | str) -> None:
    """At once; and over and over until the process is gone, saving and closing down included."""
    process = start(data, tmp_path / "run", tmp_path / "cache", 100000)
    until_it_trains(tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    if again == "saved":
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
            process.send_signal(signal.SIGTERM)
    else:
        time.sleep(float(again))
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 130
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)
    assert state["iteration"] == lines(tmp_path / "run")[-1]["iteration"] + 1


def test_a_later_sigterm_ends_a_process_that_went_on(tmp_path: Path) -> None:
    """A program that catches `Interrupted` and works on can still be ended, and its own handler is put back."""
    code = """
import os, signal, sys, time
from scarceseg.engine import machine
machine.PATIENCE = 0.2
own = []
signal.signal(signal.SIGTERM, lambda number, frame: own.append(number))
with machine.stop_signals():
    signal.raise_signal(signal.SIGTERM)
assert not own
signal.raise_signal(signal.SIGTERM)
assert own
signal.signal(signal.SIGTERM, signal.SIG_DFL)
with machine.stop_signals() as stop:
    assert not stop()
    signal.raise_signal(signal.SIGTERM)
    assert stop()
signal.raise_signal(signal.SIGTERM)
time.sleep(0.3)
print("still there", flush=True)
signal.raise_signal(signal.SIGTERM)
print("not ended", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False, timeout=120)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "still there\n"), done.stderr


def test_stopped_between_validation_cases_validates_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No case of the second validation is looked at after the request to stop; the resumed run makes up for it."""
    config = tiny_config(data, val=["case_03", "case_04"], validate_every=2, select="best")
    train(config, tmp_path / "whole")
    asked: list[bool] = []
    original = Validation._dice

    def ask(self: Validation, *values: Any) -> list[float]:
        asked.append(len(asked) == 2)
        assert not any(asked[:-1]), "went on with the next case"
        return original(self, *values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validation, "_dice", ask)
        patch.setattr(run_module, "stop_signals", lambda: nullcontext(lambda: any(asked)))
        with pytest.raises(Interrupted, match="after iteration 4 of 6"):
            train(config, tmp_path / "cut")
    train(config, tmp_path / "cut", resume=True)
    kept = [[e for e in lines(tmp_path / run) if e["stage"] == "validation"] for run in ("whole", "cut")]
    assert kept[0] == kept[1] and len(kept[0]) == 3
    assert same(tmp_path / "whole", tmp_path / "cut")


def test_hidden_labels_are_never_opened(tmp_path: Path) -> None:
    """With garbage in the place of every label the run must not read, it gives the very same weights and predictions."""
    results = []
    for name in ("clean", "garbage"):
        folder = tiny_dataset(tmp_path / name)
        if name == "garbage":
            for case in ("case_02", "case_03", "case_04"):
                (folder / "labelsTr" / f"{case}.nii.gz").write_bytes(b"not an image")
        config = tiny_config(folder, labeled=2, foreground=0.5)
        train(config, tmp_path / f"run_{name}", cache=tmp_path / f"cache_{name}")
        results.append(tmp_path / f"run_{name}")
    assert same(*results)


def test_a_validation_case_that_cannot_be_used_is_told_before_training(tmp_path: Path) -> None:
    folder = tiny_dataset(tmp_path / "data")
    label = folder / "labelsTr" / "case_04.nii.gz"
    good = label.read_bytes()
    label.write_bytes(b"not an image")
    config = tiny_config(folder, val=["case_04"], iterations=1)
    for _ in range(2):  # the folder is free for another try
        with pytest.raises(DataError, match="case_04"):
            train(config, tmp_path / "run")
    with pytest.raises(DataError, match="case_04"):
        plan_dataset(config)
    label.write_bytes(good)
    assert train(config, tmp_path / "run").evaluation is not None


def test_validation_labels_are_not_opened_while_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning looks whether they can be used; from then to the validation they are out of reach."""
    folder = tiny_dataset(tmp_path / "data")
    label = folder / "labelsTr" / "case_04.nii.gz"
    planned = run_module._plan

    def then_remove(*values: Any) -> Any:
        made = planned(*values)
        label.write_bytes(b"not an image")
        return made

    monkeypatch.setattr(run_module, "_plan", then_remove)
    with pytest.raises(DataError, match="case_04"):
        train(tiny_config(folder, val=["case_04"]), tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").exists(), "training itself does not need validation labels"


def test_a_stage_that_starts_anew_keeps_the_validations_of_the_training(tmp_path: Path) -> None:
    """Rounds of sfr+ tune their model while the training goes on."""
    log = RunLog(tmp_path)
    for iteration in (10, 20):
        log.record("validation", iteration, {"dice/box1": 0.5})
        log.record("sfr+-round1", iteration, {"loss": 1.0})
    log.rewind("sfr+-round1", 0)
    assert [(e["stage"], e["iteration"]) for e in lines(tmp_path)] == [("validation", 10), ("validation", 20)]
    log.rewind("train", 10)
    assert [e["iteration"] for e in lines(tmp_path)] == [10]
    log.close()


def test_weights_that_are_no_numbers_are_never_kept(data: Path, tmp_path: Path) -> None:
    """The loss is looked at every `log_every` iterations, a checkpoint is written in between."""
    config = tiny_config(data, iterations=40, checkpoint_every=1, log_every=50, optim={"lr": 1e30})
    with pytest.raises(RunError, match="new run with a lower"):
        train(config, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "last.pt"
    if file.exists():
        student = torch.load(file, weights_only=False)["student"]
        assert all(bool(value.isfinite().all()) for value in student.values())


def test_what_is_known_before_the_training_is_said_before_it(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_config(data, method="supervised", iterations=1, batch_norm="split"), tmp_path / "run")
    lines = capsys.readouterr().err.splitlines()
    said = next(number for number, line in enumerate(lines) if "batch_norm 'split' changes nothing" in line)
    assert said < next(number for number, line in enumerate(lines) if line.startswith("train "))


def test_stopped_while_preparing_or_validating_goes_on(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, val=["case_03", "case_04"], iterations=2)
    train(config, tmp_path / "whole")
    for place, name in (("preparing", "_prepared"), ("validating", "finish")):
        original = getattr(run_module, name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_module, name, lambda *values, original=original: original(*values[:-1], lambda: True))
            with pytest.raises(Interrupted, match=place):
                train(config, tmp_path / "cut", resume=True)
    assert (
        train(config, tmp_path / "cut", resume=True).evaluation
        == train(config, tmp_path / "whole", resume=True).evaluation
    )
    assert same(tmp_path / "whole", tmp_path / "cut")


def test_the_dataset_may_be_named_relative_to_where_the_run_began(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data.parent)
    train(tiny_config(Path(data.name), iterations=1), tmp_path / "run")
    assert Config.load(tmp_path / "run" / "config.yaml").dataset == str(data.resolve())
    monkeypatch.chdir(tmp_path)
    train(Config.load(tmp_path / "run" / "config.yaml"), tmp_path / "run", resume=True)


def test_the_dataset_may_lie_elsewhere_when_a_run_goes_on(data: Path, tmp_path: Path) -> None:
    """A copy on another disk is known again, another dataset with the same names and sizes is not."""
    train(tiny_config(data, iterations=1), tmp_path / "run")
    shutil.copytree(data, tmp_path / "copy")
    train(tiny_config(tmp_path / "copy", iterations=1), tmp_path / "run", resume=True)
    other = shutil.copytree(data, tmp_path / "other")
    for folder in ("imagesTr", "labelsTr"):
        first, last = sorted((other / folder).iterdir())[2], sorted((other / folder).iterdir())[3]
        first.write_bytes(last.read_bytes())
    for _ in range(2):
        with pytest.raises(RunError, match="the volumes of .*other are not those the run"):
            train(tiny_config(other, iterations=1), tmp_path / "run", resume=True)
    (tmp_path / "run" / "fingerprint.json").unlink()  # as of a run of an earlier version
    with pytest.raises(RunError, match="dataset: "):
        train(tiny_config(tmp_path / "copy", iterations=1), tmp_path / "run", resume=True)
    train(tiny_config(data, iterations=1), tmp_path / "run", resume=True)


def test_files_may_be_named_relative_to_where_the_run_began(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_sam(tmp_path / "small.safetensors", small_sam())
    (tmp_path / "elsewhere").mkdir()
    terms = {"sfr": {"tune_iterations": 1, "foundation": "small.safetensors"}}
    config = tiny_config(data, method="sfr", iterations=1, foundation="small.safetensors", terms=terms)
    monkeypatch.chdir(tmp_path)
    train(config, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "elsewhere")
    saved = Config.load(tmp_path / "run" / "config.yaml")
    assert saved.foundation == saved.terms["sfr"]["foundation"] == str(tmp_path / "small.safetensors")
    train(saved, tmp_path / "run", resume=True)
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "run" / "config.yaml", config.dump())  # as earlier versions left it
    train(config, tmp_path / "run", resume=True)
    taking = tiny_config(data, method="sfr", iterations=1, terms={"sfr": terms["sfr"] | {"tuned_in": "run"}})
    train(taking, tmp_path / "second")
    monkeypatch.chdir(tmp_path / "elsewhere")
    train(Config.load(tmp_path / "second" / "config.yaml"), tmp_path / "second", resume=True)


def test_names_of_models_are_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny-sam").mkdir()
    monkeypatch.chdir(tmp_path)
    terms = {"semisam": {"foundation": ("tiny-sam", "absent.pth")}}
    config = with_places(tiny_config(tmp_path, method="semisam", foundation="tiny-sam", terms=terms))
    assert config.foundation == "tiny-sam" and config.terms["semisam"]["foundation"] == ["tiny-sam", "absent.pth"]


def test_the_number_of_workers_may_change_when_a_run_goes_on(data: Path, tmp_path: Path) -> None:
    terms = {"atlas": {"workers": 1, "registration": "affine", "estimate": False}}
    config = tiny_config(data, method="atlas", terms=terms, iterations=1)
    train(config, tmp_path / "run")
    del terms["atlas"]["workers"]
    train(config.model_copy(update={"terms": terms}), tmp_path / "run", resume=True)


def test_more_validation_cases_than_pictures_give_the_same_pictures(tmp_path: Path) -> None:
    folder = tiny_dataset(tmp_path / "data", cases=8)
    # A second label file of one name is warned of when the dataset is read, and in nobody's way afterwards.
    sitk.WriteImage(
        sitk.ReadImage(str(folder / "labelsTr" / "case_04.nii.gz")), str(folder / "labelsTr" / "case_04.nrrd")
    )
    config = tiny_config(folder, val=[f"case_{i:02d}" for i in range(4, 8)], iterations=1)
    assert any("case_04.nrrd" in warning for warning in train(config, tmp_path / "run").warnings)
    figures = {path.stem.split("_", 1)[0] for path in (tmp_path / "run" / "figures").glob("*.npz")}
    assert figures == {"best", "median", "worst"}
    for path in (tmp_path / "run" / "figures").glob("*.npz"):
        case = path.stem.split("_", 1)[1]
        mask = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "run" / "validation" / f"{case}.nii.gz")))
        assert np.array_equal(np.load(path)["prediction"], mask.transpose(2, 1, 0)), case


def test_run_folders_are_never_overwritten(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, iterations=1)
    train(config, tmp_path / "run")
    before = weights(tmp_path / "run")
    with pytest.raises(RunError, match="--resume"):
        train(config, tmp_path / "run")
    with pytest.raises(RunError, match="iterations: 1 then, 2 now"):
        train(tiny_config(data, iterations=2), tmp_path / "run", resume=True)
    train(config, tmp_path / "run", resume=True)
    assert all(torch.equal(before[k], v) for k, v in weights(tmp_path / "run").items())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="choose another --out"):
        train(config, tmp_path / "other")


def test_a_dataset_that_changed_is_not_resumed(tmp_path: Path) -> None:
    folder = tiny_dataset(tmp_path / "data")
    train(tiny_config(folder, iterations=1), tmp_path / "run")
    next((folder / "imagesTr").glob("case_03*")).unlink()
    (folder / "labelsTr" / "case_03.nii.gz").unlink()
    with pytest.raises(RunError, match="not those the run"):
        train(tiny_config(folder, iterations=1), tmp_path / "run", resume=True)


def test_without_unlabelled_cases_it_warns_and_trains_supervised(tmp_path: Path) -> None:
    folder = tiny_dataset(tmp_path / "data", cases=2)
    result = train(tiny_config(folder, iterations=2), tmp_path / "run")
    assert any("supervised" in warning for warning in result.warnings)


def test_a_loss_on_labelled_rows_alone_needs_no_unlabelled_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sharp(Term):
        reads = frozenset({"labelled"})

        def loss(self, step: Step) -> torch.Tensor:
            return step.logits_l.square().mean()

    monkeypatch.setitem(METHODS._parts, "sharp", Sharp)
    folder = tiny_dataset(tmp_path / "data", cases=2)
    terms = {"sharp": {"weight": 0.5}, "mean-teacher": {"weight": 0.1}}
    result = train(
        tiny_config(folder, method="mean-teacher+sharp", terms=terms, iterations=2, batch_norm="joint"),
        tmp_path / "run",
    )
    assert any("training 'supervised+sharp' alone" in warning for warning in result.warnings)
    assert all(e["loss/sharp"] > 0 and e["weight/sharp"] == 0.5 for e in lines(tmp_path / "run"))
    result = train(tiny_config(folder, method="sharp", iterations=1), tmp_path / "other")
    assert not any("alone" in warning for warning in result.warnings)


def test_a_term_that_keeps_the_student_does_not_train_it_twice(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Keeper(Term):
        def attach(self, student: nn.Module) -> None:
            self.student = student
            self.head = nn.Conv3d(1, 1, 1)

        def loss(self, step: Step) -> torch.Tensor:
            return sum(p.sum() for p in self.head.parameters())  # type: ignore[return-value]

    monkeypatch.setitem(METHODS._parts, "keeper", Keeper)
    student = nn.Conv3d(1, 2, 1)
    terms = build_terms("keeper", {}, 2)
    for term in terms.values():
        term.attach(student)
    (group,) = build_optimizer(OptimConfig(), student, terms).param_groups
    assert [id(p) for p in group["params"]] == [
        id(p) for p in (*student.parameters(), *terms["keeper"].head.parameters())
    ]
    assert own_parameters(student, terms) == list(terms["keeper"].head.parameters())


@pytest.mark.parametrize(
    ("method", "changed", "message"),
    [
        ("mean-teacher+sfr", {"foundation": "tiny-sma"}, r"'tiny-sma' is neither .* did you mean .*'tiny-sam'"),
        ("mean-teacher+semisam", {"foundation": "sam-vit-h"}, "weights of 'sam-vit-h' are not on this machine"),
        (
            "mean-teacher+sfr+semisam",
            {"terms": {"semisam": {"foundation": ["tiny-sam3d", "none.pth"]}}},
            "'none.pth' is neither",
        ),
    ],
)
def test_a_foundation_model_that_is_not_there_is_told_before_any_work(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, changed: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("SCARCESEG_CACHE", str(tmp_path / "cache"))
    for resume in (False, True):
        with pytest.raises((ConfigError, DataError), match=message):
            train(tiny_config(data, method=method, **changed), tmp_path / "run", resume=resume)
    assert not (tmp_path / "run").exists()


def test_settings_that_change_nothing_are_told(data: Path, tmp_path: Path) -> None:
    config = tiny_config(
        data, method="supervised", iterations=1, batch_norm="split", foundation="tiny-sam", validate_every=1
    )
    told = train(config, tmp_path / "run").warnings
    for part in (
        "batch_norm 'split' changes nothing",
        "foundation 'tiny-sam' changes nothing",
        "validate_every changes",
    ):
        assert any(part in warning for warning in told), part
    quiet = train(
        tiny_config(data, method="mean-teacher", iterations=1, batch_norm="split"), tmp_path / "other"
    ).warnings
    assert not any("changes nothing" in warning for warning in quiet)
    assert "loss/mean-teacher" not in lines(tmp_path / "run")[0]


@pytest.mark.parametrize(
    ("method", "terms", "said"),
    [
        ("semisam", {"gate": False, "doubt": 0.3, "agreement": [0.2, 0.5]}, ["doubt"]),  # the other has its default
        ("semisam", {"prompts": ["mask"], "clicks": 9}, ["clicks"]),
        ("semisam", {"ramp": "constant", "ramp_epochs": 7}, ["ramp_epochs"]),
        ("semisam", {"doubt": 0.3, "clicks": 2}, []),
        ("acmt", {"passes": 4, "prune": "both", "combine": "all"}, ["passes", "combine"]),
        ("acmt", {"criteria": ["uncertainty", "prototype"], "passes": 4, "combine": "all", "ramp_epochs": 7}, []),
        ("copy", {"targets": "soft", "largest_component": True}, ["largest_component"]),
    ],
)
def test_options_that_do_nothing_beside_the_others_are_told(
    data: Path, method: str, terms: dict[str, Any], said: list[str]
) -> None:
    config = tiny_config(
        data, method=method, terms={method: terms}, optim={"schedule": "poly", "step": 9, "power": 0.5}
    )
    told = _useless(config, build_terms(method, config.terms, 2))
    assert [words.split()[0] for words in told] == [*(f"terms.{method}.{option}" for option in said), "optim.step"]


def test_a_model_that_no_term_takes_is_told(data: Path) -> None:
    named = [("sam-vit-b", "tiny-sam3d", ["foundation 'sam-vit-b' changes nothing"]), ("tiny-sam", "tiny-sam", [])]
    for model, own, words in [*named, (None, "sam-vit-b", [])]:
        config = tiny_config(data, method="sfr", foundation=model, terms={"sfr": {"foundation": own}})
        told = _useless(settle_foundations(config, 2), build_terms("sfr", config.terms, 2))
        assert len(told) == len(words) and all(part in line for part, line in zip(words, told, strict=True))


def test_best_checkpoint_needs_validation_cases(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--val"):
        train(tiny_config(data, select="best"), tmp_path / "run")
    train(tiny_config(data, select="best", val=["case_04"], validate_every=2), tmp_path / "best")
    record = json.loads((tmp_path / "best" / "checkpoints" / "best.json").read_text())
    scores = {e["iteration"]: e["dice/box1"] for e in lines(tmp_path / "best") if e["stage"] == "validation"}
    assert list(scores) == [2, 4, 6]
    assert record["dice"] == pytest.approx(max(scores.values()))
    assert scores[record["iteration"]] == pytest.approx(record["dice"])
    seldom = tiny_config(data, select="best", val=["case_04"], validate_every=100, iterations=3)
    train(seldom, tmp_path / "seldom")
    record = json.loads((tmp_path / "seldom" / "checkpoints" / "best.json").read_text())
    assert record["iteration"] == 3, "the last weights are among those that are compared"
    with pytest.raises(RunError, match="validate_every"):
        train(
            tiny_config(data, select="best", val=["case_04"], validate_every=2, iterations=3),
            tmp_path / "seldom",
            resume=True,
        )


def test_a_damaged_checkpoint_is_told(data: Path, tmp_path: Path) -> None:
    train(tiny_config(data, iterations=2), tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "last.pt").write_bytes(b"broken")
    with pytest.raises(RunError, match="cannot read the checkpoint"):
        train(tiny_config(data, iterations=2), tmp_path / "run", resume=True)


def test_unwritable_output(data: Path, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(RunError, match="cannot write"):
        train(tiny_config(data), blocker / "run")


def test_several_classes_and_channels(tmp_path: Path) -> None:
    folder = tiny_dataset(tmp_path / "data", classes=4, channels=2)
    result = train(tiny_config(folder, val=["case_04"], iterations=2, method="ua-mt"), tmp_path / "run")
    assert result.evaluation is not None
    assert list(result.evaluation["cases"]["case_04"]) == ["box1", "box2", "box3"]
    assert any("ua-mt looks 8 times" in warning and "does not have" in warning for warning in result.warnings)
    dropping = tiny_config(
        folder,
        val=["case_04"],
        iterations=1,
        method="ua-mt",
        network={"name": "vnet", "args": {"n_filters": 1, "dropout": True}},
    )
    assert not any("ua-mt looks" in warning for warning in train(dropping, tmp_path / "dropping").warnings)
