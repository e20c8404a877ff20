"""Synthetic volumes with anatomy-like variety: a seed goes in; an image, its label and its grid come out.

A phantom is a chest-like scene in a frame of its own, ``[-1, 1]`` along each axis (x to the patient's right, y to the
front, z to the head): a body outline with rim, lungs and a spine; a chamber with four veins, a ventricle (a wall around
a pool), an arched vessel, a two-part lobe and a gland; and further blobs and tubes. The scene keeps its order from case
to case, so that much can be learnt from few cases, while pose, sizes, shapes and intensities change. Structures share
their intensities with others, so that a threshold cannot find them. No value is taken from a real scan.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from scarceseg.data.geometry import CANONICAL_DIRECTION
from scarceseg.data.images import write_image
from scarceseg.data.scene import Scene, Shape, clipped, grown, smooth_fields, union
from scarceseg.errors import ConfigError, RunError
from scarceseg.types import Geometry, LabelMap, Volume

STRUCTURES = ("chamber", "lobe", "wall", "pool", "vessel", "gland")
"""Structures in the order in which `PhantomConfig.classes` labels them. All are in every image, labelled or not."""

TISSUES = ("air", "lung", "bone", "soft", "muscle", "parenchyma", "fat", "blood")
FIRST_CHANNEL = (0.02, 0.12, 0.28, 0.42, 0.55, 0.68, 0.86, 0.92)
"""Intensity of each tissue in channel 0, before contrast and jitter."""

LINING = 0.045
"""Thickness of the dark layer around what holds blood, in the scene's frame."""

ARCH = (
    (-0.16, -0.42, -1.1),
    (-0.18, -0.44, -0.2),
    (-0.14, -0.36, 0.52),
    (-0.02, -0.05, 0.80),
    (0.12, 0.22, 0.55),
    (0.08, 0.24, 0.22),
)
"""Course of the vessel: up along the spine, over the chamber, and down to the ventricle."""

ATTEMPTS = 8


@dataclass(frozen=True)
class PhantomConfig:
    """What the volumes look like.

    Attributes:
        shape: voxels ``(X, Y, Z)``, at least 12 each. The scene always fills the volume.
        spacing_mm: voxel distances, also unequal ones.
        classes: how many of `STRUCTURES` are labelled, 1 to 6.
        channels: images of one case; each further one shows the same tissues with other intensities.
        variety: 0 makes all cases alike in shape and intensity, 1 is usual, 2 is wild.
        contrast: factor on the differences between tissues.
        noise: standard deviation; blood is about 0.9 and soft tissue 0.4 on this scale.
        noise_kind: "rician" as in magnitude MR images, or "gaussian".
        texture: relative amplitude of a fine pattern within tissues.
        bias: amplitude of the smooth multiplicative field (standard deviation of its logarithm).
        blur_voxel: standard deviation of the partial-volume blur.
        distractors: further blobs and tubes with the targets' intensities.
        pathology: probability that a case has lesions in some of its structures; the label takes no notice of them.
        oblique_deg: largest rotation of the grid in the world; voxels stay the same, only the direction changes.

    Raises:
        ConfigError: a value is out of its range.
    """

    shape: tuple[int, int, int] = (48, 48, 40)
    spacing_mm: tuple[float, float, float] = (2.0, 2.0, 2.0)
    classes: int = 2
    channels: int = 1
    variety: float = 1.0
    contrast: float = 1.0
    noise: float = 0.04
    noise_kind: Literal["rician", "gaussian"] = "rician"
    texture: float = 0.05
    bias: float = 0.08
    blur_voxel: float = 0.5
    distractors: int = 4
    pathology: float = 0.25
    oblique_deg: float = 0.0

    def __post_init__(self) -> None:
        limits: dict[str, tuple[float, float]] = {
            "classes": (1, len(STRUCTURES)),
            "channels": (1, 16),
            "variety": (0, 3),
            "contrast": (0.05, 3),
            "noise": (0, 2),
            "texture": (0, 1),
            "bias": (0, 1),
            "blur_voxel": (0, 5),
            "distractors": (0, 50),
            "pathology": (0, 1),
            "oblique_deg": (0, 180),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"phantom {name}: expected {low} to {high}, got {value}")
        if len(self.shape) != 3 or min(self.shape) < 12:
            raise ConfigError(f"phantom shape: expected three sides of at least 12 voxels, got {self.shape}")
        if len(self.spacing_mm) != 3 or not all(0.01 <= s <= 100 for s in self.spacing_mm):
            raise ConfigError(f"phantom spacing_mm: expected three values from 0.01 to 100, got {self.spacing_mm}")
        if self.noise_kind not in ("rician", "gaussian"):
            raise ConfigError(f"phantom noise_kind: expected rician or gaussian, got {self.noise_kind!r}")

    @property
    def labels(self) -> dict[str, int]:
        """Class numbers by name, as in ``dataset.json``."""
        return {"background": 0} | {name: value for value, name in enumerate(STRUCTURES[: self.classes], 1)}


def make_phantom(seed: int | Sequence[int], config: PhantomConfig | None = None) -> tuple[Volume, LabelMap, Geometry]:
    """Make one case. Equal seed and config give equal arrays.

    Args:
        seed: one number, or several such as ``(dataset, case)``.
        config: None takes the defaults.

    Returns:
        Image ``[C, X, Y, Z]`` (not negative for Rician noise, of the order of 1000), label ``[X, Y, Z]`` with every
        class of ``config.labels`` present, and the grid.

    Raises:
        ConfigError: the volume is too small for a class to have a voxel.
    """
    config = config or PhantomConfig()
    key = [seed] if isinstance(seed, int) else list(seed)
    for attempt in range(ATTEMPTS):
        rng = np.random.default_rng([*key, attempt])
        scene = Scene(rng, config.shape, config.variety, _intensities(rng, config), config.labels)
        _paint_surroundings(scene, config.distractors)
        _paint_targets(scene, config.pathology)
        if np.all(np.bincount(scene.label.ravel(), minlength=config.classes + 1)):
            return _measure(scene.image, rng, config), scene.label, _grid(rng, config)
    raise ConfigError(
        f"a phantom of {config.shape} voxels is too small to hold {config.classes} classes: enlarge the shape"
    )


def write_phantom_dataset(
    folder: Path,
    cases: int,
    labelled: int,
    config: PhantomConfig | None = None,
    seed: int = 0,
    test_cases: int = 0,
    file_ending: str = ".nii.gz",
) -> Path:
    """Write a dataset in nnU-Net raw layout: ``dataset.json``, ``imagesTr``, ``labelsTr``, ``imagesTs``, ``labelsTs``.

    Args:
        folder: to make; it must not exist or be empty.
        cases: number of training volumes, ``phantom_000`` and on.
        labelled: the first so many get a file in ``labelsTr``.
        config: of the volumes; None takes the defaults.
        seed: of the whole dataset.
        test_cases: further volumes, numbered on, with images in ``imagesTs`` and references in ``labelsTs``.
        file_ending: ``.nii.gz``, ``.nii``, ``.nrrd`` or ``.mha``.

    Returns:
        `folder`.

    Raises:
        ConfigError: impossible numbers of cases.
        RunError: the folder is taken or cannot be written, or an ending that cannot be written.
    """
    config = config or PhantomConfig()
    if cases < 1 or not 0 <= labelled <= cases or test_cases < 0:
        raise ConfigError(
            "a phantom dataset needs cases >= 1, 0 <= labelled <= cases and test_cases >= 0, "
            f"got cases={cases}, labelled={labelled}, test_cases={test_cases}"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} exists and is not empty: choose another folder for the phantoms")
    try:
        for part in ("imagesTr", "labelsTr", *(("imagesTs", "labelsTs") if test_cases else ())):
            (folder / part).mkdir(parents=True)
        facts = {
            "name": folder.name,
            "description": "Synthetic volumes, made by a generator; not from patients.",
            "channel_names": {str(c): f"synthetic {c}" for c in range(config.channels)},
            "labels": config.labels,
            "numTraining": labelled,
            "file_ending": file_ending,
        }
        (folder / "dataset.json").write_text(json.dumps(facts, indent=1) + "\n")
    except OSError as error:
        raise RunError(f"cannot write {folder}: {error.strerror or error}; choose another folder") from None
    for number in range(cases + test_cases):
        suffix = "Tr" if number < cases else "Ts"
        name = f"phantom_{number:03d}"
        volume, label, geometry = make_phantom((seed, number), config)
        for channel, image in enumerate(volume):
            # Whole numbers as scanners give: a third of the size on disk.
            stored = np.clip(np.rint(image), -32768, 32767).astype(np.int16)
            write_image(stored, geometry, folder / f"images{suffix}" / f"{name}_{channel:04d}{file_ending}")
        if number < labelled or number >= cases:
            write_image(label, geometry, folder / f"labels{suffix}" / f"{name}{file_ending}")
    return folder


def _intensities(rng: np.random.Generator, config: PhantomConfig) -> dict[str, NDArray[np.float64]]:
    """Intensity of each tissue in each channel ``[C]``; the table is fixed, the jitter belongs to the case."""
    table = np.empty((len(TISSUES), config.channels))
    table[:, 0] = FIRST_CHANNEL
    for channel in range(1, config.channels):
        table[:, channel] = np.random.default_rng([2718, channel]).uniform(0.1, 0.9, len(TISSUES))
        table[0, channel] = FIRST_CHANNEL[0]
    soft = table[TISSUES.index("soft")]
    table = soft + config.contrast * (table - soft)
    table += rng.normal(0, 0.015 * config.variety, table.shape)
    return {name: np.maximum(values, 0.0) for name, values in zip(TISSUES, table, strict=True)}


def _paint_surroundings(scene: Scene, distractors: int) -> None:
    """Body with fat and muscle rims, lungs, spine, and the distractors; none of it is labelled."""
    rng = scene.rng
    body = scene.ellipsoid((0, 0, 0), (0.98, 0.90, 1.5), power=2.8, bump=0.02)
    for depth, tissue in ((0.0, "fat"), (0.07, "muscle"), (0.15, "soft")):
        scene.paint(grown(body, -depth), tissue)
    for side in (-1, 1):
        scene.paint(scene.ellipsoid((0.62 * side, 0.0, 0.45), (0.20, 0.48, 0.52), bump=0.02), "lung")
    scene.paint(scene.tube([(0, -0.72, -1.2), (0, -0.66, 0), (0, -0.72, 1.2)], 0.13, 0.13), "bone")
    within = grown(body, -0.05)
    for _ in range(distractors):
        centre = rng.uniform((-0.7, -0.6, -0.9), (0.7, 0.65, 0.9))
        tissue = str(rng.choice(["blood", "muscle", "parenchyma"]))
        if rng.random() < 0.5:
            shape = scene.ellipsoid(centre.tolist(), rng.uniform(0.08, 0.2, 3).tolist(), bump=0.02)
        else:
            other = centre + rng.uniform(-0.5, 0.5, 3)
            shape = scene.tube([centre.tolist(), other.tolist()], rng.uniform(0.05, 0.09), rng.uniform(0.04, 0.07))
        scene.paint(clipped(grown(shape, LINING), within), "soft")
        scene.paint(clipped(shape, within), tissue)


def _paint_targets(scene: Scene, pathology: float) -> None:
    """The six structures; the chamber and the vessel get a thin dark lining, so that neighbours are told apart."""
    lobe = union(
        scene.ellipsoid((0.42, 0.05, -0.72), (0.42, 0.46, 0.30), 10, 2.4, 0.03),
        scene.ellipsoid((0.02, 0.24, -0.78), (0.34, 0.26, 0.20), 0, 2.0, 0.02),
    )
    gland = scene.ellipsoid((-0.62, -0.28, -0.66), (0.17, 0.27, 0.24), 20, 2.0, 0.02)
    vessel = scene.tube(ARCH, 0.11, 0.13)
    wall = scene.ellipsoid((-0.24, 0.28, -0.22), (0.37, 0.36, 0.40), -20, 2.0, 0.02)
    pool = grown(wall, -0.13 * float(np.exp(scene.rng.normal(0, 0.08 * scene.variety))))
    parts: list[tuple[str, str, Shape]] = [
        ("lobe", "parenchyma", lobe),
        ("gland", "parenchyma", gland),
        ("vessel", "blood", vessel),
        ("wall", "muscle", wall),
        ("pool", "blood", pool),
        ("chamber", "blood", _chamber(scene)),
    ]
    for name, tissue, shape in parts:
        if name in ("vessel", "chamber"):
            scene.paint(grown(shape, LINING), "soft")
        scene.paint(shape, tissue, name)
    if scene.rng.random() < pathology:
        for index in scene.rng.choice([0, 1, 3, 5], size=2, replace=False):
            scene.lesion(parts[index][2])


def _chamber(scene: Scene) -> Shape:
    """A rounded chamber and four veins that leave it to both sides, as from a left atrium."""
    parts = [scene.ellipsoid((0.10, -0.14, 0.16), (0.36, 0.25, 0.28), 0, 2.3, 0.02)]
    for side, up in ((-1, 1), (-1, -1), (1, 1), (1, -1)):
        root = (0.10 + 0.24 * side, -0.18, 0.16 + 0.12 * up)
        bend = (0.10 + 0.42 * side, -0.24, 0.18 + 0.17 * up)
        tip = (0.10 + 0.58 * side, -0.30, 0.18 + 0.24 * up)
        parts.append(scene.tube([root, bend, tip], 0.105, 0.075))
    return union(*parts)


def _measure(image: Volume, rng: np.random.Generator, config: PhantomConfig) -> Volume:
    """What a scanner adds: texture, bias field, partial volume, noise, and a scale of its own."""
    gain = np.exp(np.float32(config.bias) * smooth_fields(rng, config.shape, config.channels, 2))
    level = np.float32(config.noise * np.exp(rng.normal(0, 0.15 * config.variety)))
    for channel in range(config.channels):
        grain = ndimage.gaussian_filter(rng.standard_normal(config.shape, dtype=np.float32), 1.0, truncate=2)
        clean = image[channel] * (1 + grain * (np.float32(config.texture) / grain.std())) * gain[channel]
        if config.blur_voxel > 0:
            clean = ndimage.gaussian_filter(clean, config.blur_voxel, mode="nearest", truncate=3)
        clean += level * rng.standard_normal(config.shape, dtype=np.float32)
        if config.noise_kind == "rician":
            clean = np.hypot(clean, level * rng.standard_normal(config.shape, dtype=np.float32))
        image[channel] = clean * np.float32(1000 * np.exp(rng.normal(0, 0.2 * config.variety)))
    return image


def _grid(rng: np.random.Generator, config: PhantomConfig) -> Geometry:
    """The volume's middle lies within about 2 cm of the world's; the direction is canonical or turned from it."""
    angles = rng.uniform(-1, 1, 3) * config.oblique_deg / 3
    direction = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ np.reshape(CANONICAL_DIRECTION, (3, 3))
    half = (np.asarray(config.shape) - 1) / 2 * config.spacing_mm
    x, y, z = (float(value) for value in np.round(rng.uniform(-20, 20, 3) - direction @ half, 3))
    sx, sy, sz = config.shape
    px, py, pz = (float(value) for value in config.spacing_mm)
    return Geometry((sx, sy, sz), (px, py, pz), (x, y, z), tuple(float(value) for value in direction.ravel()))
