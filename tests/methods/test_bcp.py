"""Bidirectional copy-paste: its mixtures, its loss, and its pre-training stage in a whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from scarceseg.data.sampling import PatchSampler, Source
from scarceseg.engine import run as run_module
from scarceseg.engine.run import train
from scarceseg.engine.step import forward_step
from scarceseg.errors import Interrupted, RunError
from scarceseg.functional.components import largest_component
from scarceseg.methods import build_terms
from scarceseg.methods.bcp import Bcp, CopyPaste, cuboid
from scarceseg.networks.ema import EmaTeacher
from scarceseg.types import Labelled, Unlabelled
from tests.reference import consistency as oracle
from tests.tiny import tiny_config, tiny_dataset

SHAPE = (6, 5, 7)


class Given(nn.Module):
    """Returns the same logits whatever it is asked."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits


class Remembering(nn.Module):
    """A student with random logits, which remembers its input."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.x = x
        g = torch.Generator().manual_seed(2)
        return torch.randn(len(x), self.classes, *x.shape[2:], generator=g)


def rows(labelled: int, unlabelled: int, classes: int) -> tuple[Labelled, Unlabelled]:
    """Every voxel of an image has a number of its own."""
    count = labelled + unlabelled
    image = torch.arange(count * 2 * np.prod(SHAPE), dtype=torch.float32).view(count, 2, *SHAPE)
    label = torch.randint(0, classes, (labelled, *SHAPE), generator=torch.Generator().manual_seed(1))
    label[:, 0, 0, :2] = 255
    return Labelled(image[:labelled], label, ("a",) * labelled), Unlabelled(image[labelled:], ("u",) * unlabelled)


@pytest.mark.parametrize(("classes", "rows_l", "rows_u"), [(2, 2, 2), (3, 1, 1), (4, 1, 3), (2, 3, 2)])
@pytest.mark.parametrize("cleaned", [True, False])
def test_equation(classes: int, rows_l: int, rows_u: int, cleaned: bool) -> None:
    labelled, unlabelled = rows(rows_l, rows_u, classes)
    teacher = torch.randn(rows_u, classes, *SHAPE, generator=torch.Generator().manual_seed(4))
    term = build_terms("bcp", {"bcp": {"largest_component": cleaned, "pseudo_weight": 0.3}}, classes)["bcp"]
    assert isinstance(term, Bcp)
    term.teacher = EmaTeacher(Given(teacher))
    student = Remembering(classes)
    step = forward_step(student, {"bcp": term}, labelled, unlabelled, 0, 10, torch.Generator().manual_seed(6))
    mixed = student.x[rows_l:].numpy()  # nobody wants the output on the unlabelled rows
    count = max(rows_l, rows_u, 2)
    assert len(mixed) == count
    known, reference, pseudo = [], [], []
    guess = teacher.argmax(1).to(torch.uint8).numpy()
    for k in range(count):
        mine, other = labelled.image[k % rows_l].numpy(), unlabelled.image[k % rows_u].numpy()
        from_labelled = (mixed[k] == mine).all(0)
        assert ((mixed[k] == other).all(0) == ~from_labelled).all(), (
            "every voxel is of one of the two, all channels alike"
        )
        box = np.argwhere(~from_labelled if k % 2 == 0 else from_labelled)
        size = box.max(0) - box.min(0) + 1
        assert size.tolist() == [4, 3, 4] and len(box) == size.prod(), "two thirds of each side, rounded down"
        known.append(from_labelled)
        reference.append(labelled.label[k % rows_l].numpy())
        label = guess[k % rows_u]
        pseudo.append((largest_component(label) if cleaned else label).astype(np.int64))
    expected = oracle.bcp(step.extra["bcp"].numpy(), np.stack(reference), np.stack(pseudo), np.stack(known), 0.3)
    assert float(term.loss(step)) == pytest.approx(expected, rel=1e-5)


def test_the_cuboid_lies_anywhere_and_fits() -> None:
    g = torch.Generator().manual_seed(0)
    corners = set()
    for _ in range(200):
        box = cuboid((6, 3, 1), 2 / 3, g).nonzero()
        assert (box.max(0).values - box.min(0).values + 1).tolist() == [4, 2, 1] and len(box) == 8
        corners.add(tuple(box.min(0).values.tolist()))
    assert corners == {(x, y, 0) for x in range(3) for y in range(2)}


def test_mixtures_of_another_step_are_never_used() -> None:
    labelled, unlabelled = rows(1, 2, 2)
    term = build_terms("bcp", {}, 2)["bcp"]
    term.attach(Given(torch.zeros(2, 2, *SHAPE)))
    step = forward_step(Remembering(2), {"bcp": term}, labelled, unlabelled, 0, 10, torch.Generator())
    term.extra_inputs(*rows(1, 2, 2), torch.Generator())
    with pytest.raises(ValueError, match="extra_inputs"):
        term.loss(step)
    assert term.extra_inputs(labelled, None, torch.Generator()) is None


@pytest.mark.parametrize(("cases", "batch"), [(2, 2), (3, 1), (1, 1), (1, 3)])
def test_pretraining_mixes_two_patches(cases: int, batch: int) -> None:
    g = np.random.default_rng(0)
    sources = []
    for i in range(cases):
        image = g.normal(size=(1, 12, 12, 12)).astype(np.float32)
        sources.append(Source(f"c{i}", image, (image[0] > 0).astype(np.uint8)))
    sampler = PatchSampler(sources, [], (8, 8, 8), batch, 0, seed=0, augment="reflections")
    batches = list(CopyPaste(sampler, 2 / 3, seed=1).batches(0, 3))
    assert len(batches) == 3
    again = list(CopyPaste(sampler, 2 / 3, seed=1).batches(2, 3))
    assert torch.equal(again[0][0].image, batches[2][0].image), "a batch depends on its iteration alone"
    for number, (mixed, nothing) in enumerate(batches):
        assert nothing is None and mixed.image.shape == (batch, 1, 8, 8, 8)
        assert torch.equal(mixed.label, (mixed.image[:, 0] > 0).long()), "labels are pasted with the image"
        plain = sampler.batch(number * 2 if batch == 1 else number)[0]
        replaced = (mixed.image != plain.image)[:, 0]
        for row in replaced:
            assert int(row.sum()) == 5**3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("data"), classes=3)


def pretrained(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "stages" / "bcp-pretrain" / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_stopped_in_the_stage_and_resumed_is_bit_for_bit_the_same(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With one labelled volume, two patches of it are mixed.
    config = tiny_config(data, method="bcp", labeled=1, iterations=3, terms={"bcp": {"pretrain_iterations": 4}})
    train(config, tmp_path / "whole")
    original = run_module.Loop.__init__

    def stop_after_two(self: run_module.Loop, task: run_module.LoopTask, *rest: Any) -> None:
        count = iter(range(100))
        original(self, task, *rest[:2], lambda: next(count) == 1)

    monkeypatch.setattr(run_module.Loop, "__init__", stop_after_two)
    with pytest.raises(Interrupted, match="after iteration 2 of 4"):
        train(config, tmp_path / "cut")
    assert (tmp_path / "cut" / "checkpoints" / "bcp-pretrain.pt").exists()
    assert not (tmp_path / "cut" / "stages" / "bcp-pretrain" / "done").exists()
    monkeypatch.setattr(run_module.Loop, "__init__", original)
    train(config, tmp_path / "cut", resume=True)
    assert equal(pretrained(tmp_path / "whole"), pretrained(tmp_path / "cut"))
    final = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut")]
    assert equal(*final)
    assert not equal(final[0], pretrained(tmp_path / "whole"))
    assert not (tmp_path / "cut" / "checkpoints" / "bcp-pretrain.pt").exists()


def test_the_student_starts_from_the_pretrained_weights(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[dict[str, torch.Tensor]] = []
    attach = Bcp.attach

    def seen(self: Bcp, student: nn.Module) -> None:
        attach(self, student)
        starts.append({k: v.clone() for k, v in student.state_dict().items()})
        starts.append({k: v.clone() for k, v in self.teacher.network.state_dict().items()})

    monkeypatch.setattr(Bcp, "attach", seen)
    # A run without the supervised term: its weight of 0 must not silence the pre-training.
    config = tiny_config(data, method="bcp", iterations=15, terms={"supervised": {"weight": 0.0}})
    train(config, tmp_path / "run")
    kept = pretrained(tmp_path / "run")
    assert equal(kept, starts[0]) and equal(kept, starts[1])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    stage = [line for line in lines if line["stage"] == "bcp-pretrain"]
    assert len(stage) == 2, "2000 of 15000 iterations"
    assert all(line["loss"] == line["loss/supervised"] > 0 for line in stage)
    (tmp_path / "run" / "stages" / "bcp-pretrain" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(RunError, match="pre-trained weights.*--resume"):
        train(config, tmp_path / "run", resume=True)


def test_the_stage_can_be_left_out() -> None:
    assert build_terms("bcp", {}, 2)["bcp"].stages() == ["pretrain"]
    assert build_terms("bcp", {"bcp": {"pretrain_iterations": 0}}, 2)["bcp"].stages() == []
