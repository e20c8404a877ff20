"""A tuned model taken over from another run: the same student, no second tuning, and no way around hidden labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scarceseg.engine.run import train
from scarceseg.errors import ConfigError, RunError
from scarceseg.foundation.base import Tunable
from scarceseg.methods.fine_tuning import TunedTeacher
from scarceseg.methods.tuned_in import tuning_settings
from tests.engine.test_run import same
from tests.tiny import tiny_config, tiny_dataset

pytestmark = pytest.mark.usefixtures("small_foundation")

TUNING = {"tune_iterations": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def first(data: Path, tmp_path: Path) -> Path:
    train(tiny_config(data, method="mean-teacher+sfr", terms={"sfr": TUNING}), tmp_path / "first")
    return tmp_path / "first"


def no_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: TunedTeacher, folder: Path, stage: str, *_: Any, **__: Any) -> None:
        assert "round" in stage, "tuned again"

    monkeypatch.setattr(TunedTeacher, "tune", refuse)


def test_the_same_student_without_a_second_tuning(
    data: Path, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_tuning(monkeypatch)
    terms = {"sfr": TUNING | {"tuned_in": str(first)}}
    train(tiny_config(data, method="mean-teacher+sfr", terms=terms), tmp_path / "second")
    assert same(first, tmp_path / "second")
    table = json.loads((tmp_path / "second" / "stages" / "sfr-label" / "confidence.json").read_text())
    assert table["tuned_in"] == str(first)


@pytest.mark.parametrize("method", ["cps+sfr", "sfr+"])
def test_other_terms_and_lengths_may_take_it(
    data: Path, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    no_tuning(monkeypatch)
    term = "sfr+" if method == "sfr+" else "sfr"
    terms = {term: TUNING | {"tuned_in": str(first)} | ({"threshold": 1.0} if term == "sfr+" else {})}
    train(tiny_config(data, method=method, terms=terms, iterations=2, seed=5), tmp_path / "second")
    theirs, ours = (
        run / "stages" / f"{name}-tune" / "tuned-axis2.safetensors"
        for run, name in ((first, "sfr"), (tmp_path / "second", term))
    )
    assert theirs.read_bytes() == ours.read_bytes()


@pytest.mark.parametrize(
    ("settings", "options", "words"),
    [
        ({"labeled": 1}, {}, "labelled volumes"),
        ({"labeled": ["case_01", "case_03"]}, {}, "labelled volumes"),
        ({"plan": {"patch": [16, 16, 16], "spacing_mm": 3.0}}, {}, "spacing_mm"),
        ({"method": "copy+sfr"}, {"learn_from": "copy"}, "learn_from"),
        ({}, {"rank": 2}, "rank"),
        ({}, {"tune_iterations": 7}, "tune_iterations"),
    ],
)
def test_a_model_tuned_otherwise_is_refused(
    data: Path, first: Path, tmp_path: Path, settings: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    terms = {"sfr": TUNING | {"tuned_in": str(first)} | options}
    with pytest.raises(ConfigError, match=f"tuned with {words}"):
        train(tiny_config(data, **{"method": "mean-teacher+sfr", "terms": terms} | settings), tmp_path / "second")
    assert not (tmp_path / "second" / "model.safetensors").exists()


def test_settings_left_open_are_those_that_are_then_taken(data: Path, tmp_path: Path) -> None:
    """What another run wrote out may be left to its default here, and the other way round."""
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("open", {"view": "volume", "tune_lr": 0.004}, {"rank": 16}),
        ("learnt", {"learn_from": "atlas"}, {"learn_from": "atlas"}),
    ]
    for name, then, now in cases:
        method = "atlas+sfr" if name == "learnt" else "sfr"
        atlas = {"registration": "affine", "workers": 1}
        written = (
            [{"atlas": atlas}, {"atlas": atlas | {"workers": 2, "fusion": "joint"}}] if name == "learnt" else [{}, {}]
        )
        first, second = (
            tiny_config(data, method=method, terms={"sfr": TUNING | options} | others, iterations=1)
            for options, others in zip((then, now), written, strict=True)
        )
        train(first, tmp_path / name, cache=tmp_path / "cache")
        second.terms["sfr"]["tuned_in"] = str(tmp_path / name)
        train(second, tmp_path / f"{name}-again", cache=tmp_path / "cache")


@pytest.mark.parametrize(("written", "iterations", "alike"), [(300, 6, True), (6, 6, False), (299, 6, False)])
def test_steps_left_open_are_300_on_whole_volumes(data: Path, written: int, iterations: int, alike: bool) -> None:
    class Whole(Tunable):
        sees = "volume"

        def tunable(self, *_: Any) -> Any: ...

    left, set_ = (
        tuning_settings(tiny_config(data, method="sfr", iterations=iterations, terms={"sfr": options}), "sfr", Whole())
        for options in ({}, {"tune_iterations": written})
    )
    assert (left == set_) is alike


def test_patches_of_the_tuning_may_have_an_augmentation_of_their_own(data: Path, tmp_path: Path) -> None:
    tuned = {}
    for words in (None, "deform", "none"):  # twice the student's, and another
        options = TUNING | {"foundation": "tiny-sam3d", "view": "patch", "patch_augment": words}
        config = tiny_config(data, method="sfr", terms={"sfr": options}, iterations=1)
        train(config, tmp_path / str(words))
        tuned[words] = (tmp_path / str(words) / "stages" / "sfr-tune" / "tuned-axis2.safetensors").read_bytes()
    assert tuned[None] == tuned["deform"] != tuned["none"]
    other = {"sfr": options | {"tuned_in": str(tmp_path / "None")}}
    with pytest.raises(ConfigError, match="tuned with augment of the patches"):
        train(config.model_copy(update={"terms": other}), tmp_path / "other")


def test_a_model_that_learnt_from_guesses_is_refused_for_another_pool(data: Path, tmp_path: Path) -> None:
    tuning = TUNING | {"learn_from": "copy"}
    config = tiny_config(data, method="copy+sfr", terms={"sfr": tuning}, iterations=1)
    train(config, tmp_path / "first")
    terms = {"sfr": tuning | {"tuned_in": str(tmp_path / "first")}}
    train(config.model_copy(update={"terms": terms}), tmp_path / "same")
    with pytest.raises(ConfigError, match="tuned with unlabelled volumes"):
        train(config.model_copy(update={"terms": terms, "val": ["case_04"]}), tmp_path / "held_out")


def test_a_run_without_a_tuned_model_is_refused(data: Path, tmp_path: Path) -> None:
    train(tiny_config(data, iterations=1), tmp_path / "plain")
    for run, words in ((tmp_path / "plain", "tunes no foundation model"), (tmp_path / "none", "cannot read")):
        terms = {"sfr": TUNING | {"tuned_in": str(run)}}
        with pytest.raises((RunError, ConfigError), match=words):
            train(tiny_config(data, method="sfr", terms=terms), tmp_path / f"after_{run.name}")
