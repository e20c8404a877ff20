"""Runs with offline stages: what they leave, that they resume, and that hidden labels stay hidden in them too."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from scarceseg.data import sampling as sampling_module
from scarceseg.data import whole as whole_module
from scarceseg.data.whole import CurvedSlices
from scarceseg.engine import run as run_module
from scarceseg.engine import workspace as workspace_module
from scarceseg.engine.loop import Loop, LoopTask
from scarceseg.engine.run import train
from scarceseg.engine.statistics import pool_statistics
from scarceseg.errors import ConfigError, Interrupted, RunError
from scarceseg.foundation.tiny_sam3d import save_tiny_sam3d
from scarceseg.foundation.tiny_sam3d_tuned import TinySam3DModel, TunedTinySam3D
from scarceseg.functional.pseudo import pseudo_label_loss, soft_label_loss
from scarceseg.methods import build_terms
from scarceseg.methods import fine_tuning as fine_tuning_module
from scarceseg.methods.copy_mask import CopyMask as Copy
from scarceseg.methods.fine_tuning import TunedTeacher
from scarceseg.methods.pseudo_labels import PseudoLabels, PseudoLabelTerm, surest_of
from scarceseg.methods.sfr import Sfr, SfrOptions
from scarceseg.methods.sfr_plus import SfrPlus, SfrPlusOptions
from scarceseg.networks import selftest as selftest_module
from scarceseg.networks.vnet import VNet
from scarceseg.types import Unlabelled
from tests.engine.test_run import lines, same
from tests.foundation.small import small_net
from tests.tiny import tiny_config, tiny_dataset

pytestmark = pytest.mark.usefixtures("small_foundation")

QUICK: dict[str, dict[str, Any]] = {
    "mean-teacher+sfr": {"sfr": {"tune_iterations": 3}},
    "sfr+": {"sfr+": {"tune_iterations": 3, "threshold": 0.5, "refresh_iterations": 2}},
    "mean-teacher+copy": {},
    "atlas": {"atlas": {"workers": 1, "registration": "affine"}},
    "self-training": {"self-training": {"rounds": 2, "teacher_iterations": 3}},
}


FLAT = {"name": "SegResNet", "args": {"init_filters": 4, "blocks_down": [1], "blocks_up": [], "norm": "instance"}}
"""A network that shows no halves."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("data"))


def stop_in(stage: str, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask every loop whose stage starts with `stage` to stop after that many iterations."""
    original = Loop.__init__

    def start(self: Loop, task: LoopTask, *rest: Any) -> None:
        count = iter(range(1000))
        asked = (lambda: next(count) == after - 1) if task.stage.startswith(stage) else (lambda: False)
        original(self, task, *rest[:2], asked)

    monkeypatch.setattr(Loop, "__init__", start)


@pytest.mark.parametrize(
    ("method", "stages"),
    [
        ("mean-teacher+sfr", ["sfr-tune", "train"]),
        ("sfr+", ["sfr+-tune", "sfr+-round1", "train"]),
        ("self-training", ["self-training-teacher1", "self-training-teacher2"]),
    ],
)
def test_stopped_in_any_stage_and_resumed_is_bit_for_bit_the_same(
    data: Path, tmp_path: Path, method: str, stages: list[str]
) -> None:
    config = tiny_config(data, method=method, terms=QUICK[method])
    train(config, tmp_path / "whole")
    for stage in stages:
        with pytest.MonkeyPatch.context() as patch:
            stop_in(stage, 1, patch)
            with pytest.raises(Interrupted):
                train(config, tmp_path / "cut", resume=True)
    train(config, tmp_path / "cut", resume=True)
    assert same(tmp_path / "whole", tmp_path / "cut")
    kept = [[(e["stage"], e["iteration"], e["loss"]) for e in lines(tmp_path / run)] for run in ("whole", "cut")]
    assert sorted(kept[0]) == sorted(kept[1])


LABELLING = {
    "mean-teacher+sfr": "sfr-label",
    "mean-teacher+copy": "copy-label",
    "atlas": "atlas-label",
    "self-training": "self-training-label1",
    "sfr+ student": "sfr+-round1/student",
    "sfr+": "sfr+-round1",
}


@pytest.mark.parametrize("what", LABELLING)
def test_stopped_while_labelling_and_resumed_is_bit_for_bit_the_same(data: Path, tmp_path: Path, what: str) -> None:
    method = what.partition(" ")[0]
    terms = {"sfr+": {**QUICK["sfr+"]["sfr+"], "threshold": 1.0, "rounds": 2}} if method == "sfr+" else QUICK[method]
    config = tiny_config(data, method=method, terms=terms)
    train(config, tmp_path / "whole")
    kept: list[str] = []

    def write(self: PseudoLabels, case: str, *rest: Any, **more: Any) -> None:
        original(self, case, *rest, **more)
        if self.folder == tmp_path / "cut" / "stages" / LABELLING[what]:
            kept.append(case)
            if len(kept) == 1:
                signal.raise_signal(signal.SIGTERM)

    original = PseudoLabels.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PseudoLabels, "write", write)
        with pytest.raises(Interrupted, match="labelling|registering"):
            train(config, tmp_path / "cut")
        assert len(kept) == 1
        train(config, tmp_path / "cut", resume=True)
    assert len(kept) == len(set(kept)) == 3
    assert same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("method", ["sfr+", "self-training"])
def test_the_pool_is_labelled_by_the_network_as_it_would_be_saved(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Running statistics of the last training batches label worse than those of the pool."""
    seen: list[torch.Tensor] = []
    original = workspace_module.Workspace.predict

    def means(network: torch.nn.Module) -> torch.Tensor:
        norms = [m.running_mean for m in network.modules() if isinstance(m, torch.nn.BatchNorm3d)]
        return torch.cat([mean for mean in norms if mean is not None]).clone()

    def predict(self: Any, network: Any, case: Any, whole: bool = False) -> np.ndarray:
        if isinstance(network, VNet):  # not a foundation model
            before = means(network)
            pool_statistics(network, self)
            assert torch.equal(before, means(network))  # they were those already
            seen.append(before)
        return original(self, network, case, whole)

    monkeypatch.setattr(workspace_module.Workspace, "predict", predict)
    train(tiny_config(data, method=method, terms=QUICK[method]), tmp_path / "run")
    assert len(seen) >= 6


def test_an_sfr_plus_round_leaves_the_student_as_it_is(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[dict[str, torch.Tensor]] = []
    original = SfrPlus._sure

    def spy(self: SfrPlus, work: Any, student: torch.nn.Module, *rest: Any) -> set[str]:
        for _ in range(2):
            states.append({key: value.clone() for key, value in student.state_dict().items()})
            found = original(self, work, student, *rest)
        states.append({key: value.clone() for key, value in student.state_dict().items()})
        return found

    monkeypatch.setattr(SfrPlus, "_sure", spy)
    terms = {"sfr+": {**QUICK["sfr+"]["sfr+"], "rounds": 2}}
    train(tiny_config(data, method="sfr+", terms=terms), tmp_path / "run")
    assert len(states) == 3
    assert all(torch.equal(value, states[0][key]) for state in states for key, value in state.items())
    table = json.loads((tmp_path / "run" / "stages" / "sfr+-round1" / "confidence.json").read_text())
    own = json.loads((tmp_path / "run" / "stages" / "sfr+-round1" / "student" / "confidence.json").read_text())
    for case, row in table["cases"].items():
        assert row["student_confidence"] == own["cases"][case]["confidence"]
    assert table["threshold"] == 0.5 and table["measure"] == "volume"
    kept = {
        path.name.rpartition("-")[2] for path in (tmp_path / "run" / "stages" / "sfr+-round1" / "student").glob("*.npy")
    }
    assert kept == {"label.npy"}  # nothing reads the probabilities any more


MANY: dict[str, dict[str, Any]] = {
    "sfr": {"sfr": {"tune_iterations": 1}},
    "sfr+": {"sfr+": {"tune_iterations": 1, "refresh_iterations": 1, "rounds": 2, "threshold": 0.0, "sure": "student"}},
    "atlas+sfr": {
        "atlas": {"workers": 1, "registration": "affine"},
        "sfr": {"tune_iterations": 1, "learn_from": "atlas", "targets": "soft"},
    },
    "copy": {"copy": {"trust": "weight"}},
    "self-training": {"self-training": {"teacher_iterations": 1}},
}


@pytest.mark.parametrize(
    ("method", "patches"),
    [(name, patches) for name in MANY for patches in (False, True) if "sfr" in name or not patches],
)
def test_several_classes_and_channels(tmp_path: Path, method: str, patches: bool, patch_model: str) -> None:
    folder = tiny_dataset(tmp_path / "data", classes=4, channels=2)
    more = {"foundation": patch_model} if patches else {}
    result = train(tiny_config(folder, method=method, terms=MANY[method], iterations=2, **more), tmp_path / "run")
    assert result.evaluation is None or len(result.evaluation["mean"]) == 3
    tables = sorted((tmp_path / "run" / "stages").glob("*/confidence.json"))
    assert tables
    for table in tables:
        for case in json.loads(table.read_text())["cases"]:
            probability = np.asarray(PseudoLabels(table.parent).probability(case), dtype=np.float32)
            assert probability.shape[0] == 4
            np.testing.assert_allclose(probability.sum(0), 1, atol=5e-3)
    assert [e["loss"] > 0 for e in lines(tmp_path / "run") if e["stage"] == "train"] == [True, True]


def test_sfr_plus_with_labels_per_crop_resumes_after_a_round(data: Path, tmp_path: Path, patch_model: str) -> None:
    terms = {"sfr+": {"tune_iterations": 1, "refresh_iterations": 1, "rounds": 2, "labels": "crop", "threshold": 0.6}}
    config = tiny_config(data, method="sfr+", terms=terms, iterations=4, foundation=patch_model)
    train(config, tmp_path / "whole")
    for after in (1, 2):  # before the round's end at iteration 2, and once more after it
        with pytest.MonkeyPatch.context() as patch:
            stop_in("train", after, patch)
            with pytest.raises(Interrupted):
                train(config, tmp_path / "cut", resume=True)
    train(config, tmp_path / "cut", resume=True)
    assert same(tmp_path / "whole", tmp_path / "cut")
    assert (tmp_path / "whole" / "stages" / "sfr+-round1" / "sure.json").exists()


@pytest.mark.parametrize("patches", [False, True])
def test_everything_is_bent_in_mm(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patch_model: str, patches: bool
) -> None:
    seen: dict[str, set[tuple[float, ...]]] = {"deform": set(), "bend": set()}

    def spy(module: Any, name: str) -> None:
        original = getattr(module, name)

        def call(*values: Any, **named: Any) -> Any:
            seen[name].add(tuple(named.get("spacing_mm", values[-1])))
            return original(*values, **named)

        monkeypatch.setattr(module, name, call)

    spy(sampling_module, "deform")
    spy(whole_module, "bend")
    more = {"foundation": patch_model} if patches else {}
    plan = {"patch": [16, 16, 16], "spacing_mm": [1.0, 1.0, 1.5]}
    config = tiny_config(data, method="sfr", terms={"sfr": {"tune_iterations": 1}}, iterations=1, plan=plan, **more)
    train(config, tmp_path / "run")
    assert seen["deform"] == {(1.0, 1.0, 1.5)} and seen["bend"] == (set() if patches else {(1.0, 1.0, 1.5)})


@pytest.mark.parametrize("method", ["copy", "atlas"])
def test_guesses_that_do_not_fit_on_the_disk_are_refused_before_they_are_made(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
        with pytest.raises(RunError, match="GB are free: make room and --resume"):
            train(tiny_config(data, method=method, terms=QUICK.get(method, {})), tmp_path / "run")
    assert not list((tmp_path / "run" / "stages").glob("*/*.npy"))
    train(tiny_config(data, method=method, terms=QUICK.get(method, {})), tmp_path / "run", resume=True)


def test_what_does_nothing_with_the_model_is_said(data: Path, tmp_path: Path, patch_model: str) -> None:
    tuning = {"tune_iterations": 1, "patch_augment": "reflections", "augment": 0.5}
    for name, word in ((None, "patch_augment"), (patch_model, "augment")):
        config = tiny_config(data, method="sfr", terms={"sfr": tuning}, iterations=1, foundation=name)
        warnings = [text for text in train(config, tmp_path / word).warnings if "changes nothing" in text]
        assert len(warnings) == 1 and f"terms.sfr.{word} changes nothing" in warnings[0]
    idle = SfrPlusOptions(rounds=1, threshold=0.5, strategy="decoder", rank=8).idle()
    assert idle["threshold"] == idle["sure"] == "with rounds: 1" and idle["rank"] == "with strategy: decoder"
    assert not {"threshold", "rank"} & set(SfrPlusOptions().idle())


@pytest.mark.parametrize("method", sorted(QUICK))
def test_hidden_labels_are_never_opened_in_stages(tmp_path: Path, method: str) -> None:
    for name in ("clean", "garbage"):
        folder = tiny_dataset(tmp_path / name)
        if name == "garbage":
            for case in ("case_02", "case_03", "case_04"):
                (folder / "labelsTr" / f"{case}.nii.gz").write_bytes(b"not an image")
        config = tiny_config(folder, labeled=2, method=method, terms=QUICK[method])
        train(config, tmp_path / f"run_{name}", cache=tmp_path / f"cache_{name}")
    assert same(tmp_path / "run_clean", tmp_path / "run_garbage")


def test_sfr_leaves_tuned_weights_labels_and_confidences(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, method="mean-teacher+sfr", terms={"sfr": {"tune_iterations": 2, "axes": [2, 0]}})
    train(config, tmp_path / "run")
    stages = tmp_path / "run" / "stages"
    assert {p.name for p in (stages / "sfr-tune").glob("*.safetensors")} == {
        "tuned-axis0.safetensors",
        "tuned-axis2.safetensors",
    }
    table = json.loads((stages / "sfr-label" / "confidence.json").read_text())
    assert table["foundation"] == Sfr.foundation and table["view"] == "whole volumes"
    labels = PseudoLabels(stages / "sfr-label")
    assert list(table["cases"]) == ["case_02", "case_03", "case_04"]
    for case, row in table["cases"].items():
        probability = labels.probability(case)
        differs = labels.label(case) != probability.argmax(0)
        assert np.ptp(probability[:, differs].astype(np.float32), axis=0).max(initial=0) < 1e-3  # half precision
        assert row["confidence"] == pytest.approx(float(probability.astype(np.float32).max(0).mean()), abs=2e-3)
    assert not list((tmp_path / "run" / "checkpoints").glob("sfr*"))


def test_the_student_learns_the_labels_of_the_tuned_model(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a teacher that calls everything class 1, a student that is otherwise taught background follows it."""

    def everything(self: TunedTeacher, case: Any) -> np.ndarray:
        size = case.image.shape[1:]
        return np.stack([np.zeros(size, np.float32), np.ones(size, np.float32)])

    monkeypatch.setattr(TunedTeacher, "probability", everything)
    config = tiny_config(
        data,
        method="sfr",
        terms={"sfr": {"tune_iterations": 1, "weight": 20.0}},
        iterations=25,
        optim={"lr": 0.05, "schedule": "constant"},
    )
    train(config, tmp_path / "run")
    losses = [e["loss/sfr"] for e in lines(tmp_path / "run") if e["stage"] == "train"]
    assert np.mean(losses[-3:]) < 0.7 * losses[0]


def test_pseudo_labels_are_cropped_and_turned_with_the_image(data: Path, tmp_path: Path) -> None:
    """A guess computed voxel by voxel from the image must still be that function of the image in every batch."""
    seen = []

    def guess(self: TunedTeacher, case: Any) -> np.ndarray:
        inside = (np.asarray(case.image[0]) > 0.3).astype(np.float32)
        return np.stack([1 - inside, inside])

    original = Loop._step

    def spy(self: Loop, batch: Any, iteration: int) -> Any:
        if self.task.stage == "train":
            seen.append(batch[1])
        return original(self, batch, iteration)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TunedTeacher, "probability", guess)
        patch.setattr(Loop, "_step", spy)
        train(tiny_config(data, method="sfr", augment="all", terms={"sfr": {"tune_iterations": 1}}), tmp_path / "run")
    assert len(seen) == 6
    for rows in seen:
        torch.testing.assert_close(rows.fields["sfr/label"].bool(), rows.image[:, 0] > 0.3)


@pytest.mark.parametrize(("view", "words"), [("auto", "patches"), ("patch", "patches"), ("volume", "whole volumes")])
def test_a_volumetric_model_is_shown_patches_or_whole_volumes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, view: str, words: str
) -> None:
    """As the student sees them: curves of single slices are for models of slices."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a slice got a curve of its own")

    monkeypatch.setattr(fine_tuning_module, "CurvedSlices", refuse)
    file = tmp_path / "sam3d.safetensors"
    save_tiny_sam3d(file, small_net())
    terms = {"sfr": {"tune_iterations": 1, "view": view, "foundation": str(file)}}
    train(tiny_config(data, method="sfr", terms=terms, iterations=1), tmp_path / "run")
    table = json.loads((tmp_path / "run" / "stages" / "sfr-label" / "confidence.json").read_text())
    assert (table["view"], table["foundation"]) == (words, str(file))


@pytest.mark.parametrize(("precision", "broken", "computed"), [("bf16", True, "fp32"), ("bf16", False, "bf16")])
def test_a_model_that_bf16_would_spoil_is_tuned_in_float32(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, broken: bool, computed: str
) -> None:
    monkeypatch.setattr(selftest_module, "broken_in_bf16", lambda *_: None)  # of the student
    monkeypatch.setattr(fine_tuning_module, "broken_in_bf16", lambda *_: [2, 2, 2] if broken else None)
    types = []
    forward = TunedTinySam3D.forward

    def spy(self: TunedTinySam3D, image: torch.Tensor) -> torch.Tensor:
        types.append("bf16" if torch.is_autocast_enabled("cpu") else "fp32")
        return forward(self, image)

    monkeypatch.setattr(TunedTinySam3D, "forward", spy)
    file = tmp_path / "sam3d.safetensors"
    save_tiny_sam3d(file, small_net())
    terms = {"sfr": {"tune_iterations": 1, "foundation": str(file)}}
    config = tiny_config(data, method="sfr", terms=terms, iterations=1, precision=precision)
    train(config, tmp_path / "run")
    assert set(types) == {computed}


def test_a_model_of_one_view_is_not_shown_another(data: Path, tmp_path: Path) -> None:
    terms = {"sfr": {"tune_iterations": 1, "view": "patch"}}
    with pytest.raises(ConfigError, match="can only be tuned on a volume at a time, got 'patch'"):
        train(tiny_config(data, method="sfr", terms=terms, iterations=1), tmp_path / "run")


def test_sfr_plus_gives_sure_volumes_to_the_tuning_and_takes_their_labels_away(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources: dict[str, list[str]] = {}
    original = TunedTeacher.tune

    def spy(self: TunedTeacher, folder: Path, stage: str, guessed: Any = (), iterations: int | None = None) -> None:
        sources[stage] = [source.name for source in guessed]
        original(self, folder, stage, guessed, iterations)

    def predict(self: Any, network: Any, case: Any, whole: bool = False) -> np.ndarray:
        high = 0.999 if case.name == "case_03" else 0.8
        inside = np.asarray(case.image[0]) > 0.3
        return np.where(np.stack([~inside, inside]), high, 1 - high).astype(np.float32)

    monkeypatch.setattr(TunedTeacher, "tune", spy)
    monkeypatch.setattr(workspace_module.Workspace, "predict", predict)
    terms = {"sfr+": {"tune_iterations": 1, "refresh_iterations": 1, "rounds": 2}}
    result = train(tiny_config(data, method="sfr+", terms=terms), tmp_path / "run")
    assert sources == {"sfr+-tune": [], "sfr+-round1": ["case_03"]}
    labels = PseudoLabels(tmp_path / "run" / "stages" / "sfr+-round1")
    assert (np.asarray(labels.label("case_03")) == 255).all()
    assert set(np.unique(labels.label("case_02"))) == {0, 1}
    table = json.loads((labels.folder / "confidence.json").read_text())
    assert table["sure"] == ["case_03"] and table["cases"]["case_02"]["confidence"] == pytest.approx(0.8, abs=1e-3)
    assert not result.warnings


@pytest.mark.parametrize(
    ("share", "measure", "sure"),
    [(0.5, "volume", ["case_03"]), (0.5, "foreground", ["case_02"]), (0.1, "foreground", ["case_02"])],
)
def test_a_share_of_the_pool_passes_whatever_the_threshold(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, measure: str, sure: list[str]
) -> None:
    """Each measure has its own surest volume; one passes at least, no threshold is met and nobody is warned."""

    def predict(self: Any, network: Any, case: Any, whole: bool = False) -> np.ndarray:
        inside = np.asarray(case.image[0]) > 0.3
        outer, inner = (0.95, 0.6) if case.name == "case_03" else (0.6, 0.9)
        found = np.where(inside, inner, 1 - outer)
        return np.stack([1 - found, found]).astype(np.float32)

    monkeypatch.setattr(workspace_module.Workspace, "predict", predict)
    options = {"tune_iterations": 1, "refresh_iterations": 1, "rounds": 2, "share": share, "measure": measure}
    result = train(tiny_config(data, method="sfr+", terms={"sfr+": options}), tmp_path / "run")
    folder = tmp_path / "run" / "stages" / "sfr+-round1"
    assert json.loads((folder / "sure.json").read_text()) == sure
    table = json.loads((folder / "confidence.json").read_text())
    assert table["sure"] == sure and table["share"] == share and "threshold" not in table
    assert not result.warnings
    result = train(
        tiny_config(data, method="sfr+", terms={"sfr+": {**options, "threshold": 0.9}}, iterations=2), tmp_path / "both"
    )
    assert any("threshold" in warning and f"share: {share}" in warning for warning in result.warnings)


def test_a_share_holds_no_volume_without_a_finding(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However sure the student is that there is nothing."""
    empty = {"case_02"}

    def predict(self: Any, network: Any, case: Any, whole: bool = False) -> np.ndarray:
        inside = (np.asarray(case.image[0]) > 0.3) & (case.name not in empty)
        found = np.where(inside, 0.7, 0.01)
        return np.stack([1 - found, found]).astype(np.float32)

    monkeypatch.setattr(workspace_module.Workspace, "predict", predict)
    options = {"tune_iterations": 1, "refresh_iterations": 1, "rounds": 2, "share": 0.9}
    config = tiny_config(data, method="sfr+", terms={"sfr+": options})
    result = train(config, tmp_path / "one")
    assert json.loads((tmp_path / "one" / "stages" / "sfr+-round1" / "sure.json").read_text()) == ["case_03", "case_04"]
    assert not any("finds nothing" in warning for warning in result.warnings)
    empty |= {"case_03", "case_04"}
    result = train(config, tmp_path / "none")
    assert json.loads((tmp_path / "none" / "stages" / "sfr+-round1" / "sure.json").read_text()) == []
    assert any("finds nothing" in warning for warning in result.warnings)


@pytest.mark.parametrize("more", [{}, {"trust": "weight"}, {"targets": "soft"}, {"targets": "soft", "trust": "weight"}])
def test_only_the_surest_guesses_are_learnt(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, str]
) -> None:
    """What is guessed for the others changes nothing, and does without the option."""
    wrong = False

    def guess(self: Copy, work: Any, case: Any) -> np.ndarray:
        high = 0.99 if case.name == "case_03" else 0.7
        inside = (np.asarray(case.image[0]) > 0.3) ^ (wrong and case.name != "case_03")
        return np.where(np.stack([~inside, inside]), high, 1 - high).astype(np.float32)

    monkeypatch.setattr(Copy, "probability_of", guess)
    for name, options in (("surest", {"surest": 0.5, **more}), ("all", more)):
        for wrong in (False, True):
            config = tiny_config(data, method="mean-teacher+copy", terms={"copy": options}, iterations=3)
            train(config, tmp_path / f"{name}{wrong}")
    assert same(tmp_path / "surestFalse", tmp_path / "surestTrue")
    assert not same(tmp_path / "allFalse", tmp_path / "allTrue")
    assert not same(tmp_path / "surestFalse", tmp_path / "allFalse")
    assert any(e["loss/copy"] > 0 for e in lines(tmp_path / "surestFalse") if e["stage"] == "train")


def test_the_surest_of_a_table() -> None:
    """By either measure, one at least, none without a finding, ties by name."""
    rows = {
        "a": {"confidence": 0.9, "foreground_confidence": 0.7},
        "b": {"confidence": 0.8, "foreground_confidence": 0.8},
        "c": {"confidence": 0.99, "foreground_confidence": 0.0},
        "d": {"confidence": 0.8, "foreground_confidence": 0.8},
    }
    assert surest_of(rows, "foreground_confidence", 0.5) == {"b", "d"}
    assert surest_of(rows, "foreground_confidence", 0.1) == {"b"}
    assert surest_of(rows, "confidence", 0.5) == {"a", "b"}
    assert surest_of(rows, "confidence", 1.0) == {"a", "b", "d"}
    assert surest_of({"c": rows["c"]}, "confidence", 0.5) == set()


def test_the_surest_are_chosen_among_those_that_have_a_label(tmp_path: Path) -> None:
    """The sure volumes of sfr+ have none, and the highest confidence."""
    labels = PseudoLabels(tmp_path)
    for case, found in (("a", 0.9), ("b", 0.8), ("c", 0.7)):
        probability = np.full((2, 4, 4, 4), found, dtype=np.float32)
        probability[0] = 1 - found
        if case == "a":
            labels.write_nothing(case, probability)
        else:
            labels.write(case, probability)
    labels.finish(["a", "b", "c"])
    assert labels.surest(0.5) == {"b"}
    assert labels.surest(1.0) == {"b", "c"}


@pytest.mark.parametrize(
    ("method", "labelled", "options", "share"),
    [
        ("sfr", 1, {}, 0.5),
        ("sfr", 2, {}, None),
        ("sfr+", 1, {}, 0.5),
        ("sfr", 1, {"surest": None}, None),
        ("sfr", 2, {"surest": 0.3}, 0.3),
        ("atlas", 1, {}, None),
        ("copy", 1, {"surest": 0.5}, 0.5),
    ],
)
def test_what_is_learnt_of_the_guesses(
    method: str, labelled: int, options: dict[str, Any], share: float | None
) -> None:
    term = build_terms(f"mean-teacher+{method}", {method: options}, 2)[method]
    assert isinstance(term, PseudoLabelTerm)
    assert term.learnt(SimpleNamespace(labelled=range(labelled))) == share  # type: ignore[arg-type]


def test_surest_is_of_whole_volumes() -> None:
    with pytest.raises(ValueError, match="surest is of whole volumes"):
        SfrOptions(labels="crop", surest=0.5)


def test_sfr_plus_warns_when_none_or_all_pass(data: Path, tmp_path: Path) -> None:
    for threshold, word in ((1.0, "no unlabelled"), (0.0, "every")):
        terms = {"sfr+": {"tune_iterations": 1, "refresh_iterations": 1, "rounds": 2, "threshold": threshold}}
        result = train(tiny_config(data, method="sfr+", terms=terms), tmp_path / f"run{threshold}")
        assert any(word in warning and "measure: foreground" in warning for warning in result.warnings)


@pytest.fixture(scope="module")
def patch_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small foundation model that is shown patches."""
    file = tmp_path_factory.mktemp("weights3d") / "small3d.safetensors"
    save_tiny_sam3d(file, small_net())
    return str(file)


def test_labels_per_crop_are_those_of_the_tuned_model(data: Path, tmp_path: Path, patch_model: str) -> None:
    terms = {"sfr": {"tune_iterations": 2, "labels": "crop"}}
    config = tiny_config(data, method="sfr", terms=terms, iterations=2, foundation=patch_model)
    train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "stages" / "sfr-label").exists()
    assert all(e["loss/sfr"] > 0 for e in lines(tmp_path / "run") if e["stage"] == "train")


def test_labels_per_crop_need_a_model_of_patches(data: Path, tmp_path: Path) -> None:
    """Stretched to the size of a volume, a patch would be told places that it does not have."""
    config = tiny_config(data, method="sfr", terms={"sfr": {"labels": "crop"}})
    with pytest.raises(ConfigError, match="whole volumes"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("options", "loss"), [({}, "hard"), ({"targets": "soft"}, "soft"), ({"trust": "weight"}, "weight")]
)
def test_labels_per_crop_are_learnt_in_the_form_the_options_ask_for(options: dict[str, Any], loss: str) -> None:
    term = Sfr(SfrOptions(labels="crop", **options), 3)
    term.name = "sfr"
    g = torch.Generator().manual_seed(0)
    said = torch.randn(2, 3, 4, 4, 4, generator=g).softmax(1)

    class Teacher:
        def on_patch(self, image: torch.Tensor) -> torch.Tensor:
            return said.clone()

    term._teacher = [Teacher()]  # type: ignore[list-item]
    logits = torch.randn(2, 3, 4, 4, 4, generator=g)
    rows = Unlabelled(torch.zeros(2, 1, 4, 4, 4), ("a", "b"), {})
    hard = torch.nn.functional.one_hot(said.argmax(1), 3).movedim(-1, 1).float()
    expected = {
        "hard": pseudo_label_loss(logits, said.argmax(1)),
        "soft": soft_label_loss(logits, said),
        "weight": soft_label_loss(logits, hard, said.amax(1)),
    }[loss]
    torch.testing.assert_close(term.against(logits, term.guessed(rows)), expected)


@pytest.mark.parametrize("options", [{"targets": "soft"}, {"trust": "weight"}, {}])
@pytest.mark.parametrize("labels", ["volume", "crop"])
def test_a_sure_volume_teaches_nothing_in_any_form(tmp_path: Path, options: dict[str, Any], labels: str) -> None:
    term = SfrPlus(SfrPlusOptions(labels=labels, **options), 2)  # type: ignore[arg-type]
    term.name = "sfr+"
    probability = torch.randn(1, 2, 4, 4, 4).softmax(1)
    kept = PseudoLabels(tmp_path)
    kept.write_nothing("a", probability[0].numpy())

    class Teacher:
        def on_patch(self, image: torch.Tensor) -> torch.Tensor:
            return probability.clone()

    term._teacher, term._ignored = [Teacher()], frozenset({"a"})  # type: ignore[list-item]
    maps = {"label": kept.label, "probability": kept.probability, "weight": kept.weight}
    fields = {f"sfr+/{key}": torch.from_numpy(np.array(read("a")))[None] for key, read in maps.items()}
    rows = Unlabelled(torch.zeros(1, 1, 4, 4, 4), ("a",), fields)
    logits = torch.randn(1, 2, 4, 4, 4, requires_grad=True)
    loss = term.against(logits, term.guessed(rows))
    loss.backward()
    assert float(loss.detach()) == 0 and logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize(
    "bad",
    [
        {"sfr": {"axes": []}},
        {"sfr": {"tune_clip": 0}},
        {"sfr": {"labels": "crop", "largest_component": True}},
        {"sfr+": {"labels": "crop", "sure": "student"}},
        {"cct": {"drop_low": 0.95}},
    ],
)
def test_options_that_cannot_be_are_told_before_any_work(data: Path, tmp_path: Path, bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        train(tiny_config(data, method=next(iter(bad)), terms=bad), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_slices_along_another_axis_get_their_curves_along_it(
    data: Path, tmp_path: Path, patch_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = CurvedSlices.__init__

    def spy(self: CurvedSlices, inner: Any, seed: int, axis: int = 2) -> None:
        seen.append(axis)
        original(self, inner, seed, axis)

    monkeypatch.setattr(CurvedSlices, "__init__", spy)
    monkeypatch.setattr(TinySam3DModel, "slices", True)
    terms = {"sfr": {"tune_iterations": 1, "axes": [2, 0]}}
    train(tiny_config(data, method="sfr", terms=terms, iterations=1, foundation=patch_model), tmp_path / "run")
    assert seen == [2, 0]


def test_warnings_of_a_finished_stage_are_told_again_after_a_resume(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(self: TunedTeacher, case: Any) -> np.ndarray:
        size = case.image.shape[1:]
        return np.stack([np.ones(size, np.float32), np.zeros(size, np.float32)])

    monkeypatch.setattr(TunedTeacher, "probability", nothing)
    terms = {"sfr+": {"tune_iterations": 1, "refresh_iterations": 1, "rounds": 2, "threshold": 1.0}}
    config = tiny_config(data, method="sfr+", terms=terms)
    whole = train(config, tmp_path / "whole").warnings
    assert any("no foreground" in text for text in whole) and any("no unlabelled" in text for text in whole)
    with pytest.MonkeyPatch.context() as patch:
        stop_in("train", config.iterations - 1, patch)
        with pytest.raises(Interrupted):
            train(config, tmp_path / "cut")
    assert train(config, tmp_path / "cut", resume=True).warnings == whole


def test_later_teachers_of_self_training_split_their_batches_as_the_run_does(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, bool] = {}
    original = Loop.__init__

    def spy(self: Loop, task: LoopTask, *rest: Any) -> None:
        found[task.stage] = task.split
        original(self, task, *rest)

    monkeypatch.setattr(Loop, "__init__", spy)
    config = tiny_config(data, method="self-training", terms=QUICK["self-training"], batch_norm="split")
    train(config, tmp_path / "run")
    assert set(found.values()) == {True} and len(found) == 3


def test_the_run_does_not_need_the_foundation_model_to_predict(data: Path, tmp_path: Path) -> None:
    from scarceseg.inference.predictor import Predictor

    train(tiny_config(data, method="sfr", terms={"sfr": {"tune_iterations": 1}}, iterations=1), tmp_path / "run")
    for name in ("stages", "checkpoints"):
        for path in sorted((tmp_path / "run" / name).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    assert Predictor(tmp_path / "run", device="cpu")


def test_copy_puts_the_labelled_mask_on_every_volume(tmp_path: Path) -> None:
    """All volumes have one size here, so that the mask of the only labelled one must arrive as it is."""
    folder = tiny_dataset(tmp_path / "data", classes=3)
    train(tiny_config(folder, method="copy", labeled=1, iterations=1), tmp_path / "run", cache=tmp_path / "cache")
    labels = PseudoLabels(tmp_path / "run" / "stages" / "copy-label")
    (file,) = (tmp_path / "cache").glob("case_00-label*.npy")
    for case in ("case_01", "case_04"):
        np.testing.assert_array_equal(labels.label(case), np.load(file))


def test_atlas_says_how_good_it_is_and_keeps_its_registrations(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(
        data, method="mean-teacher+atlas", terms={"atlas": {"workers": 1, "trust": "weight"}}, iterations=1
    )
    train(config, tmp_path / "first", cache=tmp_path / "cache")
    table = json.loads((tmp_path / "first" / "stages" / "atlas-label" / "confidence.json").read_text())
    assert table["atlases"] == ["case_00", "case_01"] and 0 <= table["expected_dice"]["mean"] <= 1
    assert all(row["atlases"] for row in table["cases"].values())

    def refuse(*_: Any) -> None:
        raise AssertionError("registered again")

    monkeypatch.setattr("scarceseg.atlas.pairs.align_affine", refuse)
    monkeypatch.setattr("scarceseg.atlas.pairs.align_deformable", refuse)
    train(config, tmp_path / "second", cache=tmp_path / "cache")
    assert same(tmp_path / "first", tmp_path / "second")


def test_the_model_may_learn_from_another_teachers_labels(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[str]] = {}
    original = TunedTeacher.tune

    def spy(self: TunedTeacher, folder: Path, stage: str, guessed: Any = (), iterations: int | None = None) -> None:
        seen[stage] = [source.name for source in guessed]
        assert all(source.label is not None for source in guessed)
        original(self, folder, stage, guessed, iterations)

    monkeypatch.setattr(TunedTeacher, "tune", spy)
    terms = {"sfr": {"tune_iterations": 2, "learn_from": "copy"}}
    train(tiny_config(data, method="copy+sfr", terms=terms, iterations=2), tmp_path / "run")
    assert seen == {"sfr-tune": ["case_02", "case_03", "case_04"]}
    entry = lines(tmp_path / "run")[-1]
    assert entry["loss/copy"] > 0 and entry["loss/sfr"] > 0


def test_bad_settings_are_told_in_one_message(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="learn_from: expected a term that guesses labels"):
        train(tiny_config(data, method="sfr", terms={"sfr": {"learn_from": "mean-teacher"}}), tmp_path / "a")
    with pytest.raises(ConfigError, match="neither a foundation model nor a file"):
        train(tiny_config(data, method="sfr", foundation="tiny-samm"), tmp_path / "b")
    with pytest.raises(ConfigError, match="axes"):
        train(tiny_config(data, method="sfr", terms={"sfr": {"axes": [3]}}), tmp_path / "c")


@pytest.mark.parametrize(
    ("method", "changed", "words"),
    [
        ("copy+mean-teacher+sfr+urpc", {"network": FLAT}, "urpc works on the features between encoder and decoder"),
        ("copy+cct", {"network": FLAT}, "cct works on the features"),
        ("copy+magicnet", {"network": FLAT}, "magicnet works on the features"),
        ("copy+magicnet", {}, "a patch of 16x16x16 .* is not cut at all"),
        ("copy+urpc", {"terms": {"urpc": {"scales": 9}}}, "scales is at most 4"),
        ("copy+sfr", {"terms": {"sfr": {"labels": "crop"}}}, "whole volumes"),
        ("copy+sfr", {"terms": {"sfr": {"learn_from": "mean-teacher"}}}, "learn_from: expected a term"),
        ("copy+sfr", {"terms": {"sfr": {"view": "patch"}}}, "can only be tuned on a volume at a time"),
        ("copy+sfr", {"terms": {"sfr": {"tuned_in": "nowhere"}}}, "nowhere"),
    ],
)
def test_what_cannot_be_is_refused_before_the_stages_of_any_term(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, changed: dict[str, Any], words: str
) -> None:
    """The folder is free for the corrected command."""

    def never(*_: Any) -> None:
        raise AssertionError("a stage was run")

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_offline_stage", never)
        with pytest.raises((ConfigError, RunError), match=words):
            train(tiny_config(data, method=method, **changed), tmp_path / "run")
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())
    train(tiny_config(data, method="copy", iterations=1), tmp_path / "run")


def test_a_run_that_goes_on_is_checked_but_not_given_back(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(data, method="copy", iterations=1)
    train(config, tmp_path / "run")

    def refuse(self: Any, student: Any, work: Any) -> None:
        raise ConfigError("not today")

    monkeypatch.setattr(Copy, "check", refuse)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="not today"):
        train(config, tmp_path / "run", resume=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_sum_may_end_with_sfr_plus(data: Path) -> None:
    from scarceseg.methods import parse_method

    assert parse_method("mean-teacher+sfr++self-training") == ["supervised", "mean-teacher", "sfr+", "self-training"]
    with pytest.raises(ConfigError, match="empty summand"):
        parse_method("mean-teacher++")
