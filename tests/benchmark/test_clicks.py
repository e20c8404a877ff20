"""`scarceseg benchmark clicks`, with a model that paints exactly what it is told."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from scarceseg import cli
from scarceseg.benchmark.clicks import benchmark_clicks
from scarceseg.errors import ConfigError, DataError
from scarceseg.foundation import FOUNDATIONS, Embedding, Masks, Promptable, Tunable, TunedModel, Tuning
from scarceseg.foundation.base import PromptKind, Spacing, check_prompts
from scarceseg.types import Prompt
from tests.tiny import tiny_dataset

SOURCE = Path(cli.__file__).parent


class Painter(Promptable):
    """A ball in millimetres around each click inside, minus one around each click outside, in the order of the clicks."""

    name = "painter"
    prompt_kinds: frozenset[PromptKind] = frozenset({"point"})

    def __init__(self, radius_mm: float = 3.5) -> None:
        self.radius_mm = radius_mm
        self.embedded: list[tuple[tuple[int, ...], Spacing]] = []
        self.asked: list[tuple[int, bool]] = []

    def embed(self, image: torch.Tensor, spacing_mm: Spacing) -> Embedding:
        self.embedded.append((tuple(image.shape), spacing_mm))
        assert image.dtype == torch.float32 and not image.requires_grad
        return Embedding({"image": image}, tuple(image.shape[2:]), spacing_mm)  # type: ignore[arg-type]

    def segment(self, embedding: Embedding, prompts: Sequence[Prompt], previous: Masks | None = None) -> Masks:
        check_prompts(self, embedding, prompts)
        axes = torch.meshgrid(*(torch.arange(n) * mm for n, mm in zip(embedding.size, embedding.frame, strict=True)),
                              indexing="ij")  # fmt: skip
        points, labels = prompts[0].points_voxel, prompts[0].point_labels
        assert points is not None and labels is not None
        self.asked.append((len(points), previous is not None))
        mask = torch.zeros(embedding.size)
        for point, label in zip(points * torch.tensor(embedding.frame), labels, strict=True):
            squares = sum((a - p) ** 2 for a, p in zip(axes, point, strict=True))
            mask[squares <= self.radius_mm**2] = float(label)
        return Masks(20 * mask[None] - 10, torch.tensor([0.75]), {"mask": mask[None]})

    def to(self, device: torch.device) -> Painter:
        return self


class OnlyTuned(Tunable):
    """A model that takes no prompts."""

    name = "only-tuned"

    def tunable(self, channels: int, classes: int, tuning: Tuning, size: tuple[int, int, int]) -> TunedModel:
        raise NotImplementedError


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> Painter:
    FOUNDATIONS.names()
    model = Painter()
    monkeypatch.setitem(FOUNDATIONS._parts, "painter", lambda: model)
    monkeypatch.setitem(FOUNDATIONS._parts, "only-tuned", OnlyTuned)
    return model


def typed(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(["benchmark", "clicks", *[str(a) for a in arguments]])
    captured = capsys.readouterr()
    assert stop.value.code is None or isinstance(stop.value.code, int)
    return stop.value.code or 0, captured.out, captured.err


def test_scores_rise_with_the_clicks(painter: Painter, tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path, cases=3)
    result = benchmark_clicks(data, "painter", (10, 1, 2, 5, 2))
    assert result.clicks == (1, 2, 5, 10)
    means = list(result.mean().values())
    assert means == sorted(means) and means[-1] > means[0] + 0.2
    assert [t.case for t in result.targets] == ["case_00", "case_01", "case_02"]
    for target in result.targets:
        assert target.label == "box1" and set(target.dice) == set(target.quality) == {1, 2, 5, 10}
        assert all(0 < value <= 1 for value in target.dice.values()) and target.quality[1] == 0.75
        assert target.seconds_embed >= 0 and target.seconds_click > 0
    # One embedding a case; the clicks accumulate, and every round but the first sees the last answer.
    assert len(painter.embedded) == 3
    assert painter.asked == [(n, n > 1) for n in range(1, 11)] * 3


def test_the_first_click_lies_in_the_middle_of_the_target(painter: Painter, tmp_path: Path) -> None:
    """Dice after one click, by hand: the ball around the deepest voxel against the box."""
    data = tiny_dataset(tmp_path, cases=1, size=(15, 15, 15), spacing=(1.0, 1.0, 1.0))
    found = benchmark_clicks(data, "painter", (1,)).targets[0].dice[1]
    box = sitk.GetArrayFromImage(sitk.ReadImage(str(data / "labelsTr" / "case_00.nii.gz"))) > 0
    inside = np.argwhere(box)
    low, high = inside.min(0), inside.max(0)
    assert (high - low + 1).tolist() == [6, 6, 6]
    scores = []
    for corner in np.ndindex(2, 2, 2):  # the box has eight middle voxels, equally deep
        middle = low + 2 + np.array(corner)
        ball = ((np.indices(box.shape) - middle[:, None, None, None]) ** 2).sum(0) <= 3.5**2
        scores.append(2 * (ball & box).sum() / (ball.sum() + box.sum()))
    assert min(abs(found - score) for score in scores) < 1e-6


def test_a_perfect_mask_gets_no_further_click(painter: Painter, tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path, cases=1, size=(11, 11, 11), spacing=(1.0, 1.0, 1.0))
    label = np.zeros((11, 11, 11), np.uint8)
    label[5, 5, 5] = 1
    sitk.WriteImage(sitk.GetImageFromArray(label), str(data / "labelsTr" / "case_00.nii.gz"))
    painter.radius_mm = 0.5
    target = benchmark_clicks(data, "painter", (1, 3)).targets[0]
    assert target.dice == {1: 1.0, 3: 1.0} and painter.asked == [(1, False)]


def test_every_class_is_a_target_and_absent_ones_are_none(painter: Painter, tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path, cases=2, classes=4, channels=2)
    path = data / "labelsTr" / "case_00.nii.gz"
    image = sitk.ReadImage(str(path))
    array = sitk.GetArrayFromImage(image)
    array[array == 2] = 0
    changed = sitk.GetImageFromArray(array)
    changed.CopyInformation(image)
    sitk.WriteImage(changed, str(path))
    result = benchmark_clicks(data, "painter", (1,))
    present = {(t.case, t.label) for t in result.targets}
    assert ("case_00", "box2") not in present and {("case_00", "box3"), ("case_01", "box3")} <= present
    assert painter.embedded[0][0][:2] == (1, 2), "all channels are shown"


def test_only_labels_of_labelled_cases_that_were_chosen_are_opened(
    painter: Painter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny_dataset(tmp_path, cases=5, labelled=4)
    read: list[str] = []
    from scarceseg.benchmark import clicks as module

    original = module.read_label
    monkeypatch.setattr(module, "read_label", lambda path, *rest: (read.append(path.name), original(path, *rest))[1])
    (data / "labelsTr" / "case_02.nii.gz").write_bytes(b"unreadable")
    result = benchmark_clicks(data, "painter", (1,), cases=["case_0[01]", "case_03", "case_04"])
    assert [t.case for t in result.targets] == ["case_00", "case_01", "case_03"]
    assert read == ["case_00.nii.gz", "case_01.nii.gz", "case_03.nii.gz"]
    with pytest.raises(DataError, match="no labelled case that matches case_04"):
        benchmark_clicks(data, "painter", (1,), cases=["case_04"])


def test_the_model_is_told_the_spacing_of_what_it_sees(painter: Painter, tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path, cases=1, size=(21, 19, 9), spacing=(0.8, 1.0, 3.0))
    own = benchmark_clicks(data, "painter", (1, 5)).targets[0]
    coarse = benchmark_clicks(data, "painter", (1, 5), spacing_mm=(1.5, 1.5, 1.5)).targets[0]
    assert painter.embedded[0] == ((1, 1, 21, 19, 9), pytest.approx((0.8, 1.0, 3.0)))
    assert painter.embedded[1] == ((1, 1, 11, 13, 18), pytest.approx((1.5, 1.5, 1.5)))
    assert own.dice[5] > 0.4 and coarse.dice[5] > 0.4


def test_the_seed_decides_the_clicks(painter: Painter, tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path, cases=2)
    scores = [
        [t.dice for t in benchmark_clicks(data, "painter", (3,), style="ritm", seed=s).targets] for s in (1, 1, 2)
    ]
    assert scores[0] == scores[1] != scores[2]
    # A case gets the same clicks whatever the other styles did before it: chance starts anew in each case.
    largest = [benchmark_clicks(data, "painter", (3,), seed=s).mean() for s in (1, 2)]
    assert largest[0] == largest[1]


def test_command_prints_and_writes(painter: Painter, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, file = tiny_dataset(tmp_path / "data", cases=3, labelled=2), tmp_path / "deep" / "scores.json"
    status, out, err = typed(
        data, "--foundation", "painter", "--clicks", "1,3", "--json", file, "--device", "cpu", capsys=capsys
    )
    assert status == 0, err
    assert "painter on tiny" in out and "case_00" in out and "mean of 2" in out and "case_02" not in out
    content = json.loads(file.read_text(encoding="utf-8"))
    keys = {"dataset", "foundation", "clicks", "style", "seed", "spacing_mm", "device", "targets", "mean"}
    assert keys | {"seconds_embed", "seconds_click"} <= content.keys()
    assert content["dataset"] == "tiny" and content["foundation"] == "painter" and content["clicks"] == [1, 3]
    assert content["style"] == "largest" and content["spacing_mm"] is None and content["device"] == "cpu"
    assert [t["case"] for t in content["targets"]] == ["case_00", "case_01"]
    assert all(
        set(t) == {"case", "label", "dice", "quality", "seconds_embed", "seconds_click"} for t in content["targets"]
    )
    for count in ("1", "3"):
        by_hand = sum(t["dice"][count] for t in content["targets"]) / 2
        assert content["mean"][count] == pytest.approx(by_hand)
        assert f"{100 * by_hand:.1f}" in out
    status, _, err = typed(
        data, "--foundation", "painter", "--clicks", "1", "--cases", "case_01", "--spacing", "2", "--style", "random",
        "--seed", "3", "--json", file, capsys=capsys,
    )  # fmt: skip
    assert status == 0, err
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["spacing_mm"] == [2, 2, 2] and content["style"] == "random" and content["seed"] == 3
    assert [t["case"] for t in content["targets"]] == ["case_01"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--style": "deepest"}, "--style: expected ritm, random, largest"),
        ({"--clicks": "1,two"}, "--clicks: expected whole numbers"),
        ({"--clicks": ""}, "--clicks: expected whole numbers"),
        ({"--clicks": "0,1"}, "clicks: expected numbers from 1"),
        ({"--clicks": "-3"}, "clicks: expected numbers from 1"),
        ({"--cases": "liver_*"}, "no labelled case that matches liver_*"),
        ({"--spacing": "0"}, "--spacing: expected millimetres above 0"),
        ({"--spacing": "1,1,-2"}, "--spacing: expected millimetres above 0"),
        ({"--spacing": "nan"}, "--spacing: expected millimetres above 0"),
        ({"--spacing": "inf"}, "--spacing: expected millimetres above 0"),
        ({"--spacing": "1,2"}, "--spacing: expected one number or X,Y,Z"),
        ({"--foundation": "pianter"}, "did you mean 'painter'"),
        ({"--foundation": "only-tuned"}, "cannot be prompted with points"),
        ({"--device": "abacus"}, "device"),
    ],
)
def test_bad_input_gives_one_clear_message(
    painter: Painter, changes: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny_dataset(tmp_path, cases=1)
    flags = {"--foundation": "painter", "--clicks": "1"} | changes
    status, _, err = typed(data, *[f"{flag}={value}" for flag, value in flags.items()], capsys=capsys)
    assert status == 2 and message in err.replace("\n", " "), err
    assert err.startswith("error: ") and len(err.strip().splitlines()) == 1


def test_bad_data_gives_one_clear_message(painter: Painter, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--foundation", "painter", "--clicks", "1")
    status, _, err = typed(tmp_path / "nowhere", *flags, capsys=capsys)
    assert status == 2 and err.startswith("error: ") and len(err.strip().splitlines()) == 1
    data = tiny_dataset(tmp_path / "empty", cases=1, classes=2)
    image = sitk.ReadImage(str(data / "labelsTr" / "case_00.nii.gz"))
    sitk.WriteImage(image * 0, str(data / "labelsTr" / "case_00.nii.gz"))
    status, _, err = typed(data, *flags, capsys=capsys)
    assert status == 2 and "are all empty" in err
    data = tiny_dataset(tmp_path / "damaged", cases=1)
    (data / "labelsTr" / "case_00.nii.gz").write_bytes(b"nothing")
    status, _, err = typed(data, *flags, capsys=capsys)
    assert status == 2 and "case_00" in err and err.startswith("error: ")


def test_a_damaged_case_costs_only_itself(painter: Painter, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tiny_dataset(tmp_path, cases=3)
    broken = sorted((data / "labelsTr").iterdir())[1]
    broken.write_bytes(b"not a volume")
    scores = tmp_path / "scores.json"
    status, out, err = typed(data, "--foundation", "painter", "--clicks", "1", "--json", scores, capsys=capsys)
    assert status == 2 and broken.name in err
    kept = json.loads(scores.read_text(encoding="utf-8"))
    assert len({t["case"] for t in kept["targets"]}) == 2 and len(kept["failed"]) == 1
    assert "mean of" in out


def test_called_from_python(painter: Painter, tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path, cases=1)
    with pytest.raises(ConfigError, match="expected numbers from 1"):
        benchmark_clicks(data, "painter", ())
    with pytest.raises(ConfigError, match="style of clicks"):
        benchmark_clicks(data, "painter", (1,), style="deepest")  # type: ignore[arg-type]
    with torch.enable_grad():
        assert not torch.is_inference_mode_enabled() and benchmark_clicks(data, "painter", (1,)).targets
        assert torch.is_grad_enabled()


def test_nothing_else_can_reach_the_click_simulator_of_the_evaluation() -> None:
    """It looks at reference labels: training code must not be able to import it."""
    found = set()
    for path in SOURCE.rglob("*.py"):
        package = ["scarceseg", *path.relative_to(SOURCE).parts[:-1]]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                module = ".".join([*base, node.module] if node.module else base)
                names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("scarceseg."):
                names = [node.value]  # importlib, or an entry point
            if any(name == "scarceseg.benchmark" or name.startswith("scarceseg.benchmark.") for name in names):
                found.add(path.relative_to(SOURCE).as_posix())
    outside = {path for path in found if not path.startswith("benchmark/")}
    assert outside == {"cli.py"}
