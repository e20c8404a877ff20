"""Synthetic volumes for pre-training: regions without anatomy, intensities without meaning, and things to point at.

A volume is an arg-max of smooth noise (tissue), over which ellipsoids, tubes and shells are painted (objects), with walls between
some regions. Regions draw their intensity from a small palette, so that several share one; then come texture, partial volume,
coarse slices, bias field and noise. Nothing is taken from a real scan.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from scarceseg.data.scene import smooth_fields

Field = NDArray[np.float32]
Mask = NDArray[np.bool_]
Range = tuple[float, float]
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Setting:
    """Ranges the generator draws from; lengths in voxels, intensities on a palette in [0, 1].

    Attributes:
        tissues: regions of the smooth noise.
        cells: coarsest spline pieces along the longest axis; each octave doubles them.
        octaves: levels of noise added up.
        objects: ellipsoids, each with tubes and shells of its own.
        radius: semi-axes of the ellipsoids.
        elongation: factor between semi-axes.
        bump: relative unevenness of an object's surface.
        tubes: tubes leaving an object.
        shell: thickness of a shell around an object.
        palette: number of intensities that all regions share.
        jitter: standard deviation of a region's intensity around its palette entry.
        texture: amplitude of texture inside a region.
        bias: amplitude of the smooth multiplicative field.
        blur: standard deviation of the point spread, per axis.
        noise: standard deviation of the noise.
        coarse: factors of thicker slices, drawn for one axis in `coarse_share` of the volumes.
    """

    tissues: tuple[int, int] = (2, 8)
    cells: Range = (1.5, 6.0)
    octaves: tuple[int, int] = (1, 3)
    objects: tuple[int, int] = (1, 7)
    radius: Range = (4.0, 26.0)
    elongation: float = 1.8
    bump: Range = (0.0, 0.35)
    tubes: tuple[int, int] = (0, 4)
    shell: Range = (1.0, 4.0)
    shell_share: float = 0.4
    wall_share: float = 0.4
    palette: tuple[int, int] = (3, 8)
    jitter: Range = (0.0, 0.05)
    texture: Range = (0.0, 0.12)
    bias: Range = (0.0, 0.4)
    blur: Range = (0.3, 1.2)
    noise: Range = (0.01, 0.11)
    coarse: tuple[int, int] = (2, 3)
    coarse_share: float = 0.3


TRAINING = Setting()
UNSEEN = Setting(
    tissues=(6, 14),
    cells=(5.0, 8.0),
    octaves=(2, 4),
    objects=(6, 12),
    radius=(3.0, 14.0),
    elongation=2.6,
    bump=(0.3, 0.5),
    shell_share=0.7,
    wall_share=0.8,
    palette=(2, 3),
    texture=(0.1, 0.2),
    noise=(0.12, 0.2),
    coarse_share=0.7,
)
"""Smaller, rougher, noisier and with fewer intensities than anything in `TRAINING`: for judging, never for training."""


@dataclass
class SyntheticVolume:
    """One volume.

    Attributes:
        image: ``[X, Y, Z]`` z-scored intensities.
        region: ``[X, Y, Z]`` index of the elementary region.
        unions: sets of regions that belong together (an object with its shell and tubes; all objects of a kind).
        compact: regions that are objects rather than tissue.
    """

    image: Field
    region: NDArray[np.uint8]
    unions: list[tuple[int, ...]] = field(default_factory=list)
    compact: list[int] = field(default_factory=list)


def make_volume(rng: np.random.Generator, shape: Shape, setting: Setting = TRAINING) -> SyntheticVolume:
    """Draw one volume.

    Args:
        rng: all randomness comes from it.
        shape: voxels ``(X, Y, Z)``.
        setting: ranges to draw from.
    """
    canvas = _Canvas(rng, shape, setting)
    canvas.tissue()
    for _ in range(rng.integers(setting.objects[0], setting.objects[1] + 1)):
        canvas.object()
    if rng.random() < setting.wall_share:
        canvas.walls()
    return SyntheticVolume(_image(rng, canvas.region, setting), canvas.region, canvas.unions, canvas.compact)


def _log_uniform(rng: np.random.Generator, span: Range, size: int | None = None) -> NDArray[np.float64]:
    return np.exp(rng.uniform(np.log(span[0]), np.log(span[1]), size))


class _Canvas:
    def __init__(self, rng: np.random.Generator, shape: Shape, setting: Setting) -> None:
        self.rng, self.shape, self.setting = rng, shape, setting
        self.region = np.zeros(shape, np.uint8)
        self.unions: list[tuple[int, ...]] = []
        self.compact: list[int] = []
        self.next = 0

    def _new(self) -> int:
        self.next = min(self.next + 1, 255)
        return self.next

    def tissue(self) -> None:
        """Fill the volume: arg-max of several octaves of noise, on part of the volumes only inside of a body."""
        rng, setting = self.rng, self.setting
        count = int(rng.integers(setting.tissues[0], setting.tissues[1] + 1))
        coarsest = _log_uniform(rng, setting.cells) * np.asarray(self.shape) / max(self.shape)
        coarsest = coarsest * _log_uniform(rng, (0.7, 1.4), 3)
        octaves = int(rng.integers(setting.octaves[0], setting.octaves[1] + 1))
        fade = rng.uniform(0.25, 0.6)
        total = rng.normal(0, 0.5, count).astype(np.float32)[:, None, None, None]
        for octave in range(octaves):
            cells = [max(1, round(c * 2**octave)) for c in coarsest]
            total = total + np.float32(fade**octave) * smooth_fields(rng, self.shape, count, cells)
        self.region = total.argmax(axis=0).astype(np.uint8)
        self.next = count - 1
        if rng.random() < 0.25:
            outside = self._ellipsoid(
                np.asarray(self.shape) * rng.uniform(0.35, 0.65, 3), np.asarray(self.shape) * rng.uniform(0.45, 0.7, 3)
            )
            self.region[outside[...] > 0] = self._new()

    def _ellipsoid(self, centre: NDArray[np.float64], radii: NDArray[np.float64], bump: float = 0.1) -> Field:
        """Signed distance (about, in voxels; negative inside) to a turned, uneven ellipsoid."""
        turn = Rotation.random(None, self.rng).as_matrix() / radii  # the name of the second argument changed
        grid = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in self.shape), indexing="ij", sparse=True)
        offsets = [axis - np.float32(c) for axis, c in zip(grid, centre, strict=True)]
        total = np.zeros(self.shape, np.float32)
        for row in turn:
            local = sum(np.float32(w) * axis for w, axis in zip(row, offsets, strict=True))
            total += np.square(local)
        uneven = smooth_fields(self.rng, self.shape, 1, int(self.rng.integers(2, 7)))[0]
        distance: Field = (np.sqrt(total) - 1 + np.float32(bump) * uneven) * np.float32(radii.min())
        return distance

    def _tube(self, start: NDArray[np.float64], along: NDArray[np.float64], radius: float) -> Field:
        """Signed distance to a bent tube that leaves `start` in the direction `along`."""
        length = self.rng.uniform(1.0, 2.5)
        bend = self.rng.normal(0, 0.35, (2, 3)) * np.linalg.norm(along)
        corners = np.stack([start, start + along * length / 2 + bend[0], start + along * length + bend[1]])
        t = np.linspace(0, 1, 14)[:, None]
        path = (1 - t) ** 2 * corners[0] + 2 * t * (1 - t) * corners[1] + t**2 * corners[2]
        distance = np.full(self.shape, np.float32(1e3))
        reach = radius + 6
        low = np.clip(np.floor(path.min(0) - reach).astype(int), 0, self.shape)
        high = np.clip(np.ceil(path.max(0) + reach).astype(int) + 1, 0, self.shape)
        if (high <= low).any():
            return distance
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        grid = np.meshgrid(*(np.arange(a, b, dtype=np.float32) for a, b in zip(low, high, strict=True)), indexing="ij")
        voxels = np.stack([axis.ravel() for axis in grid], 1)
        path32 = path.astype(np.float32)
        squares = (voxels**2).sum(1)[:, None] - 2 * voxels @ path32.T + (path32**2).sum(1)
        distance[box] = (np.sqrt(np.maximum(squares.min(1), 0)) - np.float32(radius)).reshape(distance[box].shape)
        return distance

    def object(self) -> None:
        """An uneven ellipsoid, perhaps with tubes (of the same region or of their own), a core and a shell."""
        rng, setting = self.rng, self.setting
        radii = _log_uniform(rng, setting.radius) * _log_uniform(rng, (1 / setting.elongation, setting.elongation), 3)
        radii = np.minimum(np.maximum(radii, 2.0), 0.6 * np.asarray(self.shape))
        centre = rng.uniform(0, 1, 3) * np.asarray(self.shape)
        distance = self._ellipsoid(centre, radii, rng.uniform(*setting.bump))
        body, together = self._new(), []
        tubes: list[Field] = []
        for _ in range(rng.integers(setting.tubes[0], setting.tubes[1] + 1) if rng.random() < 0.5 else 0):
            direction = rng.normal(0, 1, 3)
            along = direction / np.linalg.norm(direction) * radii
            tubes.append(self._tube(centre + 0.6 * along, along, rng.uniform(1.5, max(0.45 * radii.min(), 2.0))))
        own = bool(tubes) and rng.random() < 0.5
        whole = np.minimum.reduce([distance, *tubes]) if tubes and not own else distance
        if rng.random() < setting.shell_share:
            shell = self._new()
            self.region[whole < np.float32(rng.uniform(*setting.shell))] = shell
            together.append(shell)
        if own:
            branch = self._new()
            for tube in tubes:
                self.region[tube < 0] = branch
            together.append(branch)
        self.region[whole < 0] = body
        self.compact.append(body)
        if rng.random() < 0.25:
            core = self._new()
            self.region[whole < -np.float32(rng.uniform(0.2, 0.6) * radii.min())] = core
            together.append(core)
        for count in range(1, len(together) + 1):
            self.unions.append((body, *together[:count]))

    def walls(self) -> None:
        """A thin region of its own between some of the others."""
        size = int(self.rng.choice([2, 3, 3, 5]))
        low = ndimage.minimum_filter(self.region, size)
        high = ndimage.maximum_filter(self.region, size)
        chosen = self.rng.random(256) < self.rng.uniform(0.3, 1.0)
        self.region[(low != high) & chosen[high]] = self._new()


def _image(rng: np.random.Generator, region: NDArray[np.uint8], setting: Setting) -> Field:
    shape = region.shape
    palette = rng.uniform(0, 1, int(rng.integers(setting.palette[0], setting.palette[1] + 1)))
    level = palette[rng.integers(0, len(palette), 256)] + rng.normal(0, rng.uniform(*setting.jitter), 256)
    image = level.astype(np.float32)[region]
    amplitude = rng.uniform(*setting.texture) * rng.random(256).astype(np.float32)
    for cells in (int(rng.integers(3, 6)), int(rng.integers(8, 20))):
        image += amplitude[region] * smooth_fields(rng, shape, 1, cells)[0]
    image = ndimage.gaussian_filter(
        image, _log_uniform(rng, setting.blur) * _log_uniform(rng, (0.8, 1.25), 3), truncate=2.5
    )
    if rng.random() < setting.coarse_share:
        image = _thick_slices(image, int(rng.integers(3)), int(rng.integers(setting.coarse[0], setting.coarse[1] + 1)))
    image = image * np.exp(
        np.float32(rng.uniform(*setting.bias)) * smooth_fields(rng, shape, 1, int(rng.integers(1, 3)))[0]
    )
    noise = rng.standard_normal(shape, dtype=np.float32)
    if rng.random() < 0.5:
        noise = ndimage.gaussian_filter(noise, rng.uniform(0.4, 0.9), truncate=2.5)
        noise /= noise.std()
    image = image + np.float32(_log_uniform(rng, setting.noise)) * noise
    if rng.random() < 0.3:  # magnitude images have no negative values
        image = np.abs(image - np.float32(min(palette.min(), 0.0)))
    if rng.random() < 0.5:
        image = -image if rng.random() < 0.5 else np.sign(image) * np.abs(image) ** np.float32(rng.uniform(0.7, 1.4))
    image -= image.mean()
    scaled: Field = (image / np.float32(image.std() + 1e-6)).astype(np.float32)
    return scaled


def _thick_slices(image: Field, axis: int, factor: int) -> Field:
    """Average `factor` neighbouring slices and put linearly interpolated ones back in their place."""
    moved = np.moveaxis(image, axis, 0)
    count = moved.shape[0] // factor
    if count < 2:
        return image
    thick = moved[: count * factor].reshape(count, factor, *moved.shape[1:]).mean(1)
    at = np.clip((np.arange(moved.shape[0]) + 0.5) / factor - 0.5, 0, count - 1)
    low = np.minimum(at.astype(int), count - 2)
    share = (at - low).astype(np.float32)[:, None, None]
    return np.moveaxis(thick[low] * (1 - share) + thick[low + 1] * share, 0, axis)


def draw_target(rng: np.random.Generator, volume: SyntheticVolume, share: Range = (0.004, 0.45)) -> Mask | None:
    """Something to point at: an object, an object with what belongs to it, a tissue, or one connected part of it.

    Args:
        rng: all randomness comes from it.
        volume: of `make_volume`.
        share: allowed part of the volume's voxels.

    Returns:
        ``[X, Y, Z]``, or None where several draws gave nothing of a fitting size.
    """
    counts = np.bincount(volume.region.ravel(), minlength=256)
    voxels = volume.region.size
    present = [int(r) for r in np.flatnonzero(counts)]
    for _ in range(12):
        kind = rng.random()
        if kind < 0.35 and volume.compact:
            chosen: tuple[int, ...] = (int(rng.choice(volume.compact)),)
        elif kind < 0.6 and volume.unions:
            chosen = volume.unions[int(rng.integers(len(volume.unions)))]
        else:
            chosen = (int(rng.choice(present)),)
        size = counts[list(chosen)].sum() / voxels
        if size < share[0]:
            continue
        mask = np.isin(volume.region, chosen) if len(chosen) > 1 else volume.region == chosen[0]
        if rng.random() < 0.6:
            parts, _ = ndimage.label(mask)
            inside = np.flatnonzero(mask)
            mask = parts == parts.ravel()[inside[rng.integers(len(inside))]]
            size = mask.sum() / voxels
        if share[0] <= size <= share[1]:
            return mask
    return None
