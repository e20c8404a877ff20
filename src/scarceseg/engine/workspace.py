"""What a term's offline stages work with: the prepared cases, the foundation model, the one training loop, the run folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from scarceseg.config import Config, OptimConfig
from scarceseg.data.plan import Plan
from scarceseg.data.prepare import PreparedCase
from scarceseg.data.sampling import PatchSampler, Source
from scarceseg.engine.logging import Display, RunLog
from scarceseg.engine.loop import BatchSource, Loop, LoopTask
from scarceseg.engine.parallel import check_rows, processes
from scarceseg.engine.statistics import pool_statistics
from scarceseg.errors import ConfigError
from scarceseg.files import write_text
from scarceseg.foundation.base import Promptable, Tunable, TunedModel
from scarceseg.foundation.load import load_foundation
from scarceseg.functional.sliding import sliding_window
from scarceseg.methods.base import Term
from scarceseg.networks.base import SegmentationNetwork, build_network
from scarceseg.seeds import rng

Array = NDArray[Any]


@dataclass
class Workspace:
    """The run as a term sees it while it prepares. There is no label of an unlabelled case in it.

    Attributes:
        run: the run folder.
        config: of the run.
        plan: how volumes are prepared, channels and classes.
        labelled, unlabelled: prepared cases; `label` of the second is None.
        fabric: device, precision, processes.
        memory_format: of networks like the student.
        precision: "bf16" or "fp32".
        log: where stages write their numbers.
        stop: asks whether the user wants to stop.
        warnings: a stage may add to them.
        cache: folder of things worth keeping between runs; None is the user's.
    """

    run: Path
    config: Config
    plan: Plan
    labelled: Sequence[PreparedCase]
    unlabelled: Sequence[PreparedCase]
    fabric: Fabric
    memory_format: str
    log: RunLog
    stop: Callable[[], bool]
    precision: str = "fp32"
    warnings: list[str] = field(default_factory=list)
    cache: Path | None = None
    _models: dict[str, Promptable | Tunable] = field(default_factory=dict, repr=False)

    @property
    def classes(self) -> int:
        """K, background included."""
        return len(self.plan.classes)

    def folder(self, term: str, stage: str) -> Path:
        """Where one stage of one term leaves its artefact."""
        return self.run / "stages" / f"{term}-{stage}"

    def seed(self, stage: str) -> int:
        """A seed for one stage, from the run's."""
        number = int.from_bytes(hashlib.sha256(stage.encode()).digest()[:4], "big")
        return int(rng(self.config.seed, "stage", number).integers(2**31))

    def foundation_of(self, term: Term) -> str:
        """Name or file of the foundation model a term works with: the run's, or the term's own choice.

        Raises:
            ConfigError: there is none.
        """
        own = getattr(term.options, "foundation", None)
        name = own if isinstance(own, str) else self.config.foundation or term.foundation
        if name is None:
            raise ConfigError(f"{term.name!r} needs a foundation model: name one with --foundation")
        return name

    def model(self, name: str) -> Promptable | Tunable:
        """A foundation model by name or file, frozen, built once a run.

        Raises:
            ConfigError, DataError: see `scarceseg.foundation.load.load_foundation`.
        """
        if name not in self._models:
            self._models[name] = load_foundation(name, self.fabric.device)
        return self._models[name]

    def release_models(self) -> None:
        """Let go of foundation models that no term holds itself; one that is asked for again is built again."""
        self._models.clear()

    def once(self, folder: Path, make: Callable[[], None]) -> None:
        """Make what belongs into the folder of a stage, unless an earlier call has; its warnings are told in either case.

        Args:
            folder: of the stage; the file ``done`` in it says that it is whole, and holds the warnings.
            make: leaves its artefacts there, and may add to `warnings`.
        """
        done = folder / "done"
        if done.exists():
            self.warnings.extend(json.loads(done.read_text(encoding="utf-8") or "[]"))
            return
        folder.mkdir(parents=True, exist_ok=True)
        before = len(self.warnings)
        make()
        self.fabric.barrier()
        if self.fabric.is_global_zero:
            write_text(done, json.dumps(self.warnings[before:]))
        self.fabric.barrier()

    def build_student(self, stage: str) -> SegmentationNetwork:
        """A fresh network like the student, on the run's device, with initial weights of its own."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed(f"{stage}-init"))
            network = build_network(
                self.config.network.name, len(self.plan.channels), self.classes, self.config.network.args
            )
        return network.to(self.fabric.device)

    def as_saved(self, network: nn.Module) -> SegmentationNetwork:
        """A copy of a network like the student, as it would be saved: with the statistics of batch norm that the config asks for.

        Args:
            network: trained; it stays as it is.
        """
        copy = self.build_student("statistics")
        copy.load_state_dict(network.state_dict())
        if self.config.takes_pool_statistics:
            pool_statistics(copy, self)
        return copy

    def patches(self, stage: str, fields: Mapping[str, Mapping[str, Array]] | None = None) -> PatchSampler:
        """Batches as the run's own: labelled rows and, when `fields` gives maps for them, unlabelled rows.

        Args:
            stage: names the random draws.
            fields: maps of unlabelled cases by case; cases without any are left out.
        """
        fields = fields or {}
        return patch_sampler(
            self.config, self.plan, self.labelled, self.unlabelled, self.seed(stage), fields, bool(fields)
        )

    def fit(
        self,
        stage: str,
        network: nn.Module,
        terms: Mapping[str, Term],
        sampler: BatchSource,
        iterations: int,
        optim: OptimConfig | None = None,
        memory_format: str | None = None,
    ) -> None:
        """Train a network through the one loop, from its checkpoint if a stopped run left one.

        Args:
            stage: name in logs and of the checkpoint; `discard` removes that once the artefact is written.
            network: on the run's device; it is trained in place.
            terms: attached already.
            sampler: makes the batches.
            iterations: T.
            optim: None is the run's.
            memory_format: None is the run's.

        Raises:
            ConfigError: the processes cannot share the rows of a step, see `check_rows`.
        """
        if processes() > 1:
            labelled, unlabelled = next(iter(sampler.batches(0, 1)))
            self.check_rows(stage, network, len(labelled.image), 0 if unlabelled is None else len(unlabelled.image))
        task = LoopTask(
            stage=stage,
            student=network,
            terms=terms,
            sampler=sampler,
            optim=optim or self.config.optim,
            iterations=iterations,
            seed=self.seed(stage),
            checkpoint=self._checkpoint(stage),
            checkpoint_every=self.config.checkpoint_every,
            log_every=self.config.log_every,
            memory_format=memory_format or self.memory_format,
            split=self.config.batch_norm == "split",
        )
        for term in terms.values():
            term.to(self.fabric.device)
        Loop(task, self.fabric, self.log, self.stop).run()

    def check_rows(self, stage: str, network: nn.Module, labelled: int, unlabelled: int = 0) -> None:
        """Refuse a stage whose network would take its batch norm over some rows more than once.

        Args:
            stage: for the message.
            network: that is trained; a tuned foundation model shares no statistics.
            labelled, unlabelled: rows of a step.

        Raises:
            ConfigError: the processes cannot share the rows equally.
        """
        if isinstance(network, TunedModel) or not any(isinstance(m, _BatchNorm) for m in network.modules()):
            return
        rows = [count for count in (labelled, unlabelled) if count]
        for count in rows if self.config.batch_norm == "split" else [sum(rows)]:
            check_rows(count, stage)

    def discard(self, stage: str) -> None:
        """Remove the checkpoint of a stage that has left its artefact."""
        if self.fabric.is_global_zero:
            self._checkpoint(stage).unlink(missing_ok=True)

    def _checkpoint(self, stage: str) -> Path:
        return self.run / "checkpoints" / f"{stage}.pt"

    def predict(self, network: nn.Module, case: PreparedCase, whole: bool = False) -> NDArray[np.float32]:
        """Class probabilities ``[K, X, Y, Z]`` of a prepared case.

        Args:
            network: takes ``[B, C, X, Y, Z]``.
            case: only its image is looked at.
            whole: give it the volume in one piece, instead of overlapping patches averaged with Gaussian weights.
        """
        image = torch.from_numpy(np.array(case.image))
        training = network.training
        network.eval()
        try:
            with torch.inference_mode(), self.fabric.autocast():
                if whole:
                    probability = network(image[None].to(self.fabric.device)).float().softmax(1)[0]
                else:
                    probability = sliding_window(image, network, self.plan.patch, device=self.fabric.device)
        finally:
            network.train(training)
        result: NDArray[np.float32] = probability.float().cpu().numpy()
        return result

    def mine(self, cases: Sequence[PreparedCase]) -> list[PreparedCase]:
        """The share of the cases this process works on."""
        return list(cases[self.fabric.global_rank :: self.fabric.world_size])

    def display(self, title: str, total: int) -> AbstractContextManager[Display]:
        """A progress display for work that is no training."""
        return Display(title, 0, total)


def patch_sampler(
    config: Config,
    plan: Plan,
    labelled: Sequence[PreparedCase],
    unlabelled: Sequence[PreparedCase],
    seed: int,
    fields: Mapping[str, Mapping[str, Array]],
    needs_unlabelled: bool,
) -> PatchSampler:
    """The run's batches; every process makes all rows (see `scarceseg.engine.parallel`).

    Args:
        seed: of the draws.
        fields: maps of unlabelled cases, by case. When it holds any, cases that it does not name are left out.
        needs_unlabelled: make unlabelled rows at all.
    """
    pool = [case for case in unlabelled if not fields or case.name in fields] if needs_unlabelled else []
    return PatchSampler(
        [Source(c.name, c.image, c.label) for c in labelled],
        [Source(c.name, c.image, fields=fields.get(c.name)) for c in pool],
        plan.patch,
        config.batch_labeled,
        config.batch_unlabeled if pool else 0,
        seed,
        augment=config.augment,
        foreground=config.foreground,
        spacing_mm=plan.spacing_mm,
    )
