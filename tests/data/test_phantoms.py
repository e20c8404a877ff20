"""Phantoms: deterministic, varied, whole, and not solved by a threshold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from scarceseg.data.dataset import load_dataset
from scarceseg.data.geometry import matrix
from scarceseg.data.images import read_image, read_label
from scarceseg.data.phantoms import STRUCTURES, PhantomConfig, make_phantom, write_phantom_dataset
from scarceseg.data.scene import Scene, clipped, smooth_fields, union
from scarceseg.errors import ConfigError, RunError

ALL = len(STRUCTURES)
SMALL = PhantomConfig(shape=(24, 22, 20))


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float((a & b).sum()) / max(float(a.sum() + b.sum()), 1)


def test_equal_seeds_give_equal_arrays_and_others_do_not() -> None:
    first, again, other = make_phantom(3, SMALL), make_phantom(3, SMALL), make_phantom(4, SMALL)
    assert first[0].tobytes() == again[0].tobytes() and first[1].tobytes() == again[1].tobytes()
    assert first[2] == again[2]
    assert not np.array_equal(first[1], other[1]) and not np.array_equal(first[0], other[0])
    assert make_phantom((3, 1), SMALL)[0].tobytes() != make_phantom((3, 2), SMALL)[0].tobytes()


@pytest.mark.parametrize("classes", [1, 2, ALL])
@pytest.mark.parametrize("shape", [(32, 32, 32), (25, 40, 19)])
def test_every_class_is_there_and_the_arrays_fit_the_grid(classes: int, shape: tuple[int, int, int]) -> None:
    for seed in range(4):
        volume, label, geometry = make_phantom(seed, PhantomConfig(shape=shape, classes=classes))
        assert volume.shape == (1, *shape) and volume.dtype == np.float32 and np.isfinite(volume).all()
        assert label.shape == shape == geometry.size and label.dtype == np.uint8
        assert np.unique(label).tolist() == list(range(classes + 1))
        assert volume.min() >= 0  # Rician


def test_classes_mean_the_same_structures_whatever_their_number() -> None:
    few = make_phantom(5, PhantomConfig(shape=(24, 22, 20), classes=2))
    many = make_phantom(5, PhantomConfig(shape=(24, 22, 20), classes=ALL))
    np.testing.assert_array_equal(few[0], many[0])
    np.testing.assert_array_equal(few[1], np.where(many[1] <= 2, many[1], 0))


def test_structures_keep_their_order_in_the_patient() -> None:
    """Consistent topology: the lobe is right and low, the gland left, the pool inside of the wall."""
    for seed in range(6):
        label = make_phantom(seed, PhantomConfig(shape=(40, 40, 40), classes=ALL))[1]
        centre = {
            name: np.argwhere(label == k).mean(axis=0) for name, k in zip(STRUCTURES, range(1, ALL + 1), strict=True)
        }
        assert centre["lobe"][0] > centre["gland"][0] + 8
        assert centre["chamber"][2] > centre["lobe"][2] + 8
        pool = label == STRUCTURES.index("pool") + 1
        around = np.zeros_like(pool)
        for axis in range(3):
            around |= np.roll(pool, 1, axis) | np.roll(pool, -1, axis)
        shell = label[around & ~pool]
        assert np.mean(shell == STRUCTURES.index("wall") + 1) > 0.7


def test_cases_vary_in_place_size_and_intensity() -> None:
    cases = [make_phantom(seed, PhantomConfig(shape=(32, 32, 32), classes=1)) for seed in range(8)]
    sizes = [int((label == 1).sum()) for _, label, _ in cases]
    centres = np.array([np.argwhere(label == 1).mean(axis=0) for _, label, _ in cases])
    levels = [float(volume[0][label == 1].mean()) for volume, label, _ in cases]
    assert np.std(sizes) / np.mean(sizes) > 0.08
    assert centres.std(axis=0).min() > 0.3
    assert np.std(levels) / np.mean(levels) > 0.05
    alike = [make_phantom(seed, PhantomConfig(shape=(24, 24, 24), variety=0, pathology=0))[1] for seed in (1, 2)]
    np.testing.assert_array_equal(*alike)


@pytest.mark.parametrize("structure", range(1, ALL + 1))
def test_no_threshold_finds_a_structure(structure: int) -> None:
    """Even the best interval of intensities, chosen with the label, stays below Dice 0.9, since others share it."""
    config = PhantomConfig(shape=(40, 40, 36), classes=ALL, noise=0.01, bias=0.0, texture=0.0)
    for seed in (0, 1):
        volume, label, _ = make_phantom(seed, config)
        levels = np.quantile(volume[0], np.linspace(0, 1, 41))
        target = label == structure
        best = max(
            dice((volume[0] >= low) & (volume[0] <= high), target)
            for i, low in enumerate(levels)
            for high in levels[i + 1 :]
        )
        assert best < 0.9


def test_channels_show_one_anatomy_with_other_contrast() -> None:
    volume, label, _ = make_phantom(2, PhantomConfig(shape=(28, 26, 24), channels=3, classes=2))
    assert volume.shape == (3, 28, 26, 24)
    inside = [[float(c[label == k].mean()) / float(c[label == 0].mean()) for k in (1, 2)] for c in volume]
    assert abs(inside[0][0] - inside[1][0]) > 0.05 or abs(inside[0][1] - inside[1][1]) > 0.05
    correlation = np.corrcoef(volume.reshape(3, -1))
    assert np.abs(correlation[np.triu_indices(3, 1)]).max() < 0.999


def test_thick_slices_and_oblique_grids() -> None:
    config = PhantomConfig(shape=(30, 28, 14), spacing_mm=(0.8, 0.8, 4.0), oblique_deg=40)
    _, label, geometry = make_phantom(6, config)
    assert geometry.spacing_mm == (0.8, 0.8, 4.0) and (label > 0).any()
    axes = matrix(geometry)
    np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-9)
    assert np.abs(axes - np.diag([-1, -1, 1])).max() > 0.01
    straight = make_phantom(6, PhantomConfig(shape=(30, 28, 14), spacing_mm=(0.8, 0.8, 4.0)))
    np.testing.assert_array_equal(straight[1], label)


def test_gaussian_noise_may_be_negative_and_noise_can_be_off() -> None:
    quiet = {"shape": (20, 20, 20), "blur_voxel": 0.0, "texture": 0.0, "bias": 0.0}
    assert make_phantom(1, PhantomConfig(**quiet, noise=0.3, noise_kind="gaussian"))[0].min() < 0
    still = make_phantom(1, PhantomConfig(**quiet, noise=0.0, pathology=0))[0][0]
    assert len(np.unique(still[:3, :3, :3])) == 1  # air


def test_dataset_is_a_readable_nnunet_folder(tmp_path: Path) -> None:
    config = PhantomConfig(shape=(20, 18, 16), channels=2, spacing_mm=(1.0, 1.5, 2.0), oblique_deg=20)
    folder = write_phantom_dataset(tmp_path / "data", 4, 2, config, seed=9, test_cases=2, file_ending=".nrrd")
    dataset = load_dataset(folder)
    assert [case.name for case in dataset.cases] == [f"phantom_{k:03d}" for k in range(4)]
    assert [case.label is not None for case in dataset.cases] == [True, True, False, False]
    assert sorted(p.name for p in (folder / "labelsTr").iterdir()) == ["phantom_000.nrrd", "phantom_001.nrrd"]
    assert sorted(p.name for p in (folder / "imagesTs").iterdir())[::2] == [
        "phantom_004_0000.nrrd",
        "phantom_005_0000.nrrd",
    ]
    assert sorted(p.name for p in (folder / "labelsTs").iterdir()) == ["phantom_004.nrrd", "phantom_005.nrrd"]
    assert json.loads((folder / "dataset.json").read_text())["labels"] == {"background": 0, "chamber": 1, "lobe": 2}
    volume, label, geometry = make_phantom((9, 5), config)
    image, read = read_image(folder / "imagesTs" / "phantom_005_0001.nrrd")
    np.testing.assert_allclose(image, volume[1], atol=0.5)
    np.testing.assert_array_equal(read_label(folder / "labelsTs" / "phantom_005.nrrd", [0, 1, 2], read), label)
    np.testing.assert_allclose(read.direction, geometry.direction, atol=1e-6)
    assert read.spacing_mm == pytest.approx((1.0, 1.5, 2.0))


def test_bad_requests_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="classes: expected 1 to 6, got 7"):
        PhantomConfig(classes=7)
    with pytest.raises(ConfigError, match="at least 12"):
        PhantomConfig(shape=(48, 48, 4))
    with pytest.raises(ConfigError, match="noise_kind"):
        PhantomConfig(noise_kind="poisson")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="labelled <= cases"):
        write_phantom_dataset(tmp_path / "a", 2, 3)
    with pytest.raises(RunError, match=r"\.nii\.gz"):
        write_phantom_dataset(tmp_path / "b", 1, 1, SMALL, file_ending=".png")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x").touch()
    with pytest.raises(RunError, match="not empty"):
        write_phantom_dataset(tmp_path / "c", 1, 1, SMALL)


def test_smooth_fields_have_unit_variance_and_are_smooth() -> None:
    fields = smooth_fields(np.random.default_rng(0), (20, 24, 28), 200, 4)
    assert fields.shape == (200, 20, 24, 28)
    assert float(fields.var()) == pytest.approx(1.0, rel=0.15)
    steps = np.abs(np.diff(fields, axis=3)).mean()
    assert steps < 0.25


def test_shapes_are_signed_distances_in_the_scene_frame() -> None:
    """Without variety the frame is the volume: an oracle on all voxels, not only those of the shape's box."""
    levels = {"air": np.array([0.0]), "blood": np.array([1.0])}
    scene = Scene(np.random.default_rng(0), (30, 32, 34), 0.0, levels, {"organ": 3})
    ball, rod = scene.ellipsoid((0.1, -0.2, 0.0), (0.4, 0.4, 0.4)), scene.tube([(-0.5, 0, 0), (0.6, 0, 0)], 0.2, 0.2)
    x, y, z = np.meshgrid(*((2 * np.arange(n) + 1) / n - 1 for n in (30, 32, 34)), indexing="ij")
    in_ball = (x - 0.1) ** 2 + (y + 0.2) ** 2 + z**2 < 0.16
    in_rod = (x - np.clip(x, -0.5, 0.6)) ** 2 + y**2 + z**2 < 0.04
    for shape, expected in (
        (ball, in_ball),
        (rod, in_rod),
        (union(ball, rod), in_ball | in_rod),
        (clipped(ball, rod), in_ball & in_rod),
    ):
        scene.label[:] = 0
        scene.paint(shape, "blood", "organ")
        assert np.mean((scene.label == 3) != expected) < 1e-4
    scene.image[:] = 0
    scene.paint(ball, "blood")
    assert scene.image[0][in_ball].mean() > 0.9 and scene.image[0][~in_ball].mean() < 0.05
