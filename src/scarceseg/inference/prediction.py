"""A volume on its way through the network: prepared before it, predicted after it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr

from scarceseg.data.prepare import most_probable, restore
from scarceseg.types import Geometry, LabelMap, Volume


@dataclass(frozen=True)
class Prepared:
    """A volume as the network reads it, with the grid it has and the grid it came from."""

    image: Volume
    geometry: Geometry
    original: Geometry


class Maps(ABC):
    """What is said about one volume; every map has the grid of the input and is made when first asked for.

    Attributes:
        geometry: grid of the input.
    """

    geometry: Geometry

    @property
    @abstractmethod
    def classes(self) -> int:
        """How many there are, with the background."""

    @property
    @abstractmethod
    def is_number(self) -> bool:
        """Whether the probability is one everywhere; a network that overflows gives NaN."""

    @abstractmethod
    def probability_of(self, index: int) -> NDArray[np.float32]:
        """One class, ``[X, Y, Z]`` float32 in [0, 1], without the memory of the others."""

    @cached_property
    def label(self) -> LabelMap:
        """Most probable class of each voxel ``[X, Y, Z]``, uint8."""
        return most_probable(self.probability_of(index) for index in range(self.classes))

    @cached_property
    def uncertainty(self) -> NDArray[np.float32]:
        """Entropy of the class probabilities over ln K, ``[X, Y, Z]`` float32: 0 certain, 1 all classes alike."""
        total = np.zeros(self.geometry.size, dtype=np.float32)
        for index in range(self.classes):
            total += entr(self.probability_of(index))
        return np.clip(total / np.float32(np.log(self.classes)), 0.0, 1.0)


@dataclass(frozen=True)
class Prediction(Maps):
    """What the network says about one volume.

    Attributes:
        prepared_probability: ``[K, X', Y', Z']`` on the prepared grid.
        prepared: the prepared grid.
        geometry: grid of the input.
    """

    prepared_probability: NDArray[np.float32]
    prepared: Geometry
    geometry: Geometry

    @property
    def classes(self) -> int:
        """How many there are, with the background."""
        return len(self.prepared_probability)

    @property
    def is_number(self) -> bool:
        """Whether the probability is one everywhere; a network that overflows gives NaN."""
        return bool(np.isfinite(self.prepared_probability.sum(dtype=np.float64)))

    @cached_property
    def probability(self) -> NDArray[np.float32]:
        """``[K, X, Y, Z]`` float32 in [0, 1], sum 1 over K."""
        return restore(self.prepared_probability, self.prepared, self.geometry)

    def probability_of(self, index: int) -> NDArray[np.float32]:
        """One class of `probability`, ``[X, Y, Z]``, without the memory of the others."""
        return restore(self.prepared_probability[index : index + 1], self.prepared, self.geometry)[0]


@dataclass(frozen=True)
class MeanPrediction(Maps):
    """What several networks say about one volume: the mean of their probabilities, on the grid of the input.

    Attributes:
        parts: of each network; they may have worked on different grids.
        geometry: grid of the input.
    """

    parts: tuple[Prediction, ...]
    geometry: Geometry

    @property
    def classes(self) -> int:
        """How many there are, with the background."""
        return self.parts[0].classes

    @property
    def is_number(self) -> bool:
        """Whether the probability of every network is one everywhere."""
        return all(part.is_number for part in self.parts)

    def probability_of(self, index: int) -> NDArray[np.float32]:
        """Mean of one class, ``[X, Y, Z]``."""
        total = self.parts[0].probability_of(index)
        for part in self.parts[1:]:
            total += part.probability_of(index)
        return total / np.float32(len(self.parts))
