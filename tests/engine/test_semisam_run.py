"""SemiSAM in a run: hidden labels stay hidden, a stopped run goes on as it was, models are built once, and what is logged."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scarceseg.config import Config
from scarceseg.engine import workspace as workspace_module
from scarceseg.engine.loop import Loop
from scarceseg.engine.run import train
from scarceseg.errors import ConfigError, Interrupted, RunError
from scarceseg.foundation.base import Masks
from scarceseg.foundation.sam_volume import SamPromptable
from scarceseg.foundation.tiny_sam import save_tiny_sam
from scarceseg.foundation.tiny_sam3d import save_tiny_sam3d
from scarceseg.methods.semisam import SemiSam
from scarceseg.methods.sfr import Sfr
from tests.engine.test_run import lines, same
from tests.engine.test_stages import stop_in
from tests.foundation.small import small_net, small_sam
from tests.tiny import tiny_config, tiny_dataset

LOOSE = {"agreement": [0.0, 0.1], "quality": [0.0, 0.0], "threshold": 0.3, "confident": 0.5, "tune_iterations": 2}


@pytest.fixture(scope="module", autouse=True)
def small_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Small models of the usual kinds are what these runs take when none is named."""
    folder = tmp_path_factory.mktemp("weights")
    save_tiny_sam(folder / "sam.safetensors", small_sam())
    save_tiny_sam3d(folder / "sam3d.safetensors", small_net())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sfr, "foundation", str(folder / "sam.safetensors"))
        patch.setattr(Sfr, "foundation_of_one", str(folder / "sam.safetensors"))
        patch.setattr(SemiSam, "foundation", str(folder / "sam3d.safetensors"))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("data"))


def config_of(data: Path, method: str = "mean-teacher+semisam", **rest: Any) -> Config:
    terms = {"semisam": LOOSE | rest.pop("semisam", {})} | rest.pop("terms", {})
    return tiny_config(data, method=method, terms=terms, log_every=1, **rest)


def asked(run: Path) -> list[float]:
    return [entry["asked/semisam"] for entry in lines(run) if entry["stage"] == "train"]


def test_stopped_and_resumed_is_bit_for_bit_the_same(data: Path, tmp_path: Path) -> None:
    train(config_of(data), tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        stop_in("train", 2, patch)
        with pytest.raises(Interrupted):
            train(config_of(data), tmp_path / "cut")
    train(config_of(data), tmp_path / "cut", resume=True)
    assert max(asked(tmp_path / "whole")) > 0
    assert same(tmp_path / "whole", tmp_path / "cut")
    assert [e["loss"] for e in lines(tmp_path / "whole")] == [e["loss"] for e in lines(tmp_path / "cut")]


def test_stopped_while_a_head_is_tuned_and_resumed_is_bit_for_bit_the_same(data: Path, tmp_path: Path) -> None:
    config = config_of(data, semisam={"tune_iterations": 4})
    train(config, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        stop_in("semisam-tune-0", 2, patch)
        with pytest.raises(Interrupted):
            train(config, tmp_path / "cut")
    assert not list((tmp_path / "cut" / "stages").rglob("head-*.safetensors"))
    train(config, tmp_path / "cut", resume=True)
    assert same(tmp_path / "whole", tmp_path / "cut")
    heads = [
        (tmp_path / run / "stages" / "semisam-tune" / "head-0.safetensors").read_bytes() for run in ("whole", "cut")
    ]
    assert heads[0] == heads[1]
    assert not list((tmp_path / "cut" / "checkpoints").glob("semisam*"))


def test_a_tuned_head_is_what_is_asked(data: Path, tmp_path: Path) -> None:
    options = {"weight": 5.0, "ramp": "constant"}
    for name, steps in (("few", 1), ("more", 6), ("none", 0)):
        train(config_of(data, semisam=options | {"tune_iterations": steps}), tmp_path / name)
        assert (tmp_path / name / "stages" / "semisam-tune").exists() == bool(steps)
        assert max(asked(tmp_path / name)) > 0
    assert not same(tmp_path / "few", tmp_path / "more") and not same(tmp_path / "few", tmp_path / "none")


def test_a_damaged_head_is_told(data: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_in("train", 2, patch)
        with pytest.raises(Interrupted):
            train(config_of(data), tmp_path / "run")
    (tmp_path / "run" / "stages" / "semisam-tune" / "head-0.safetensors").write_bytes(b"?")
    with pytest.raises(RunError, match=r"head-0.safetensors.*remove that folder and --resume"):
        train(config_of(data), tmp_path / "run", resume=True)


def test_hidden_labels_are_never_opened(tmp_path: Path) -> None:
    for name in ("clean", "garbage"):
        folder = tiny_dataset(tmp_path / name)
        if name == "garbage":
            for case in ("case_02", "case_03", "case_04"):
                (folder / "labelsTr" / f"{case}.nii.gz").write_bytes(b"not an image")
        train(config_of(folder, labeled=2), tmp_path / f"run_{name}", cache=tmp_path / f"cache_{name}")
    assert max(asked(tmp_path / "run_clean")) > 0
    assert same(tmp_path / "run_clean", tmp_path / "run_garbage")


def test_the_term_changes_what_is_learnt(data: Path, tmp_path: Path) -> None:
    """A run in which nothing is asked would pass every other test here."""
    train(config_of(data, semisam={"weight": 5.0, "ramp": "constant"}), tmp_path / "with")
    train(config_of(data, semisam={"weight": 0.0}), tmp_path / "without")
    assert not same(tmp_path / "with", tmp_path / "without")


def test_with_many_labels_a_run_is_that_of_its_base_and_says_so(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the training, and without building a model."""

    def built(*_: Any) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(SemiSam, "_promptable", built)
    train(tiny_config(data, log_every=1), tmp_path / "base")
    capsys.readouterr()
    result = train(config_of(data, semisam={"enough": 1}), tmp_path / "run")  # of two labelled volumes
    assert same(tmp_path / "base", tmp_path / "run")
    (said,) = (line for line in result.warnings if "semisam" in line)
    assert said.startswith("with 2 labelled volumes semisam asks nothing (terms.semisam.enough: 1)")
    shown = capsys.readouterr().err
    assert said in shown and shown.index(said) < shown.index("train ")


def test_log_and_pictures(data: Path, tmp_path: Path) -> None:
    train(config_of(data, iterations=6), tmp_path / "run")
    entries = [e for e in lines(tmp_path / "run") if e["stage"] == "train"]
    for key in ("asked", "agreement", "quality", "gate"):
        assert all(0 <= entry[f"{key}/semisam"] <= 1 for entry in entries)
    pictures = sorted((tmp_path / "run" / "pictures").glob("train-semisam-*.png"))
    assert [path.stem[-6:] for path in pictures] == [f"{i:06d}" for i in range(6)]
    assert np.asarray(Image.open(pictures[0])).ndim == 3


def test_a_run_in_which_nothing_came_through_is_told(data: Path, tmp_path: Path) -> None:
    """The gate was shut, nothing was asked; neither is said where masks counted or the gate is off."""
    runs = {
        "open": {},
        "shut": {"agreement": [0.999, 1.0]},
        "off": {"agreement": [0.999, 1.0], "gate": False},
        "unasked": {"threshold": 0.9999},
        "unasked-off": {"threshold": 0.9999, "gate": False},
        "unwanted": {"agreement": [0.999, 1.0], "weight": 0.0},
    }
    said = {name: train(config_of(data, semisam=o, iterations=2), tmp_path / name).warnings for name, o in runs.items()}
    about = {name: [text for text in texts if text.startswith("semisam: ")] for name, texts in said.items()}
    assert {name: len(texts) for name, texts in about.items()} == {
        "open": 0,
        "shut": 1,
        "off": 0,
        "unasked": 1,
        "unasked-off": 1,
        "unwanted": 0,
    }
    assert "0.0 % of their weight" in about["shut"][0] and "0.999" in about["shut"][0]
    assert "found nothing" in about["unasked"][0]


def test_masks_that_do_not_prove_themselves_are_told(tmp_path: Path) -> None:
    folder = tiny_dataset(tmp_path / "data", classes=3)
    said = {}
    for name, proof in (("shut", [1.0, 1.0]), ("open", [0.0, 0.0])):
        config = config_of(folder, semisam={"agreement": [0.0, 0.0], "proof": proof}, iterations=2)
        said[name] = [text for text in train(config, tmp_path / name).warnings if text.startswith("semisam: ")]
    assert len(said["shut"]) == 1 and "labelled rows" in said["shut"][0]
    assert said["open"] == []


def test_in_sum_with_sfr_each_takes_its_own_model_built_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    original = workspace_module.load_foundation

    def spy(name: str, *rest: Any) -> Any:
        built.append(name)
        return original(name, *rest)

    monkeypatch.setattr(workspace_module, "load_foundation", spy)
    config = config_of(data, "mean-teacher+sfr+semisam", terms={"sfr": {"tune_iterations": 1}}, iterations=2, labeled=2)
    train(config, tmp_path / "run")
    once = [str(Sfr.foundation), str(SemiSam.foundation)]
    assert sorted(built) == sorted([*once, once[0]])  # and that of sfr once more, for the report's pictures of mosaics


def test_models_that_only_stages_need_do_not_stay_in_memory(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: dict[str, list[bool]] = {}
    built: dict[str, Any] = {}
    original, step = workspace_module.load_foundation, Loop._step

    def load(name: str, *rest: Any) -> Any:
        model = original(name, *rest)
        built[name] = weakref.ref(model)
        return model

    def spy(self: Loop, batch: Any, iteration: int) -> Any:
        if self.task.stage == "train":
            gc.collect()
            for name, reference in built.items():
                alive.setdefault(name, []).append(reference() is not None)
        return step(self, batch, iteration)

    monkeypatch.setattr(workspace_module, "load_foundation", load)
    monkeypatch.setattr(Loop, "_step", spy)
    config = config_of(
        data,
        "mean-teacher+sfr+semisam",
        semisam={"tune_iterations": 0},
        terms={"sfr": {"tune_iterations": 1}},
        iterations=2,
        labeled=2,
    )
    train(config, tmp_path / "run")
    assert alive == {str(Sfr.foundation): [False, False], str(SemiSam.foundation): [True, True]}


def test_what_semisam_refuses_is_refused_before_the_stages_of_others(data: Path, tmp_path: Path) -> None:
    config = config_of(data, "sfr+semisam", semisam={"channel": 3}, terms={"sfr": {"tune_iterations": 1}})
    with pytest.raises(ConfigError, match="channel"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "stages").exists()
    train(config_of(data, "sfr+semisam", terms={"sfr": {"tune_iterations": 1}}, iterations=1), tmp_path / "run")


def test_several_models(data: Path, tmp_path: Path) -> None:
    own = str(SemiSam.foundation)
    frozen = {"tune_iterations": 0}  # tuned, the two would differ
    train(config_of(data, semisam={"foundation": [own, own], **frozen}, iterations=2), tmp_path / "twice")
    train(config_of(data, semisam=frozen, iterations=2), tmp_path / "once")
    assert asked(tmp_path / "twice") == asked(tmp_path / "once")
    assert same(tmp_path / "twice", tmp_path / "once")


@pytest.mark.parametrize("view", ["mosaic", "slices"])
def test_a_2d_sam_beside_a_volumetric_model(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, view: str
) -> None:
    sam, calls = SamPromptable(small_sam()), []
    segment = SamPromptable.segment

    def spy(self: SamPromptable, *rest: Any) -> Masks:
        calls.append(self.options.view)
        return segment(self, *rest)

    original = workspace_module.load_foundation
    monkeypatch.setattr(SamPromptable, "segment", spy)
    monkeypatch.setattr(
        workspace_module,
        "load_foundation",
        lambda name, *rest: sam if name == Sfr.foundation else original(name, *rest),
    )
    loose = {"view": view, "weight": 5.0, "ramp": "constant", "prompts": ["point"], "clicks": 1}
    both = {"foundation": [str(Sfr.foundation), str(SemiSam.foundation)], **loose}
    train(config_of(data, semisam=both, iterations=2), tmp_path / "both")
    train(config_of(data, semisam={"foundation": str(SemiSam.foundation), **loose}, iterations=2), tmp_path / "one")
    assert set(calls) == {view}
    assert not same(tmp_path / "both", tmp_path / "one")
    first = next(entry for entry in lines(tmp_path / "both") if entry["stage"] == "train")
    mean = (first["agreement_1/semisam"] + first["agreement_2/semisam"]) / 2
    assert first["agreement/semisam"] == pytest.approx(mean)


def test_a_view_that_no_model_has_is_said(data: Path, tmp_path: Path) -> None:
    result = train(config_of(data, semisam={"view": "slices"}, iterations=1), tmp_path / "run")
    assert any("terms.semisam.view changes nothing" in text for text in result.warnings)


def test_several_classes_and_channels(tmp_path: Path) -> None:
    folder = tiny_dataset(tmp_path / "data", classes=4, channels=2)
    options = {"channel": 1, "agreement": [0.0, 0.0], "proof": [0.0, 0.0]}
    config = config_of(folder, "sfr+semisam", semisam=options, terms={"sfr": {"tune_iterations": 1}}, iterations=2)
    train(config, tmp_path / "run")
    assert max(asked(tmp_path / "run")) > 0


def test_a_model_that_cannot_be_prompted_is_refused_in_one_message(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be prompted; name one that can"):
        train(config_of(data, foundation=str(Sfr.foundation)), tmp_path / "run")
