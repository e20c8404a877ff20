"""Affine registration by mutual information, from coarse to fine, in the box frame."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

BINS = 32
"""Histogram bins of the mutual information."""


SHRINK = (2, 1)
"""Reduction per level, coarse to fine; each level is smoothed by half its reduction."""


def affine_register(
    fixed: sitk.Image, moving: sitk.Image, start: sitk.AffineTransform, iterations: int, sampling: float, seed: int
) -> sitk.AffineTransform:
    """Transform of fixed to moving points.

    Mattes mutual information (Mattes et al. 2003), linear interpolation, regular-step gradient descent whose steps are
    scaled by how far each parameter moves points.

    Args:
        fixed, moving: images in one frame.
        start: where to begin; left as it is.
        iterations: at most, per level.
        sampling: share of voxels the metric reads, (0, 1]; 1 reads all of them.
        seed: of the choice of voxels.

    Raises:
        RuntimeError: from the library, where the images do not overlap or cannot be compared.
    """
    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)
    method.SetMetricAsMattesMutualInformation(BINS)
    if sampling < 1:
        method.SetMetricSamplingStrategy(method.RANDOM)
        method.SetMetricSamplingPercentage(sampling, seed + 1)  # 0 stands for the clock
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=2.0,
        minStep=0.02,
        numberOfIterations=iterations,
        relaxationFactor=0.6,
        gradientMagnitudeTolerance=1e-5,
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel(SHRINK)
    method.SetSmoothingSigmasPerLevel([0.5 * s if s > 1 else 0.0 for s in SHRINK])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOff()
    found = sitk.AffineTransform(start)
    method.SetInitialTransform(found, inPlace=True)
    method.Execute(fixed, moving)
    return found


def scaled(scale: NDArray[np.float64]) -> sitk.AffineTransform:
    """Affine transform that stretches each axis."""
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(np.diag(scale).ravel().tolist())
    return transform
