"""What several tests of runs need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from scarceseg.foundation.tiny_sam import save_tiny_sam
from scarceseg.methods.sfr import Sfr
from tests.foundation.small import small_sam


@pytest.fixture(scope="module")
def small_foundation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A foundation model of the usual kind, but small, is what runs with `sfr` take when none is named."""
    file = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_tiny_sam(file, small_sam())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sfr, "foundation", str(file))
        patch.setattr(Sfr, "foundation_of_one", str(file))
        yield
