"""ScarceSeg: 3D medical segmentation from one to sixteen labelled volumes and a pool of unlabelled ones.

The flow, and the folders that show it::

    volumes -> data -> Step --> networks (student) -> logits --+
                         |                                     +-> methods (terms) -> engine -> run folder
                         +----> foundation -> probability -----+                                   |
                                                        report <- evaluation <- inference <--------+

`data` turns files into patches, `networks` patches into logits, `methods` a step into a sum of losses, `engine` runs
the one loop and leaves a run folder, `inference` writes masks in the geometry of their input, `evaluation` measures
them and `report` shows a run on one page.

Public names: `Config`, `train`, `predict`, `segment`, `evaluate`, `compare`, `suggest`, and the errors they raise.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from scarceseg.errors import ConfigError, DataError, RunError, ScarceSegError

if TYPE_CHECKING:
    from scarceseg.active.suggest import suggest
    from scarceseg.config import Config
    from scarceseg.engine.run import train
    from scarceseg.evaluation.compare import compare
    from scarceseg.evaluation.evaluate import evaluate
    from scarceseg.inference.predictor import predict
    from scarceseg.inference.segment import segment

__version__ = "0.1.0"
__all__ = [
    "Config",
    "ConfigError",
    "DataError",
    "RunError",
    "ScarceSegError",
    "compare",
    "evaluate",
    "predict",
    "segment",
    "suggest",
    "train",
]

# Loaded at first use, so that `scarceseg --help` does not wait for PyTorch.
_LAZY = {
    "Config": "scarceseg.config",
    "train": "scarceseg.engine.run",
    "predict": "scarceseg.inference.predictor",
    "segment": "scarceseg.inference.segment",
    "evaluate": "scarceseg.evaluation.evaluate",
    "compare": "scarceseg.evaluation.compare",
    "suggest": "scarceseg.active.suggest",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
