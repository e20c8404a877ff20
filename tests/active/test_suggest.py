"""Suggestions of a run: blind to hidden labels, cheap to repeat, kept beside the run and shown in its report."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import scarceseg
from scarceseg.active import suggest as module
from scarceseg.active.measure import Measurer, other_teachers
from scarceseg.config import Config
from scarceseg.engine.run import train
from scarceseg.errors import ConfigError, DataError, RunError
from scarceseg.inference.predictor import Predictor
from scarceseg.report import build_report
from scarceseg.report.suggestion_files import FOLDER, RESULT, model_hash
from tests.cli.test_commands import scarceseg as command
from tests.report.fake_run import figure, make_run
from tests.report.test_build import NASTY, Page, assert_self_contained
from tests.tiny import tiny_config, tiny_dataset

SMALL: dict[str, Any] = {"network": {"name": "vnet", "args": {"n_filters": 2}}, "optim": {"lr": 0.1}, "iterations": 20}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("data"), cases=6)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two labelled and four unlabelled cases; `copy` is the other teacher. Case 5 is a copy of case 4."""
    for at in data.glob("*/case_04*"):
        shutil.copy(at, at.with_name(at.name.replace("case_04", "case_05")))
    run = tmp_path_factory.mktemp("runs") / "run"
    train(tiny_config(data, method="supervised+copy", **SMALL), run)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page takes most of the time of a small run."""
    monkeypatch.setattr(module, "build_report", lambda run: run / "report.html")


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every prediction of a volume."""
    calls: list[int] = []
    original = Predictor.predict_prepared

    def predict(self: Predictor, *arguments: Any) -> Any:
        calls.append(1)
        return original(self, *arguments)

    monkeypatch.setattr(Predictor, "predict_prepared", predict)
    return calls


def test_a_run_is_ranked_and_twins_are_not_suggested_together(run: Path, no_report: None) -> None:
    result = scarceseg.suggest(run, 2, device="cpu")
    assert sorted(one.case for one in result.ranking) == [f"case_{i:02d}" for i in range(2, 6)]
    numbers = [(one.uncertainty, one.disagreement, one.distance) for one in result.ranking]
    assert len(set(numbers)) == 3, "the run is too simple to tell volumes apart"
    assert {one.case for one in result.suggestions} != {"case_04", "case_05"}
    twin = min(result.ranking, key=lambda one: one.score)
    assert twin.case == "case_05" and twin.score == 0
    assert result.teachers == ("copy",) and result.features == "encoder" and result.weights == model_hash(run)
    saved = json.loads((run / RESULT).read_text())
    assert saved == json.loads(json.dumps(result.to_json())) and len(saved["ranking"]) == 4
    with np.load(run / FOLDER / f"{result.suggestions[0].case}.npz") as kept:
        assert kept["prediction"].shape == kept["image"].shape == kept["uncertainty"].shape


def test_garbage_in_hidden_labels_changes_nothing(run: Path, data: Path, tmp_path: Path, no_report: None) -> None:
    before = scarceseg.suggest(run, 4, device="cpu")
    other = shutil.copytree(data, tmp_path / "data")
    for number in range(2, 6):
        (other / "labelsTr" / f"case_{number:02d}.nii.gz").write_bytes(b"garbage")
    config = Config.load(run / "config.yaml").model_copy(update={"dataset": str(other)})
    (run / "config.yaml").write_text(config.dump())
    shutil.rmtree(run / FOLDER)
    assert scarceseg.suggest(run, 4, device="cpu") == before


def test_what_was_measured_is_not_predicted_again(run: Path, no_report: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    first = scarceseg.suggest(run, 1, device="cpu")
    assert len(calls) == 7  # two labelled, four unlabelled, and one once more for its picture
    assert scarceseg.suggest(run, 1, device="cpu") == first and len(calls) == 7
    assert scarceseg.suggest(run, 2, device="cpu").ranking == first.ranking and len(calls) == 8
    (run / FOLDER / "case_03.npy").write_bytes(b"damaged")
    assert scarceseg.suggest(run, 2, device="cpu").ranking == first.ranking and len(calls) == 9
    description = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps(description | {"training": {"changed": True}}))
    scarceseg.suggest(run, 1, device="cpu")
    assert len(calls) == 9 + 7


def test_a_stopped_call_goes_on(run: Path, no_report: None, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Measurer.measure

    def measure(self: Measurer, case: Any, *rest: Any) -> Any:
        if case.name == "case_03":
            raise KeyboardInterrupt
        return original(self, case, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Measurer, "measure", measure)
        module.suggest(run, 1, device="cpu")
    assert not (run / RESULT).exists()
    calls = counted(monkeypatch)
    module.suggest(run, 1, device="cpu")
    assert len(calls) == 3 + 1


def test_the_report_shows_them_and_forgets_those_of_other_weights(run: Path) -> None:
    result = scarceseg.suggest(run, 2, device="cpu")
    page = Page(run / "report.html")
    assert_self_contained(page)
    assert "Label next" in page.headings
    for one in result.ranking:
        assert one.case in page.text and (one.why in page.text) == (one in result.suggestions)
    assert "The other 2 unlabelled volumes" in page.text
    (run / "model.json").write_text((run / "model.json").read_text() + "\n")
    page = Page(build_report(run))
    assert "Label next" not in page.headings and "belongs to other weights" in page.text


def test_names_in_the_report_are_escaped_and_damage_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "model.json").write_text("{}")
    row = {"case": NASTY, "score": 0.5, "uncertainty": 0.1, "disagreement": None, "distance": 1.0, "why": NASTY}
    values = {"weights": model_hash(run), "count": 1, "notes": [NASTY], "ranking": [row, row]}
    (run / RESULT).write_text(json.dumps(values))
    page = Page(build_report(run))
    assert_self_contained(page)
    assert page.tags.count("script") == 1 and page.text.count("<script>alert(1)</script>") >= 4
    assert "Label next" in page.headings and "could not be read" in page.text  # there is no picture of such a name
    shutil.rmtree(run / "figures")
    for bad in ("[1]", "{", json.dumps(values | {"ranking": [1]}), json.dumps({"weights": model_hash(run)})):
        (run / RESULT).write_text(bad)
        page = Page(build_report(run))
        assert "Label next" not in page.headings and f"{RESULT} could not be read" in page.text


def test_a_picture_has_its_uncertainty_shown(tmp_path: Path) -> None:
    from scarceseg.data.phantoms import PhantomConfig

    run = make_run(tmp_path / "run")
    (run / "model.json").write_text("{}")
    row = {"case": "phantom_005", "score": 0.5, "uncertainty": 0.1, "disagreement": 0.2, "distance": 1.0, "why": "so"}
    (run / RESULT).write_text(
        json.dumps({"weights": model_hash(run), "count": 1, "notes": [], "ranking": [row]}), encoding="utf-8"
    )
    figure(run / FOLDER / "phantom_005.npz", "phantom_005", 5, PhantomConfig(shape=(14, 13, 12)), reference=False)
    source = build_report(run).read_text(encoding="ascii")
    section = source[source.index("<h2>Label next</h2>") :]
    assert re.search(r'value="uncertainty" checked>', section[: section.index("</section>")])
    assert "phantom_005" in section and "0.200" in section


def test_a_network_without_encoder_features(data: Path, tmp_path: Path, no_report: None) -> None:
    network = {"name": "UNet", "args": {"channels": [2, 4], "strides": [2], "num_res_units": 0}}
    train(tiny_config(data, method="supervised", network=network, iterations=2), tmp_path / "run")
    result = scarceseg.suggest(tmp_path / "run", 1, device="cpu")
    assert result.features == "statistics" and result.teachers == ()
    assert all(one.disagreement is None and np.isfinite(one.distance) for one in result.ranking)
    assert any(one.distance > 0 for one in result.ranking)


def test_the_newest_guesses_of_each_teacher_count(tmp_path: Path) -> None:
    for stage in ("sfr+-label", "sfr+-round1", "sfr+-round10", "sfr+-round2", "sfr+-tune", "self-training-label1"):
        (tmp_path / "stages" / stage).mkdir(parents=True)
        if stage != "sfr+-tune":
            (tmp_path / "stages" / stage / "confidence.json").write_text("{}")
    found = other_teachers(tmp_path, Config(method="mean-teacher+sfr++self-training+copy"), 2)
    assert {name: labels.folder.name for name, labels in found.items()} == {
        "sfr+": "sfr+-round10",
        "self-training": "self-training-label1",
    }


def test_what_cannot_be_asked(run: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="starts at 1, got 0"):
        scarceseg.suggest(run, 0)
    with pytest.raises(RunError, match="there is no run folder"):
        scarceseg.suggest(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"expected a config\.yaml"):
        scarceseg.suggest(tmp_path / "empty")
    split = json.loads((run / "split.json").read_text())
    (run / "split.json").write_text(json.dumps(split | {"unlabelled": []}))
    with pytest.raises(RunError, match="every training case"):
        scarceseg.suggest(run)
    (run / "split.json").write_text(json.dumps(split))
    config = Config.load(run / "config.yaml")
    (run / "config.yaml").write_text(config.model_copy(update={"dataset": str(tmp_path / "gone")}).dump())
    with pytest.raises(DataError, match="gone"):
        scarceseg.suggest(run)


def test_the_command_as_a_user_types_it(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["suggest", run, "-n", 2, "--json", tmp_path / "next.json", "--device", "cpu"]
    status, out, err = command(*words, capsys=capsys)
    assert status == 0, err
    saved = json.loads((tmp_path / "next.json").read_text())
    assert saved == json.loads((run / RESULT).read_text())
    first, second, third = (one["case"] for one in saved["ranking"][:3])
    assert first in out and second in out and f"\n{third} " not in out and "report.html" in out
    status, out, _ = command("suggest", run, "--count", 9, "--device", "cpu", capsys=capsys)
    assert status == 0 and "9 were asked for, but only 4" in " ".join(out.split())


def test_refusals_are_one_message_and_status_2(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(run / "config.yaml", unfinished)
    (tmp_path / "empty").mkdir()
    labelled = Path(shutil.copytree(run, tmp_path / "all"))
    split = json.loads((run / "split.json").read_text())
    (labelled / "split.json").write_text(json.dumps(split | {"unlabelled": []}))
    for words, expected in (
        ([tmp_path / "nowhere"], "there is no run folder"),
        ([tmp_path / "empty"], "no run folder"),
        ([unfinished], "has not finished, resume it"),
        ([labelled], "nothing to suggest"),
        ([run, "-n", 0], "starts at 1, got 0"),
        ([run, "-n", -2], "starts at 1, got -2"),
    ):
        status, out, err = command("suggest", *words, capsys=capsys)
        assert (status, out) == (2, "") and err.startswith("error:") and len(err.splitlines()) == 1, (words, err)
        assert expected in err, (words, err)
        assert not (run / RESULT).exists()
