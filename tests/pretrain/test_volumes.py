"""The generator of synthetic volumes: seeded, in range, and fed by nothing but chance."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from scarceseg.pretrain import volumes
from scarceseg.pretrain.volumes import TRAINING, UNSEEN, Setting, SyntheticVolume, draw_target, make_volume

SHAPES = [(32, 24, 16), (17, 21, 13), (16, 16, 49)]
HARMLESS = {"__future__", "collections", "dataclasses", "numpy", "scarceseg", "scipy", "torch", "typing"}
SETTINGS = {"training": TRAINING, "unseen": UNSEEN}


def made(seed: int = 0, shape: tuple[int, int, int] = (32, 24, 16), setting: Setting = TRAINING) -> SyntheticVolume:
    return make_volume(np.random.default_rng(seed), shape, setting)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_volumes_are_z_scored_and_their_regions_make_sense(shape: tuple[int, int, int], setting: Setting) -> None:
    counts = []
    for seed in range(6):
        volume = made(seed, shape, setting)
        assert volume.image.shape == volume.region.shape == shape
        assert volume.image.dtype == np.float32 and volume.region.dtype == np.uint8
        assert np.isfinite(volume.image).all()
        assert abs(float(volume.image.mean())) < 1e-3 and abs(float(volume.image.std()) - 1) < 1e-3
        drawn = {r for union in volume.unions for r in union} | set(volume.compact)
        most = setting.tissues[1] + 1 + 4 * setting.objects[1] + 1  # a body, its shell, branches and core; the walls
        assert volume.region.max() < most and drawn <= set(range(1, most))
        assert setting.objects[0] <= len(volume.compact) <= setting.objects[1]
        assert all(union[0] in volume.compact and len(set(union)) == len(union) for union in volume.unions)
        counts.append(len(np.unique(volume.region)))
    assert min(counts) >= 2 and len(set(counts)) > 1


def test_equal_seeds_give_equal_volumes_and_targets() -> None:
    one, again, other = made(3), made(3), made(4)
    assert np.array_equal(one.image, again.image) and np.array_equal(one.region, again.region)
    assert one.unions == again.unions and one.compact == again.compact
    assert not np.array_equal(one.region, other.region)
    targets = [draw_target(np.random.default_rng(5), volume) for volume in (one, again)]
    assert targets[0] is not None and targets[1] is not None and np.array_equal(*targets)
    np.random.seed(0)  # noqa: NPY002
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    made(5)
    assert np.array_equal(np.random.get_state()[1], state), "chance comes from the given generator alone"  # noqa: NPY002


@pytest.mark.parametrize(
    "change",
    [
        {"tissues": (12, 12)},
        {"objects": (9, 9)},
        {"noise": (0.5, 0.6)},
        {"blur": (3.0, 4.0)},
        {"bias": (2.0, 3.0)},
        {"palette": (2, 2)},
        {"texture": (0.5, 0.6)},
        {"radius": (2.0, 3.0)},
        {"coarse_share": 1.0, "coarse": (4, 4)},
    ],
)
def test_another_setting_gives_another_volume(change: dict[str, tuple[float, float]]) -> None:
    setting = replace(TRAINING, **change)  # type: ignore[arg-type]
    assert any(not np.array_equal(made(seed, setting=setting).image, made(seed).image) for seed in range(3))


def test_settings_do_what_they_say() -> None:
    def roughness(setting: Setting) -> float:
        images = [made(seed, setting=setting).image for seed in range(4)]
        return float(np.mean([np.abs(np.diff(image, axis=0)).mean() for image in images]))

    assert roughness(replace(TRAINING, noise=(0.5, 0.6))) > 1.5 * roughness(replace(TRAINING, noise=(1e-3, 2e-3)))
    many = replace(TRAINING, objects=(6, 6), wall_share=0.0)
    few = replace(TRAINING, objects=(1, 1), wall_share=0.0)
    assert len(made(setting=many).compact) == 6 and len(made(setting=few).compact) == 1
    bare = replace(few, tissues=(3, 3), shell_share=0.0, tubes=(0, 0))
    assert max(int(made(seed, setting=bare).region.max()) for seed in range(4)) <= 3 + 1 + 1  # outside, body, core


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_targets_have_a_fitting_size_and_are_made_of_regions(setting: Setting) -> None:
    share = (0.01, 0.4)
    found, whole, parts = 0, 0, 0
    for seed in range(8):
        volume = made(seed, setting=setting)
        rng = np.random.default_rng(seed)
        for _ in range(4):
            mask = draw_target(rng, volume, share)
            if mask is None:
                continue
            found += 1
            assert mask.shape == volume.region.shape and mask.dtype == np.bool_
            assert share[0] <= mask.mean() <= share[1]
            inside = np.isin(volume.region, np.unique(volume.region[mask]))
            # Either all voxels of some regions, or one connected part of them.
            if np.array_equal(inside, mask):
                whole += 1
            else:
                pieces, count = ndimage.label(inside)
                assert count > 1 and len(np.unique(pieces[mask])) == 1
                assert (pieces == pieces[mask][0]).sum() == mask.sum()
                parts += 1
    assert found > 20 and whole and parts


def test_nothing_fits_an_impossible_share() -> None:
    assert draw_target(np.random.default_rng(0), made(), (0.9999, 1.0)) is None


def test_the_unseen_setting_lies_outside_of_the_training_one() -> None:
    """Noise and number of intensities overlap nowhere or nearly so; it is for judging."""
    assert UNSEEN.noise[0] > TRAINING.noise[1] and UNSEEN.palette[1] <= TRAINING.palette[0]
    assert UNSEEN.octaves[0] > TRAINING.octaves[0] and UNSEEN.elongation > TRAINING.elongation


def test_the_generator_reads_no_file() -> None:
    """Neither it nor what it imports from this package knows how to open an image."""
    source = Path(volumes.__file__)
    root = source.parents[2]
    seen, waiting = set(), [source]
    while waiting:
        path = waiting.pop()
        seen.add(path)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {n.name for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names}
        names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        packages = {name.split(".")[0] for name in names}
        assert packages <= HARMLESS, path
        calls = {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        methods = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not {"open", "exec", "eval", "__import__"} & calls, path
        assert not {"load", "fromfile", "memmap", "loadtxt", "genfromtxt", "read_text", "read_bytes"} & methods, path
        for name in names:
            if name.startswith("scarceseg."):
                file = root / (name.replace(".", "/") + ".py")
                assert file.exists(), name
                if file not in seen:
                    waiting.append(file)
    assert source in seen and len(seen) >= 2
