"""The page that lies in a MONAI bundle: what the network is, how it is run, and how far two ways of running it agree."""

from __future__ import annotations

from scarceseg.data.plan import Normalisation
from scarceseg.inference.export_network import Facts
from scarceseg.inference.model import ModelInfo

_PAGE = """\
# {name}

A {network} network that segments {targets} in 3D images. It was trained by ScarceSeg {version} on the dataset `{dataset}`.
Not a medical device.

| | |
|---|---|
| input channels | {channels} |
| classes | {classes} |
| voxel spacing | {spacing} mm, axes to the right, front and head (RAS) |
| window | {patch} voxels, half overlap, Gaussian weights |
| sizes the network takes | {sizes} |

## Run it with MONAI

    pip install monai {packages}
    python -m monai.bundle run --config_file configs/inference.json --bundle_root . --dataset_dir SCANS --output_dir MASKS

in the folder of this bundle. ScarceSeg is not needed. SCANS is a folder of `{ending}` files{naming}.
A mask has the name, size, spacing, origin and direction of its image. Other formats were not tried: add
`--file_ending .mha`, say, and install the package MONAI reads that format with.

## Run it with ScarceSeg

    scarceseg predict BUNDLE SCANS --out MASKS

reads NIfTI, NRRD, MetaImage and DICOM, writes probabilities and uncertainty on request, and gives the masks the training run
itself gives, bit for bit.

## How far the two agree

Both prepare an image in the same order:

{steps}

Each window's softmax is averaged over the windows, taken back to the grid of the image by linear interpolation, and the most
probable class is the mask.

The two differ by rounding in the interpolation; ScarceSeg's tests allow 1e-4 after normalisation on oblique synthetic volumes.
A voxel whose classes are near a tie may come out otherwise.{precision}

## Files

- `configs/metadata.json`: channels, classes, versions; under `scarceseg` all that `scarceseg predict` needs
- `configs/inference.json`: preparation, windows, post-processing
- `models/model.ts`: TorchScript, image `[B, {n_channels}, X, Y, Z]` to logits `[B, {n_classes}, X, Y, Z]`
- `models/model.pt`: the weights as a state dictionary

There is no licence here: choose one before you pass this bundle on, and name it in `metadata.json` beside authors and
copyright.
"""


def readme(name: str, info: ModelInfo, facts: Facts, packages: str) -> str:
    """``docs/README.md`` of a bundle.

    Args:
        name: of the bundle.
        info: description of the network.
        facts: of its TorchScript form.
        packages: what MONAI needs beside itself to run it.
    """
    plan = info.plan
    several = len(info.channels) > 1
    ending = nifti(plan.file_ending)
    return _PAGE.format(
        name=name,
        network=info.network.name,
        targets=", ".join(info.classes[1:]),
        version=facts.scarceseg,
        dataset=plan.dataset,
        channels=_numbered(info.channels),
        classes=_numbered(info.classes),
        spacing=" x ".join(f"{value:g}" for value in plan.spacing_mm),
        patch=_by(plan.patch),
        sizes=f"sides in multiples of {_by(facts.divisor)}" if facts.any_size else f"{_by(facts.patch)} only",
        packages=packages,
        ending=ending,
        naming=f", one a channel, `CASE_0000{ending}` to `CASE_{len(info.channels) - 1:04d}{ending}`"
        if several
        else "",
        steps="\n".join(f"{number}. {text}" for number, text in enumerate(_steps(info), start=1)),
        precision=_precision(info),
        n_channels=len(info.channels),
        n_classes=len(info.classes),
    )


def nifti(ending: str) -> str:
    """The ending of the files a bundle looks for: MONAI reads other formats with further packages only."""
    return ending if ending in {".nii", ".nii.gz"} else ".nii.gz"


def _steps(info: ModelInfo) -> list[str]:
    normalised = [f"{name}: {_words(how)}" for name, how in zip(info.channels, info.plan.normalisation, strict=True)]
    return [
        f"Intensities, on the grid of the file: {'; '.join(normalised)}.",
        "Axes are turned to right, front, head; nothing is interpolated.",
        "A Gaussian of variance (r^2 - 4) / 12 along axes that become more than twice as coarse (r times).",
        "Linear interpolation to the spacing above; the new grid has the outer corner of the old, and beyond the border "
        "the border's values go on.",
    ]


def _words(how: Normalisation) -> str:
    if how.kind == "zscore":
        return "mean 0, deviation 1 (of the voxels that are not zero, where more than half of a volume is exactly zero)"
    if how.kind == "ct":
        return f"clipped to {how.low:g} .. {how.high:g}, minus {how.mean:g}, divided by {how.std:g}"
    return "as they are"


def _precision(info: ModelInfo) -> str:
    if info.precision == "fp32":
        return ""
    return (
        f" This network was trained in bfloat16 and ScarceSeg predicts so on a {info.device.upper()}, while the bundle "
        "computes in float32: there a few more voxels differ."
    )


def _numbered(names: tuple[str, ...]) -> str:
    return ", ".join(f"{index} {name}" for index, name in enumerate(names))


def _by(sides: tuple[int, ...]) -> str:
    return " x ".join(str(side) for side in sides)
