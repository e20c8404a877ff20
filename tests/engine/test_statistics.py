"""Batch norm statistics of the finished network: the plain mean over patches of the pool, without labels and without dropout."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import SimpleITK as sitk
import torch
from safetensors.torch import load_file
from torch import nn

import scarceseg.engine.workspace as workspace_module
from scarceseg.engine.run import train
from scarceseg.engine.statistics import pool_statistics, take_statistics
from scarceseg.engine.workspace import Workspace
from scarceseg.errors import Interrupted
from scarceseg.networks import build_network
from tests.tiny import tiny_config, tiny_dataset

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("data"))


def batches(count: int = 3) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [2 + i + (1 + i) * torch.randn(2, 1, 16, 16, 16, generator=g) for i in range(count)]


def test_statistics_are_the_mean_over_batches_and_of_what_prediction_sees() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Dropout(0.5), nn.Conv3d(1, 3, 3), nn.BatchNorm3d(3, momentum=0.1), nn.ReLU(), nn.BatchNorm3d(3)
    )
    convolution, first, second = network[1], network[2], network[4]
    network.train()(torch.randn(2, 1, 8, 8, 8))  # what was there before leaves no trace
    take_statistics(network, batches())
    seen = [convolution(x) for x in batches()]
    torch.testing.assert_close(first.running_mean, torch.stack([x.mean((0, 2, 3, 4)) for x in seen]).mean(0))
    torch.testing.assert_close(first.running_var, torch.stack([x.var((0, 2, 3, 4)) for x in seen]).mean(0))
    fresh = nn.BatchNorm3d(3)  # the second layer stands behind one that normalises by its batch
    then = [fresh(x).relu() for x in seen]
    torch.testing.assert_close(second.running_mean, torch.stack([x.mean((0, 2, 3, 4)) for x in then]).mean(0))
    assert first.momentum == second.momentum == 0.1
    assert not any(module.training for module in network.modules())


def test_without_batches_or_batch_norm_nothing_changes() -> None:
    for network, images in ((build_network("vnet", 1, 2, {"n_filters": 2}), []), (nn.GroupNorm(1, 1), batches())):
        network.train()(torch.randn(2, 1, 16, 16, 16))
        before = {key: value.clone() for key, value in network.state_dict().items()}
        take_statistics(network, images)
        for key, value in network.state_dict().items():
            torch.testing.assert_close(value, before[key], rtol=0, atol=0)


@pytest.mark.parametrize("method", ["supervised", "mean-teacher"])
def test_a_run_changes_the_statistics_alone_and_in_the_same_way_each_time(
    data: Path, tmp_path: Path, method: str
) -> None:
    weights = {}
    for name, changes in {
        "running": {"batch_norm_statistics": "running"},
        "pool": {},
        "again": {},
    }.items():
        train(tiny_config(data, method=method, iterations=4, **changes), tmp_path / name, cache=tmp_path / "cache")
        weights[name] = load_file(tmp_path / name / "model.safetensors")
    found = {key for key in weights["pool"] if not torch.equal(weights["pool"][key], weights["running"][key])}
    assert found and all(key.endswith(BUFFERS) for key in found)
    assert all(torch.equal(value, weights["again"][key]) for key, value in weights["pool"].items())


@pytest.mark.parametrize("batch_norm", ["joint", "split"])
def test_by_default_they_are_of_the_pool_but_for_split_batch_norm(data: Path, tmp_path: Path, batch_norm: str) -> None:
    weights = {}
    for choice in ("auto", "pool", "running"):
        config = tiny_config(data, iterations=2, batch_norm=batch_norm, batch_norm_statistics=choice)
        train(config, tmp_path / choice, cache=tmp_path / "cache")
        weights[choice] = load_file(tmp_path / choice / "model.safetensors")
    like = "pool" if batch_norm == "joint" else "running"
    other = "running" if batch_norm == "joint" else "pool"
    assert all(torch.equal(value, weights[like][key]) for key, value in weights["auto"].items())
    assert any(not torch.equal(value, weights[other][key]) for key, value in weights["auto"].items())


def test_statistics_of_the_pool_follow_its_unlabelled_images(data: Path, tmp_path: Path) -> None:
    """The same labelled case, another unlabelled one beside it: what a supervised run predicts with is another network."""
    other = tmp_path / "other"
    shutil.copytree(data, other)
    for file in sorted((other / "imagesTr").iterdir())[1:]:
        sitk.WriteImage(sitk.Flip(sitk.ReadImage(file), (True, False, False)) ** 3, file)
    found = []
    for number, folder in enumerate((data, other)):
        config = tiny_config(folder, method="supervised", iterations=2, labeled=1)
        train(config, tmp_path / str(number), cache=tmp_path / "cache")
        found.append(load_file(tmp_path / str(number) / "model.safetensors"))
    changed = {key for key in found[0] if not torch.equal(found[0][key], found[1][key])}
    assert changed and all(key.endswith(BUFFERS) for key in changed)


def test_stopped_while_taking_them_and_resumed_is_bit_for_bit_the_same(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped_before_the_second_batch(network: nn.Module, work: Workspace) -> None:
        count = iter(range(100))
        work.stop = lambda: next(count) == 1
        pool_statistics(network, work)

    config = tiny_config(data, iterations=3)
    train(config, tmp_path / "whole", cache=tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(workspace_module, "pool_statistics", stopped_before_the_second_batch)
        with pytest.raises(Interrupted, match="statistics"):
            train(config, tmp_path / "cut", cache=tmp_path / "cache")
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    train(config, tmp_path / "cut", resume=True, cache=tmp_path / "cache")
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(value, cut[key]) for key, value in whole.items())
