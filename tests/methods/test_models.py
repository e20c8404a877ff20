"""Which foundation model each term of a sum works with when none is named."""

from __future__ import annotations

from typing import Any

import pytest

from scarceseg.config import Config
from scarceseg.methods.models import foundation_models, settle_foundations
from scarceseg.methods.semisam import SemiSam
from scarceseg.methods.sfr import Sfr


def settled(method: str, labelled: int, **values: Any) -> dict[str, tuple[str, ...]]:
    config = Config.build({"dataset": "data", "method": method, **values})
    once = settle_foundations(config, labelled)
    assert settle_foundations(once, labelled) == once, "a run that goes on has the same settings"
    return foundation_models(once)


@pytest.mark.parametrize("method", ["mean-teacher+sfr", "sfr+"])
def test_sfr_takes_another_model_with_a_single_labelled_volume(method: str) -> None:
    term = method.split("+", 1)[1] if method != "sfr+" else "sfr+"
    assert Sfr.foundation != Sfr.foundation_of_one
    assert settled(method, 1) == {term: (Sfr.foundation_of_one,)}
    assert settled(method, 2) == settled(method, 16) == {term: (Sfr.foundation,)}


@pytest.mark.parametrize("options", [{"labels": "crop"}, {"view": "patch"}])
def test_what_needs_patches_takes_a_model_of_patches(options: dict[str, Any]) -> None:
    assert settled("mean-teacher+sfr", 1, terms={"sfr": options}) == {"sfr": (Sfr.foundation,)}


def test_in_a_sum_the_other_term_keeps_its_own() -> None:
    for labelled, model in ((1, Sfr.foundation_of_one), (4, Sfr.foundation)):
        assert settled("mean-teacher+sfr+semisam", labelled) == {"sfr": (model,), "semisam": (SemiSam.foundation,)}


def test_a_named_model_is_for_all_terms_and_that_of_a_term_for_it_alone() -> None:
    method = "mean-teacher+sfr+semisam"
    assert settled(method, 1, foundation="medsam") == {"sfr": ("medsam",), "semisam": ("medsam",)}
    own: dict[str, Any] = {"sfr": {"foundation": "sam-vit-b"}}
    for labelled in (1, 4):
        found = settled(method, labelled, terms=own)
        assert found == {"sfr": ("sam-vit-b",), "semisam": (SemiSam.foundation,)}
    assert settled(method, 1, terms=own, foundation="medsam") == {"sfr": ("sam-vit-b",), "semisam": ("medsam",)}


def test_methods_without_a_model_name_none() -> None:
    config = Config.build({"dataset": "data", "method": "mean-teacher"})
    assert settle_foundations(config, 1) == config and foundation_models(config) == {}
