"""One training step with a foundation model's help, as a ratio to the same step without: SFR in both variants, SemiSAM.

    python benchmarks/foundation_step.py [--cases sfr,sfr-crop-tiny-sam,semisam,...] [--patch 64,64,48]

The base is Mean Teacher on 2 labelled and 2 unlabelled patches through V-Net-16. `sfr` takes labels made once,
`sfr-crop-*` runs the
tuned model in every step, as the authors' script does. Of SemiSAM, the time of embedding, prompting and answering is kept too.
Weights are random but for the small models': sizes are what matters. The student's prediction is that of a network trained
for a few steps on the labelled patches, so that there is something to ask about.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import nn

from common import provenance, save
from scarceseg.config import OptimConfig
from scarceseg.engine.loop import build_optimizer
from scarceseg.engine.step import place, train_step
from scarceseg.foundation.base import Tuning
from scarceseg.foundation.load import load_foundation
from scarceseg.foundation.memory import EmbeddingMemory
from scarceseg.methods import build_terms, panel
from scarceseg.methods.base import Term
from scarceseg.methods.semisam import SemiSam
from scarceseg.networks import build_network
from scarceseg.networks.selftest import to_memory_format
from scarceseg.types import Labelled, Unlabelled
from tables import FOUNDATION_STEP

CASES = "sfr,sfr-crop-tiny-sam,sfr-crop-sam-vit-b,semisam,semisam-paper"
PAPER: dict[str, Any] = {"prompts": ["point"], "clicks": 1, "gate": False}
Patch = tuple[int, int, int]


class Crops:
    """A tuned model that labels every training patch, as the published script does."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    @torch.no_grad()
    def on_patch(self, image: torch.Tensor) -> torch.Tensor:
        """Class probabilities."""
        return self.network(image).float().softmax(1)


def tuned(name: str, patch: Patch) -> nn.Module:
    """A model opened for two classes on patches."""
    if name == "sam-vit-b":
        from transformers import SamConfig, SamModel

        from scarceseg.foundation.sam_volume import SamPromptable

        # The library's own 1e-10 makes denormal numbers, which a processor is fifty times slower at.
        config = SamConfig(vision_config={"initializer_range": 0.02})
        return SamPromptable(SamModel(config), name).tunable(1, 2, Tuning(), patch).eval()
    model: Any = load_foundation(name)
    network: nn.Module = model.tunable(1, 2, Tuning(), patch).eval()
    return network


def terms_of(case: str, patch: Patch) -> dict[str, Term]:
    """Mean Teacher and what `case` adds."""
    if case == "base":
        return build_terms("mean-teacher", {}, 2)
    if case.startswith("semisam"):
        terms = build_terms("mean-teacher+semisam", {"semisam": PAPER if case == "semisam-paper" else {}}, 2)
        term = terms["semisam"]
        assert isinstance(term, SemiSam)
        term.consult([load_foundation("tiny-sam3d")], (1.25, 1.25, 1.25))  # type: ignore[list-item]
        return terms
    model = case.removeprefix("sfr-crop-")
    terms = build_terms("mean-teacher+sfr", {"sfr": {"labels": "volume" if model == case else "crop"}}, 2)
    if model != case:
        terms["sfr"]._teacher = [Crops(tuned(model, patch))]  # type: ignore[assignment,operator]
    return terms


def batch_of(patch: Patch) -> tuple[Labelled, Unlabelled]:
    """Noise with a bright ball, so that a student learns within a few steps to find something."""
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in patch), indexing="ij")
    ball = (sum(axis**2 for axis in axes) < 0.4).long()
    images = torch.randn(4, 1, *patch) + 3 * ball
    fields = {"sfr/label": ball.to(torch.uint8).repeat(2, 1, 1, 1)}
    return Labelled(images[:2], ball.repeat(2, 1, 1, 1), ("a", "b")), Unlabelled(images[2:], ("c", "d"), fields)


@contextmanager
def watched(parts: dict[str, float]) -> Iterator[None]:
    """Add up the time SemiSAM spends in its three parts."""
    kept = {"prompt": panel.first_prompts, "answer": panel.converse}
    original = EmbeddingMemory.embed

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*arguments: Any) -> Any:
            since = time.perf_counter()
            result = call(*arguments)
            parts[name] = parts.get(name, 0.0) + time.perf_counter() - since
            return result

        return inner

    panel.first_prompts, panel.converse = timed("prompt", kept["prompt"]), timed("answer", kept["answer"])
    EmbeddingMemory.embed = timed("embed", original)  # type: ignore[method-assign]
    try:
        yield
    finally:
        panel.first_prompts, panel.converse = kept["prompt"], kept["answer"]
        EmbeddingMemory.embed = original  # type: ignore[method-assign]


class Stepper:
    """A student, `case`'s terms and a batch; every call is a training step."""

    def __init__(self, case: str, patch: Patch) -> None:
        torch.manual_seed(0)
        self.student = to_memory_format(build_network("vnet", 1, 2), "channels_last_3d")
        self.batch = place(batch_of(patch), torch.device("cpu"), "channels_last_3d")
        self.generator = torch.Generator().manual_seed(0)
        warm = build_terms("supervised", {}, 2)
        optimizer = build_optimizer(OptimConfig(lr=0.05), self.student, warm)
        for t in range(6):
            train_step(self.student, self.student, warm, optimizer, (self.batch[0], None), t, 100, self.generator)
        self.terms = terms_of(case, patch)
        for term in self.terms.values():
            term.attach(self.student)
        self.optimizer = build_optimizer(OptimConfig(lr=1e-4), self.student, self.terms)
        self.t = 0

    def __call__(self) -> tuple[float, dict[str, float]]:
        """Seconds of the next step and, of SemiSAM, of its parts."""
        parts: dict[str, float] = {}
        since = time.perf_counter()
        with watched(parts):
            train_step(self.student, self.student, self.terms, self.optimizer, self.batch, self.t, 1000, self.generator)
        self.t += 1
        return time.perf_counter() - since, parts


def compare(case: str, patch: Patch, repeats: int) -> dict[str, Any]:
    """Medians over `repeats` pairs of a step of the base and one of `case`, taken in turns.

    A machine that is slower for a while is slower for both; the ratio is the median of the pairs' ratios. The first pair,
    in which buffers are made, does not count; a case with steps of more than 5 s is stopped after three pairs.
    """
    base, full = Stepper("base", patch), Stepper(case, patch)
    base(), full()
    pairs = []
    for _ in range(repeats):
        pairs.append((base()[0], *full()))
        if len(pairs) >= 3 and pairs[-1][1] > 5:
            break
    found: dict[str, Any] = {
        "seconds": median(spent for _, spent, _ in pairs),
        "base": median(alone for alone, _, _ in pairs),
        "ratio": median(spent / alone for alone, spent, _ in pairs),
        "parts": {name: median(parts[name] for *_, parts in pairs) for name in pairs[0][2]},
        "pairs": len(pairs),
    }
    if isinstance(term := full.terms.get("semisam"), SemiSam):
        found["asked"] = term.numbers()["asked"]
    return found


def main() -> None:
    """Compare each case with the base, in one process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--patch", default="64,64,48")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    x, y, z = map(int, options.patch.split(","))
    for case in options.cases.split(","):
        result = compare(case, (x, y, z), options.repeats) | {"case": case, "patch": [x, y, z]}
        save(f"foundation_step/{case}_{x}x{y}x{z}", result | provenance(FOUNDATION_STEP))
        print(
            f"{case}: {result['seconds']:.2f} s, base {result['base']:.2f} s, ratio {result['ratio']:.2f}, "
            f"parts {result['parts']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
