"""The MONAI bundle: MONAI alone reads it and gives our masks, and its preparation is ours on every grid."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.bundle import ConfigParser, verify_net_in_out
from monai.data.utils import dense_patch_slices

from scarceseg.config import NetworkConfig
from scarceseg.data.images import read_image, read_volume
from scarceseg.data.plan import Normalisation, Plan
from scarceseg.errors import RunError
from scarceseg.functional.sliding import count_windows
from scarceseg.inference.export_bundle import inference
from scarceseg.inference.export_model import export_model
from scarceseg.inference.model import load_model, save_model
from scarceseg.inference.predictor import Predictor, predict
from scarceseg.networks import build_network
from tests.inference.scans import plan, rotation, scan

CT = Normalisation(kind="ct", low=-50.5, high=880.25, mean=301.7, std=233.1)
ZSCORE = Normalisation(kind="zscore")


def plan_of(*normalisation: Normalisation, spacing: tuple[float, float, float]) -> Plan:
    return plan(len(normalisation), 2).model_copy(update={"normalisation": normalisation, "spacing_mm": spacing})


def write_scan(
    folder: Path, name: str, seed: int, channels: int = 1, zeros: bool = False, **settings: Any
) -> tuple[Path, ...]:
    """A noisy ball in each channel, as ``NAME_0000.nii.gz`` ...; `zeros` empties most of the volume."""
    folder.mkdir(exist_ok=True)
    paths = []
    for channel in range(channels):
        image, _ = scan(direction=rotation(seed), at=(0.4 + 0.1 * channel, 0.6, 0.45), **settings)
        values = sitk.GetArrayFromImage(image) + np.random.default_rng(seed).normal(size=image.GetSize()[::-1]) * 50
        if zeros:
            values[:, :, : 2 * values.shape[2] // 3] = 0
        filled = sitk.GetImageFromArray(values.astype(np.float32))
        filled.CopyInformation(image)
        paths.append(folder / f"{name}_{channel:04d}.nii.gz")
        sitk.WriteImage(filled, str(paths[-1]))
    return tuple(paths)


def save_run(run: Path, how: Plan, volume: tuple[Path, ...]) -> Path:
    """A small untrained network that calls about half of `volume` foreground: the hardest case for equal masks."""
    torch.manual_seed(3)
    config = NetworkConfig(name="vnet", args={"n_filters": 2})
    network = build_network("vnet", len(how.channels), 2, config.args)
    save_model(run, network, config, how)
    probability = Predictor(run, device="cpu").predict_volume(*read_volume(volume)).prepared_probability
    with torch.no_grad():
        network.out_conv.bias[1] -= float(np.median(np.log(probability[1] / probability[0])))
    save_model(run, network, config, how, {"iterations": 5})
    return run


def silent(_done: float, _total: int, _name: str) -> None:
    """No progress bar in the tests' output."""


@pytest.mark.parametrize(
    ("seed", "spacing", "settings"),
    [
        (0, (1.1, 0.8, 1.7), {}),  # the grid of the file itself
        (1, (1.1005, 0.8, 1.7), {}),  # as good as that
        (2, (1.3, 0.7, 2.0), {"zeros": True}),
        (3, (2.5, 0.8, 3.9), {"size": (13, 41, 24)}),  # more than twice as coarse: smoothed before
        (4, (1.0, 1.0, 1.0), {"origin": (0.2, -0.3, 0.1), "size": (7, 19, 31)}),
    ],
)
def test_the_preparation_is_ours(tmp_path: Path, seed: int, spacing: Any, settings: dict[str, Any]) -> None:
    how = plan_of(CT, ZSCORE, Normalisation(kind="none"), spacing=spacing)
    paths = write_scan(tmp_path / "in", "case", seed, channels=3, **settings)
    run = tmp_path / "run"
    save_model(run, build_network("vnet", 3, 2, {"n_filters": 1}), NetworkConfig(args={"n_filters": 1}), how)
    ours = Predictor(run, device="cpu").prepare(*read_volume(paths))
    parser = ConfigParser(inference(how) | {"dataset_dir": str(tmp_path / "in")})
    (case,) = parser.get_parsed_content("data")
    assert [Path(path) for path in case["image"]] == list(paths)
    theirs = parser.get_parsed_content("preprocessing")(case)
    assert set(theirs) == {"image"}
    assert theirs["image"].shape == ours.image.shape
    scale = ours.image.std(axis=(1, 2, 3), keepdims=True)
    assert np.abs((theirs["image"].numpy() - ours.image) / scale).max() < 1e-4
    affine = np.diag([-1, -1, 1, 1]) @ theirs["image"].affine.numpy()
    direction = np.array(ours.geometry.direction).reshape(3, 3) * ours.geometry.spacing_mm
    np.testing.assert_allclose(affine[:3, :3], direction, atol=1e-5)
    np.testing.assert_allclose(affine[:3, 3], ours.geometry.origin, atol=1e-4)


@pytest.mark.parametrize("side", [1, 2, 3, 5, 7, 16, 17, 33, 112])
def test_windows_step_as_ours(side: int) -> None:
    how = plan().model_copy(update={"patch": (side, side, side)})
    inferer = ConfigParser(inference(how)).get_parsed_content("inferer")
    step = [int(side * (1 - share)) if side > 1 else 1 for share in inferer.overlap]
    assert step == [max(round(side / 2), 1)] * 3
    size = [3 * side + 1] * 3
    assert len(dense_patch_slices(size, (side,) * 3, step)) == count_windows(size, (side,) * 3, step)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two-channel scans in ``in``, a run and its bundle."""
    folder = tmp_path_factory.mktemp("bundle")
    paths = write_scan(folder / "in", "a", 1, channels=2, zeros=True)
    write_scan(folder / "in", "b.1", 2, channels=2, size=(21, 26, 33))
    save_run(folder / "run", plan_of(CT, ZSCORE, spacing=(1.3, 1.0, 2.0)), paths)
    export_model(folder / "run", folder / "heart")
    return folder


def test_monai_alone_gives_our_masks(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("ignite")
    pytest.importorskip("fire")
    words = ["run", "--config_file", "configs/inference.json", "--bundle_root", "."]
    words += ["--dataset_dir", str(made / "in"), "--output_dir", str(tmp_path / "monai")]
    code = "import runpy, sys; sys.modules['scarceseg'] = None; sys.argv = ['monai.bundle', *sys.argv[1:]]; "
    code += "runpy.run_module('monai.bundle', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=made / "heart", capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    predict(made / "run", made / "in", tmp_path / "ours", device="cpu", on_progress=silent)
    names = sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert names == ["a.nii.gz", "b.1.nii.gz"]
    assert sorted(path.name for path in (tmp_path / "monai").iterdir()) == names
    for name in names:
        theirs, grid = read_image(tmp_path / "monai" / name)
        ours, geometry = read_image(tmp_path / "ours" / name)
        assert theirs.dtype == np.uint8 and grid.size == geometry.size
        for a, b in ((grid.spacing_mm, geometry.spacing_mm), (grid.origin, geometry.origin)):
            np.testing.assert_allclose(a, b, atol=1e-4)
        np.testing.assert_allclose(grid.direction, geometry.direction, atol=1e-5)
        assert 0.01 < ours.mean() < 0.99
        assert np.count_nonzero(theirs != ours) <= 1e-3 * ours.size


def test_the_bundle_predicts_what_its_run_predicts_bit_for_bit(made: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(made / "heart", tmp_path / "elsewhere")
    for source, out in ((made / "run", tmp_path / "a"), (bundle, tmp_path / "b")):
        predict(source, made / "in", out, probabilities=True, device="cpu", on_progress=silent)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) == 6 and names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        (ours, geometry), (theirs, grid) = (read_image(tmp_path / side / name) for side in "ab")
        assert np.array_equal(ours, theirs) and geometry == grid


def test_a_bundle_can_be_exported_again(made: Path, tmp_path: Path) -> None:
    export = export_model(made / "heart", tmp_path / "again.ts", "torchscript")
    assert export.path.stat().st_size > 1000 and "any batch" in str(export)
    assert load_model(made / "heart")[2] == load_model(made / "run")[2]


def test_layout_and_metadata(made: Path) -> None:
    bundle = made / "heart"
    files = sorted(path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file())
    assert files == [
        "configs/inference.json",
        "configs/metadata.json",
        "docs/README.md",
        "models/model.pt",
        "models/model.ts",
    ]
    facts = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
    texts = ["schema", "version", "monai_version", "pytorch_version", "numpy_version", "task", "description"]
    assert all(isinstance(facts[key], str) for key in [*texts, "authors", "copyright", "intended_use"])
    assert set(facts["required_packages_version"]) == {"fire", "pytorch-ignite", "scipy", "nibabel"}
    image, pred = facts["network_data_format"]["inputs"]["image"], facts["network_data_format"]["outputs"]["pred"]
    for tensor in (image, pred):
        assert {"type", "format", "num_channels", "spatial_shape", "dtype", "value_range"} <= set(tensor)
        assert tensor["spatial_shape"] == [16, 16, 16] and tensor["spacing_mm"] == [1.3, 1.0, 2.0]
    assert image["channel_def"] == {"0": "MR", "1": "T2"} and image["num_channels"] == 2
    assert pred["channel_def"] == {"0": "background", "1": "ball"} and pred["num_channels"] == 2
    page = (bundle / "docs" / "README.md").read_text(encoding="utf-8")
    assert page.startswith("# heart\n") and "clipped to -50.5 .. 880.25" in page and "{" not in page
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(bundle / "configs" / "metadata.json"),
        config_file=str(bundle / "configs" / "inference.json"),
        bundle_root=str(bundle),
        device="cpu",
    )


def test_wrong_bundles_are_one_message(made: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(made / "heart", tmp_path / "heart")
    weights = bundle / "models" / "model.pt"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(RunError, match="damaged or cut short"):
        load_model(bundle)
    torch.save({"layer.weight": torch.zeros(1)}, weights)
    with pytest.raises(RunError, match=r"do not fit the network 'vnet' of metadata\.json"):
        load_model(bundle)
    weights.unlink()
    with pytest.raises(RunError, match=r"no model\.pt"):
        load_model(bundle)
    (bundle / "configs" / "metadata.json").write_text('{"version": "0.1.0"}')
    with pytest.raises(RunError, match="another program wrote"):
        load_model(bundle)
