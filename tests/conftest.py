"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with reference data beside the checkout; its tests are skipped where it is absent."""
    if not (SHARED / "conformance" / "README.md").exists():
        pytest.skip("the reference data folder 'shared' is not beside the checkout")
    return SHARED


@pytest.fixture(autouse=True, scope="session")
def few_threads() -> None:
    """Tests run side by side: one thread each."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("SCARCESEG_CACHE", str(tmp_path_factory.mktemp("cache")))
