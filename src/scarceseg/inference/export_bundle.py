"""A trained network as a MONAI bundle: a folder that MONAI runs without this package, and this package without the run.

The bundle's preparation is written with MONAI's transforms so that it gives what `data.prepare` gives: the same
normalisation, the same grid, linear interpolation, the border going on beyond the border, and the same smoothing before a
strong reduction. MONAI's own ``Spacing`` is not used, because it places the new grid differently.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from scarceseg import __version__
from scarceseg.data.plan import Normalisation, Plan
from scarceseg.files import write_atomic, write_text
from scarceseg.functional.sliding import overlaps, steps
from scarceseg.inference.export_network import Facts, to_torchscript
from scarceseg.inference.export_readme import nifti, readme
from scarceseg.inference.model import BUNDLE_INFO, BUNDLE_KEY, BUNDLE_WEIGHTS, ModelInfo
from scarceseg.networks.base import SegmentationNetwork

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"

REQUIRED = {"fire": "0.7.1", "pytorch-ignite": "0.5.5", "scipy": version("scipy"), "nibabel": version("nibabel")}
"""What ``python -m monai.bundle run`` needs beside MONAI itself; the tests ran with these versions of the first two."""

_ZSCORE = (
    "$lambda x: (lambda v: (x - v.mean()) / (v.std(correction=0) if v.std(correction=0) > 0 else 1))"
    "((x[x != 0] if 0 < x.count_nonzero() < x.numel() / 2 else x).double())"
)
_SIGMA = "$lambda x: [0.0] + [(max((n / o) ** 2 - 4, 0) / 12) ** 0.5 for n, o in zip(@spacing, x.pixdim.tolist())]"
_RATIO = (
    "$lambda x: [1.0 if abs(n / o - 1) < 1e-3 else n / o for n, o in zip(@spacing, x.pixdim.tolist())]"  # as `respace`
)
_SIZE = "$lambda x: [n if r == 1 else max(int(n / r + 0.5), 1) for n, r in zip(x.shape[1:], @ratio(x))]"
_AFFINE = (
    "$lambda x: x.affine.matmul((lambda a, b, c: torch.tensor([[a, 0, 0, (a - 1) / 2], [0, b, 0, (b - 1) / 2], "
    "[0, 0, c, (c - 1) / 2], [0, 0, 0, 1]], dtype=torch.float64))(*@ratio(x)))"
)
_RAS = [["L", "R"], ["P", "A"], ["I", "S"]]
_NAME = "$lambda meta, saver: {'subject': meta['filename_or_obj'].replace('_0000' + @file_ending, @file_ending), 'idx': None}"
_WITH_META = "MetaTensor({values}, meta=x.meta, applied_operations=x.applied_operations)"


def write_bundle(folder: Path, network: SegmentationNetwork, info: ModelInfo) -> Facts:
    """Write the folder of a MONAI bundle.

    It holds ``configs/metadata.json`` (with everything `load_model` needs), ``configs/inference.json``,
    ``models/model.pt`` (state dictionary), ``models/model.ts`` (TorchScript) and ``docs/README.md``. There is no licence
    in it: that of the weights is their owner's to choose.

    Args:
        folder: made if it is missing.
        network: what `load_model` gave.
        info: its description.

    Returns:
        What the TorchScript network takes and gives.

    Raises:
        RunError: the network cannot be exported (see `to_torchscript`), or the folder cannot be written.
    """
    script, facts = to_torchscript(network, info)
    (folder / "models").mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "models" / "model.ts", lambda path: write_bytes(path, script))
    write_atomic(folder / BUNDLE_WEIGHTS, lambda path: torch.save(network.state_dict(), path))
    write_text(folder / "configs" / "inference.json", _json(inference(info.plan)))
    write_text(folder / "docs" / "README.md", readme(folder.name, info, facts, " ".join(REQUIRED)))
    write_text(folder / BUNDLE_INFO, _json(metadata(folder.name, info)))
    return facts


def inference(plan: Plan) -> dict[str, Any]:
    """The config that ``python -m monai.bundle run`` reads: files -> preparation -> windows -> masks of the files' grid."""
    return {
        "imports": [
            "$import glob",
            "$import os",
            "$import numpy",
            "$from scipy.ndimage import gaussian_filter",
            "$import torch",
            "$from monai.data import MetaTensor",
        ],
        "bundle_root": ".",
        "dataset_dir": "images",
        "output_dir": "masks",
        "file_ending": nifti(plan.file_ending),
        "model_file": "$@bundle_root + '/models/model.ts'",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "data": _cases(len(plan.channels)),
        "spacing": list(plan.spacing_mm),
        "patch": list(plan.patch),
        **_preparation(plan),
        "dataset": {"_target_": "Dataset", "data": "@data", "transform": "@preprocessing"},
        "dataloader": {
            "_target_": "DataLoader",
            "dataset": "@dataset",
            "batch_size": 1,
            "shuffle": False,
            "num_workers": 0,
        },
        "network_def": "$torch.nn.Sequential(torch.jit.load(@model_file, map_location=@device), torch.nn.Softmax(dim=1))",
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": "@patch",
            "sw_batch_size": 4,
            "overlap": overlaps(plan.patch, steps(plan.patch)),
            "mode": "gaussian",
            "padding_mode": "constant",
        },
        "postprocessing": _postprocessing(),
        "handlers": [{"_target_": "StatsHandler", "iteration_log": False}],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network_def",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
            "amp": False,
        },
        "run": ["$@evaluator.run()"],
    }


def metadata(name: str, info: ModelInfo) -> dict[str, Any]:
    """``metadata.json`` by MONAI's schema of July 2024; the entry ``scarceseg`` is our own ``model.json``."""
    plan = info.plan
    kinds = {how.kind for how in plan.normalisation}
    tensor = {
        "type": "image",
        "spatial_shape": list(plan.patch),
        "spacing_mm": list(plan.spacing_mm),
        "orientation": "RAS",
        "dtype": "float32",
        "is_patch_data": True,
    }
    return {
        "schema": SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": f"exported by ScarceSeg {__version__}"},
        "monai_version": version("monai"),
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": dict(REQUIRED),
        "name": name,
        "task": f"Segmentation of {', '.join(info.classes[1:])} in 3D images ({', '.join(info.channels)})",
        "description": f"A {info.network.name} network that was trained by ScarceSeg on the dataset {plan.dataset}.",
        "authors": "not stated",
        "copyright": "not stated; it is with the owner of the training run",
        "data_source": plan.dataset,
        "data_type": plan.file_ending.lstrip("."),
        "image_classes": f"channels {', '.join(info.channels)}, resampled to {_by(plan.spacing_mm)} mm and normalised",
        "pred_classes": "; ".join(f"{index} is {label}" for index, label in enumerate(info.classes)),
        "intended_use": "Research. Not a medical device.",
        "network_data_format": {
            "inputs": {
                "image": tensor
                | {
                    "format": "hounsfield" if kinds == {"ct"} else "magnitude",
                    "modality": "CT" if kinds == {"ct"} else ", ".join(info.channels),
                    "num_channels": len(info.channels),
                    "value_range": [],
                    "channel_def": _numbered(info.channels),
                }
            },
            "outputs": {
                "pred": tensor
                | {
                    "format": "labels",
                    "num_channels": len(info.classes),
                    "value_range": [0, 1],
                    "channel_def": _numbered(info.classes),
                }
            },
        },
        BUNDLE_KEY: info.model_dump(mode="json"),
    }


def _cases(channels: int) -> str:
    """Expression for the list of cases. Channels are files named ``case_0000``, ``case_0001`` ... ."""
    files = "sorted(glob.glob(os.path.join(@dataset_dir, '*{0}' + @file_ending)))"
    if channels == 1:
        return f"$[{{'image': p}} for p in {files.format('')}]"
    names = (
        "[p.removesuffix('_0000' + @file_ending) + f'_{c:04d}' + @file_ending for c in range(" + str(channels) + ")]"
    )
    return f"$[{{'image': {names}}} for p in {files.format('_0000')}]"


def _normalisation(how: Normalisation) -> str:
    """Expression for a function of one channel; see `prepare.normalise`."""
    if how.kind == "zscore":
        return "@zscore"
    if how.kind == "ct":
        return f"(lambda x: (x.clamp({how.low!r}, {how.high!r}) - {how.mean!r}) / {how.std!r})"
    return "(lambda x: x)"


def _preparation(plan: Plan) -> dict[str, Any]:
    """Named functions of an image ``x`` [C, X, Y, Z], and the chain of transforms that uses them."""
    channels = ", ".join(_normalisation(how) for how in plan.normalisation)
    normalised = f"torch.stack([f(c) for f, c in zip([{channels}], x.as_tensor())])"
    smoothed = "torch.from_numpy(gaussian_filter(x.numpy(), @sigma(x), mode='nearest'))"
    grid = "MetaTensor(torch.zeros(1, 1, 1, 1).expand(1, *@size(x)), affine=@affine(x))"
    named = {"zscore": _ZSCORE} if any(how.kind == "zscore" for how in plan.normalisation) else {}
    return named | {
        "sigma": _SIGMA,
        "ratio": _RATIO,
        "size": _SIZE,
        "affine": _AFFINE,
        "normalise": f"$lambda x: {_WITH_META.format(values=normalised)}",
        "smooth": f"$lambda x: {_WITH_META.format(values=smoothed)}",
        "add_grid": f"$lambda d: d | {{'grid': (lambda x: {grid})(d['image'])}}",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True},
                {"_target_": "Lambdad", "keys": "image", "func": "@normalise"},
                {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS", "labels": _RAS},
                {"_target_": "Lambdad", "keys": "image", "func": "@smooth"},
                {"_target_": "Lambda", "func": "@add_grid"},
                {
                    "_target_": "ResampleToMatchd",
                    "keys": "image",
                    "key_dst": "grid",
                    "mode": "bilinear",
                    "padding_mode": "border",
                },
                {"_target_": "DeleteItemsd", "keys": "grid"},
            ],
        },
    }


def _postprocessing() -> dict[str, Any]:
    return {
        "_target_": "Compose",
        "transforms": [
            {
                "_target_": "Invertd",
                "keys": "pred",
                "transform": "@preprocessing",
                "orig_keys": "image",
                "nearest_interp": False,
                "to_tensor": True,
            },
            {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
            {
                "_target_": "SaveImaged",
                "keys": "pred",
                "output_dir": "@output_dir",
                "output_ext": "@file_ending",
                "output_postfix": "",
                "output_dtype": "$numpy.uint8",
                "output_name_formatter": _NAME,
                "separate_folder": False,
                "resample": False,
                "print_log": False,
            },
        ],
    }


def write_bytes(path: Path, content: bytes) -> None:
    """Fill a file."""
    path.write_bytes(content)


def _numbered(names: Sequence[str]) -> dict[str, str]:
    return {str(index): name for index, name in enumerate(names)}


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=4, ensure_ascii=False) + "\n"


def _by(values: tuple[float, ...]) -> str:
    return " x ".join(f"{value:g}" for value in values)
