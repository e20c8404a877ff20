"""Two processes on one machine: the loss curve of one, stages in shares, a folder predicted in shares, a killed worker."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from scarceseg.config import Config
from scarceseg.engine import parallel as parallel_module
from scarceseg.engine import run as run_module
from scarceseg.engine import workspace as workspace_module
from scarceseg.engine.parallel import GlobalBatchNorm, check_rows, check_tasks, share_statistics
from scarceseg.engine.run import train
from scarceseg.errors import ConfigError
from scarceseg.networks import build_network
from tests.tiny import tiny_config, tiny_dataset

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("data"))


def launch(
    *arguments: str | Path, cache: Path, program: tuple[str, ...] = ("-m", "scarceseg")
) -> subprocess.Popen[str]:
    """What a user types, with two processes."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *program,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SCARCESEG_CACHE": str(cache)}
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run_two(*arguments: str | Path, cache: Path) -> str:
    process = launch(*arguments, cache=cache)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return errors


def without_chance(data: Path, method: str, **changes: Any) -> Config:
    """Dropout draws differ between one process and two, so there is none."""
    return tiny_config(
        data,
        method=method,
        network={"name": "vnet", "args": {"n_filters": 2, "dropout": False}},
        plan={"patch": [32, 32, 16], "spacing_mm": 1.0},  # batch norm over few voxels makes much of rounding
        optim={"lr": 0.002},
        **changes,
    )


def curve(run: Path, stage: str = "train") -> list[float]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if entry["stage"] == stage]


@pytest.mark.parametrize(
    ("method", "terms", "batch_norm"),
    [
        ("ua-mt", {"ua-mt": {"noise_std": 0.0}}, "joint"),
        ("cps+cct", {}, "split"),
    ],
)
def test_two_processes_have_the_loss_curve_of_one(
    data: Path, tmp_path: Path, method: str, terms: dict[str, Any], batch_norm: str
) -> None:
    config = without_chance(data, method, terms=terms, iterations=5, batch_norm=batch_norm)
    train(config, tmp_path / "one", cache=tmp_path / "cache")
    (tmp_path / "c.yaml").write_text(config.dump(), encoding="utf-8")
    run_two("train", "--recipe", tmp_path / "c.yaml", "--out", tmp_path / "two", cache=tmp_path / "cache")
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert len(one) == 5 and max(one) - min(one) > 1e-3
    np.testing.assert_allclose(two, one, rtol=2e-4)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for key, value in first.items():
        if value.is_floating_point():
            torch.testing.assert_close(second[key], value, rtol=5e-3, atol=5e-4)


def test_mixtures_of_two_processes_are_those_of_one(data: Path, tmp_path: Path) -> None:
    """Each process works on its share of the rows, so that all must cut the same cuboid."""
    config = without_chance(data, "bcp", terms={"bcp": {"pretrain_iterations": 4}}, iterations=1)
    train(config, tmp_path / "one", cache=tmp_path / "cache")
    (tmp_path / "c.yaml").write_text(config.dump(), encoding="utf-8")
    run_two("train", "--recipe", tmp_path / "c.yaml", "--out", tmp_path / "two", cache=tmp_path / "cache")
    one, two = (curve(tmp_path / name, "bcp-pretrain") for name in ("one", "two"))
    assert len(one) == 4
    np.testing.assert_allclose(two, one, rtol=2e-4)


def test_the_pool_is_labelled_and_a_folder_predicted_in_shares(data: Path, tmp_path: Path) -> None:
    terms = {"self-training": {"rounds": 1, "teacher_iterations": 2}}
    config = without_chance(data, "self-training", terms=terms, iterations=2)
    (tmp_path / "c.yaml").write_text(config.dump(), encoding="utf-8")
    run_two("train", "--recipe", tmp_path / "c.yaml", "--out", tmp_path / "run", cache=tmp_path / "cache")
    (table,) = (tmp_path / "run" / "stages").glob("*/confidence.json")
    assert list(json.loads(table.read_text())["cases"]) == ["case_02", "case_03", "case_04"]
    images = data / "imagesTr"
    run_two("predict", tmp_path / "run", images, "--out", tmp_path / "two", cache=tmp_path / "cache")
    from scarceseg.inference.predictor import predict

    predict(tmp_path / "run", [images], tmp_path / "one", device="cpu")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == names and len(names) == 5
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    scans = tmp_path / "scans"
    scans.mkdir()
    (scans / "a.nii.gz").write_text("not an image")  # all that the first process has to do
    shutil.copy(next(images.iterdir()), scans / "b.nii.gz")
    process = launch("predict", tmp_path / "run", scans, "--out", tmp_path / "rest", cache=tmp_path / "cache")
    _, errors = process.communicate(timeout=240)
    assert process.returncode != 0
    assert errors.count("error: 1 of 2 cases failed (the other 1 are in") == 1, errors
    assert sorted(path.name for path in (tmp_path / "rest").iterdir()) == ["b.nii.gz"]


SCRIPT = """
import os, sys
from pathlib import Path
from scarceseg import predict, train
from scarceseg.config import Config

here = Path(sys.argv[1])
result = train(Config.load(here / "c.yaml"), here / "run")
predict(here / "run", [sys.argv[2]], here / "masks", device="cpu")
(here / f"evaluation{os.environ['RANK']}.txt").write_text(repr(result))
"""


def test_every_process_has_the_model_and_the_result_when_train_returns(data: Path, tmp_path: Path) -> None:
    config = without_chance(data, "supervised", iterations=1, val=["case_04"])
    (tmp_path / "c.yaml").write_text(config.dump(), encoding="utf-8")
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    process = launch(tmp_path, data / "imagesTr", cache=tmp_path / "cache", program=(str(tmp_path / "script.py"),))
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    first, second = ((tmp_path / f"evaluation{rank}.txt").read_text() for rank in (0, 1))
    assert first == second and "'dice'" in first
    assert len(list((tmp_path / "masks").iterdir())) == 5


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the worker in /proc, which only Linux has")
def test_a_killed_worker_ends_the_job_and_resume_goes_on(data: Path, tmp_path: Path) -> None:
    config = without_chance(data, "mean-teacher", iterations=4000)
    (tmp_path / "c.yaml").write_text(config.dump(), encoding="utf-8")
    arguments = ("train", "--recipe", tmp_path / "c.yaml", "--out", tmp_path / "run")
    process = launch(*arguments, cache=tmp_path / "cache")
    until = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoints" / "last.pt").exists():
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.2)
    workers = sorted(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))
    os.kill(workers[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "--resume" in errors
    done = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["iteration"]
    again = launch(*arguments, "--resume", cache=tmp_path / "cache")
    until = time.monotonic() + 120
    lines = tmp_path / "run" / "metrics.jsonl"
    while json.loads(lines.read_text().splitlines()[-1])["iteration"] < done + 3:
        assert again.poll() is None and time.monotonic() < until, again.communicate()
        time.sleep(0.2)
    again.send_signal(signal.SIGTERM)
    again.communicate(timeout=120)


def test_bad_input_is_told_once(tmp_path: Path) -> None:
    process = launch("train", tmp_path / "nothing", "--out", tmp_path / "run", cache=tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert errors.count("error: ") == 1, errors


def test_tasks_of_srun_without_torchrun_are_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_JOB_ID": "12345"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match="srun started 4 tasks.* 'srun torchrun --nnodes 1 --nproc-per-node"):
        train(tiny_config(data), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_tasks()
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    check_tasks()


@pytest.mark.parametrize("step", [None, "4294967291", "4294967290"])  # the last two: batch script, interactive shell
def test_one_process_in_a_job_of_several_tasks_is_one_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str | None
) -> None:
    for key, value in {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "12345", "SLURM_JOB_NAME": "train"}.items():
        monkeypatch.setenv(key, value)
    if step is not None:
        monkeypatch.setenv("SLURM_STEP_ID", step)
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert train(tiny_config(data, method="supervised", iterations=1), tmp_path / "run").folder.exists()


def test_rows_that_cannot_be_shared_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    check_rows(6)
    with pytest.raises(ConfigError, match="a step has 4 rows .* 3 processes cannot share equally: take 6 rows"):
        check_rows(4)


@pytest.mark.parametrize(("method", "stage"), [("self-training", "self-training-teacher1"), ("bcp", "bcp-pretrain")])
def test_rows_of_a_stage_that_cannot_be_shared_are_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, stage: str
) -> None:
    """The four rows of the training can be shared by four processes, the two labelled ones of the stage cannot."""
    monkeypatch.setattr(run_module, "meet", lambda cuda: None)
    for module in (workspace_module, parallel_module):
        monkeypatch.setattr(module, "processes", lambda: 4)
    with pytest.raises(ConfigError, match=f"in the stage {stage} a step has 2 rows .* 4 processes"):
        train(tiny_config(data, method=method), tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.pt"))


def test_shared_statistics_keep_names_parameters_and_evaluation() -> None:
    network = build_network("vnet", 1, 2, {"n_filters": 2})
    before = {key: value.data_ptr() for key, value in network.state_dict().items()}
    image = torch.randn(1, 1, 16, 16, 16)
    expected = network.eval()(image)
    share_statistics(network, cuda=False)
    assert {key: value.data_ptr() for key, value in network.state_dict().items()} == before
    assert not any(type(module) is nn.BatchNorm3d for module in network.modules())
    assert any(isinstance(module, GlobalBatchNorm) for module in network.modules())
    assert torch.equal(network(image), expected)
