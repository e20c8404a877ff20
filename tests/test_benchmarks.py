"""The scripts of `benchmarks/` agree with the package they measure."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from scarceseg.methods import METHODS

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("benchmarks_common", FOLDER / "common.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("method", METHODS.names())
def test_a_result_depends_on_files_that_exist(common: ModuleType, method: str) -> None:
    parts = common.training_code(method)
    assert all((common.PACKAGE / part).is_file() for part in parts), parts
    own = sys.modules[METHODS.get(method).__module__]
    assert own.__file__ is not None and any(own.__file__.endswith(part) for part in parts)


def test_the_weights_that_a_single_labelled_volume_asks_for_count_too(common: ModuleType) -> None:
    parts = common.training_code("mean-teacher+sfr")
    assert {"foundation/weights_data/tiny_sam.safetensors", "foundation/weights_data/tiny_sam3d.safetensors"} <= set(
        parts
    )
