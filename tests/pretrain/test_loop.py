"""The pre-training loop: exact resume, averaged weights, stopping, and a clear end when the loss breaks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from scarceseg.errors import Interrupted, RunError
from scarceseg.pretrain.loop import Pretraining, Schedule

SCHEDULE = Schedule(6, lr=0.05, warmup=2, seed=4)


class Toy:
    """A regression whose data come from the generator and whose dropout comes from PyTorch's."""

    def __init__(self, seed: int = 0, hook: Callable[[int], float] | None = None) -> None:
        torch.manual_seed(seed)
        self.network = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.hook, self.calls = hook, 0
        self.done: list[float] = []
        self.drawn: list[tuple[float, float]] = []

    def loss(self, rng: np.random.Generator, done: float) -> dict[str, torch.Tensor]:
        self.done.append(done)
        self.calls += 1
        x = torch.from_numpy(rng.standard_normal((16, 3), dtype=np.float32))
        self.drawn.append((float(x[0, 0]), float(torch.rand(()))))
        error = (self.network(x)[:, 0] - x.sum(1)).square().mean()
        factor = self.hook(self.calls) if self.hook else 1.0
        return {"loss": factor * error, "extra": error.detach()}


def after(stop: int) -> Callable[[], bool]:
    calls = iter(range(1, 100))
    return lambda: next(calls) >= stop


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def assert_same(one: Pretraining, other: Pretraining) -> None:
    for a, b in ((one.task.network.state_dict(), other.task.network.state_dict()), (one.average, other.average)):
        assert a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())
    first, second = (run.optimizer.state_dict()["state"] for run in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key][name]) for key, part in first.items() for name, value in part.items())


@pytest.fixture
def straight(tmp_path: Path) -> Pretraining:
    run = Pretraining(Toy(), SCHEDULE, tmp_path / "straight")
    run.run(log_every=1)
    return run


def test_stopped_and_resumed_is_the_same_bit_for_bit(straight: Pretraining, tmp_path: Path) -> None:
    folder = tmp_path / "resumed"
    with pytest.raises(Interrupted, match="stopped after step 3 of 6; --resume goes on"):
        Pretraining(Toy(), SCHEDULE, folder, stop=after(3)).run(log_every=1)
    resumed = Pretraining(Toy(seed=9), SCHEDULE, folder)
    resumed.restore()
    assert resumed.iteration == 3
    resumed.run(log_every=1)
    assert_same(resumed, straight)
    assert resumed.task.done == [3 / 6, 4 / 6, 5 / 6]  # type: ignore[attr-defined]
    expected = [{k: v for k, v in row.items() if k != "seconds"} for row in rows(tmp_path / "straight")]
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in rows(folder)] == expected
    assert [row["iteration"] for row in expected] == [1, 2, 3, 4, 5, 6]


def test_killed_between_checkpoints_is_the_same_and_logs_no_step_twice(straight: Pretraining, tmp_path: Path) -> None:
    def kill(call: int) -> float:
        if call == 6:
            raise KeyboardInterrupt
        return 1.0

    folder = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        Pretraining(Toy(hook=kill), SCHEDULE, folder).run(save_every=2, log_every=1)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"stage": "pretr')  # cut in the middle of a line
    resumed = Pretraining(Toy(seed=9), SCHEDULE, folder)
    resumed.restore()
    assert resumed.iteration == 4
    resumed.run(log_every=1)
    assert_same(resumed, straight)
    assert [row["iteration"] for row in rows(folder)] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_has_nothing_left_to_do_and_a_longer_one_goes_on(straight: Pretraining, tmp_path: Path) -> None:
    again = Pretraining(Toy(), SCHEDULE, straight.folder, stop=lambda: True)
    again.restore()
    again.run()  # never asks whether to stop: the work is done
    assert_same(again, straight)
    longer = Pretraining(Toy(), Schedule(8, lr=0.05, warmup=2, seed=4), straight.folder)
    longer.restore()
    longer.run()
    assert longer.iteration == 8 and rows(straight.folder)[-1]["iteration"] == 8


def test_stop_in_the_last_step_is_no_interruption(tmp_path: Path) -> None:
    run = Pretraining(Toy(), Schedule(1), tmp_path, stop=lambda: True)
    run.run()
    assert run.iteration == 1 and (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_loss_ends_the_run(value: float, tmp_path: Path) -> None:
    toy = Toy(hook=lambda call: value if call == 3 else 1.0)
    run = Pretraining(toy, SCHEDULE, tmp_path)
    with pytest.raises(RunError, match="the loss became (nan|inf) at step 2; lower --lr"):
        run.run(save_every=1)
    assert all(torch.isfinite(value).all() for value in toy.network.state_dict().values())
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["iteration"] == 2


def test_checkpoints_that_do_not_fit_are_refused(straight: Pretraining, tmp_path: Path) -> None:
    other = Toy()
    other.network = nn.Sequential(nn.Linear(3, 1))
    with pytest.raises(RunError, match="does not fit this model"):
        Pretraining(other, SCHEDULE, straight.folder).restore()
    with pytest.raises(RunError, match="there is no checkpoint"):
        Pretraining(Toy(), SCHEDULE, tmp_path / "nowhere").restore()
    state = torch.load(straight.folder / "checkpoint.pt", weights_only=True)
    for key in ("network", "average", "optimizer", "iteration"):
        torch.save({k: v for k, v in state.items() if k != key}, tmp_path / "part.pt")
        with pytest.raises(RunError, match=key):
            Pretraining(Toy(), SCHEDULE, tmp_path).restore(tmp_path / "part.pt")
    with pytest.raises(RunError, match="of seed 4, not 5"):
        Pretraining(Toy(), Schedule(6, seed=5), straight.folder).restore()
    (tmp_path / "part.pt").write_bytes(b"no checkpoint")
    with pytest.raises(RunError, match="cannot read"):
        Pretraining(Toy(), SCHEDULE, tmp_path).restore(tmp_path / "part.pt")


def test_the_average_follows_quickly_at_first(tmp_path: Path) -> None:
    toy = Toy()
    expected = {name: value.clone().double() for name, value in toy.network.state_dict().items()}
    run = Pretraining(toy, SCHEDULE, tmp_path)
    for step in range(3):
        run._step()
        run.iteration += 1
        decay = min(SCHEDULE.average, (1 + step) / (10 + step))
        for name, value in toy.network.state_dict().items():
            expected[name] = (
                decay * expected[name] + (1 - decay) * value if value.is_floating_point() else value.clone().double()
            )
    for name, value in run.average.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert int(run.average["1.num_batches_tracked"]) == 3
    assert not torch.equal(run.average["0.weight"], toy.network.state_dict()["0.weight"])


def test_the_seed_and_the_step_decide_what_is_drawn(tmp_path: Path) -> None:
    finals, drawn = [], []
    for seed in (4, 4, 5):
        torch.manual_seed(seed + 100)  # what was drawn before does not matter
        run = Pretraining(Toy(), Schedule(2, seed=seed), tmp_path / str(len(finals)))
        run.run()
        finals.append(run.task.network.state_dict()["0.weight"])
        drawn += run.task.drawn  # type: ignore[attr-defined]
    assert torch.equal(finals[0], finals[1]) and not torch.equal(finals[0], finals[2])
    assert drawn[:2] == drawn[2:4]
    assert all(len(set(numbers)) == 4 for numbers in zip(*drawn, strict=True)), "every step draws anew"


def test_large_gradients_are_clipped_and_only_matrices_decay(tmp_path: Path) -> None:
    toy = Toy(hook=lambda call: 1e6)
    run = Pretraining(toy, Schedule(1, clip=0.5), tmp_path)
    run._step()
    norm = torch.stack([p.grad.norm() for p in toy.network.parameters() if p.grad is not None]).norm()
    assert float(norm) == pytest.approx(0.5, rel=1e-3)
    decays = {id(p): group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    assert {name: decays[id(p)] > 0 for name, p in toy.network.named_parameters()} == {
        "0.weight": True, "0.bias": False, "1.weight": False, "1.bias": False, "3.weight": True, "3.bias": False,
    }  # fmt: skip
    toy.network[0].requires_grad_(False)
    groups = Pretraining(toy, SCHEDULE, tmp_path).optimizer.param_groups
    assert sum(len(group["params"]) for group in groups) == 4, "what is frozen is not handed to the optimiser"


def test_the_rate_rises_linearly_and_falls_along_a_cosine() -> None:
    schedule = Schedule(110, lr=2.0, warmup=10)
    assert [schedule.rate(t) for t in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert schedule.rate(10) == pytest.approx(2.0)
    assert schedule.rate(60) == pytest.approx(2.0 * (0.01 + 0.99 / 2))
    assert schedule.rate(110) == pytest.approx(0.02) == schedule.rate(500)
    falling = [schedule.rate(t) for t in range(9, 111)]
    assert falling == sorted(falling, reverse=True)
    assert Schedule(10, lr=1.0, warmup=0).rate(0) == pytest.approx(1.0)
    assert Schedule(2, lr=1.0, warmup=100).rate(1) == pytest.approx(0.02)
