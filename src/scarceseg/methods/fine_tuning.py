"""Tuning a foundation model on the labelled volumes of a run, and what it then says about a volume (SFR, steps 1 and 2)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from safetensors.torch import save_file

from scarceseg.config import OptimConfig
from scarceseg.data.sampling import PatchSampler, Source
from scarceseg.data.whole import CurvedSlices, Sampler, SideBySide, WholeVolumes
from scarceseg.errors import ConfigError, DataError, RunError
from scarceseg.files import write_atomic
from scarceseg.foundation.base import Strategy, Tunable, TunedModel, Tuning, freeze
from scarceseg.foundation.weights import read_tensors
from scarceseg.methods.base import build_terms
from scarceseg.methods.pseudo_labels import PseudoLabelOptions
from scarceseg.networks.selftest import broken_in_bf16
from scarceseg.types import Augment, ImageBatch, Logits

if TYPE_CHECKING:
    from scarceseg.data.prepare import PreparedCase
    from scarceseg.engine.workspace import Workspace

WHOLE_ITERATIONS = 300
"""Enough for `tiny-sam` on whole volumes."""
PATCH_ITERATIONS = 6000
"""Of models that see patches, as published; where the student is trained shorter, as long as it is."""


class TuningOptions(PseudoLabelOptions):
    """Options of terms that tune a foundation model.

    Attributes:
        foundation: model that this term tunes; None takes the run's.
        strategy, rank: see `scarceseg.foundation.base.Tuning`; a rank of None is the model's usual one.
        view: whether the model is shown whole volumes or patches; "auto" is what it wants. Only `tiny-sam3d` takes both.
        tune_iterations: None is the run's iterations for a model that sees patches, 6000 (as published) at most, and 300 for
            one that sees whole volumes.
        tune_lr, tune_weight_decay, tune_power: AdamW with a poly schedule. The published values; a rate of None is the model's
            usual one, which for SAM is the published one.
        tune_warmup, tune_clip: of the learning rate, iterations, and the gradient's norm. (ours)
        tune_rows: volumes or patches in a batch; 2 as published. Where guessed labels are learnt too (`learn_from`, sure volumes
            of ``sfr+``) they have half of the rows, rounded down, and one at least.
        axes: volume axes along which slices are cut; one network is tuned for each, and their probabilities are averaged.
            SFR has (2,).
        augment: intensity curves per slice on patches for models of slices, bends and contrast on whole volumes; 0 is off, 1
            as described there.
        patch_augment: what is done to patches beside that, one of the run's words for `augment`; None is what the student's
            have, the paper turns and flips ("reflections").
        learn_from: another term of the sum, such as atlas: its guesses for the unlabelled volumes are learnt too, in every
            batch as many rows of them as reference ones. (ours)
        tuned_in: folder of another run whose tuned model is taken, instead of tuning it again: of a run that differs in its other
            terms, network or seed, on the same labelled volumes and with the same tuning. (ours)
        labels: "volume" labels each unlabelled volume once; "crop" runs the tuned model on every training patch, as the
            authors' script does.
    """

    foundation: str | None = None
    strategy: Strategy = "lora"
    rank: int | None = Field(None, ge=1)
    view: Literal["auto", "volume", "patch"] = "auto"
    tune_iterations: int | None = Field(None, ge=1)
    tune_lr: float | None = Field(None, gt=0)
    tune_weight_decay: float = Field(0.1, ge=0)
    tune_power: float = Field(0.9, ge=0)
    tune_warmup: int = Field(20, ge=0)
    tune_clip: float | None = Field(1.0, gt=0)
    tune_rows: int = Field(2, ge=1)
    axes: tuple[Literal[0, 1, 2], ...] = Field((2,), min_length=1)
    augment: float = Field(1.0, ge=0)
    patch_augment: Augment | None = None
    learn_from: str | None = None
    tuned_in: str | None = None
    labels: Literal["volume", "crop"] = "volume"

    def idle(self) -> dict[str, str]:
        """The rank of low-rank updates where there are none."""
        return super().idle() | ({"rank": "with strategy: decoder"} if self.strategy == "decoder" else {})


class AlongAxis(TunedModel):
    """A tuned model that sees a volume's slices along another axis.

    Args:
        inner: what is tuned; its slices lie along the last axis.
        axis: of the volume, 0 .. 2, that becomes the last one.
    """

    def __init__(self, inner: TunedModel, axis: int) -> None:
        super().__init__()
        self.inner, self.axis = inner, axis

    def forward(self, image: ImageBatch) -> Logits:
        """Logits in the frame of the volumes."""
        logits: Logits = self.inner(image.transpose(2 + self.axis, 4))
        return logits.transpose(2 + self.axis, 4)

    def tuned_state(self) -> dict[str, torch.Tensor]:
        """See `TunedModel.tuned_state`."""
        return self.inner.tuned_state()

    def load_tuned_state(self, state: dict[str, torch.Tensor]) -> None:
        """See `TunedModel.load_tuned_state`."""
        self.inner.load_tuned_state(state)


class InFloat32(TunedModel):
    """A tuned model that does not compute in bf16, although the run does.

    Args:
        inner: what is tuned.
    """

    def __init__(self, inner: TunedModel) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, image: ImageBatch) -> Logits:
        """Logits of the inner model."""
        with torch.autocast(image.device.type, enabled=False):
            logits: Logits = self.inner(image.float())
        return logits

    def tuned_state(self) -> dict[str, torch.Tensor]:
        """See `TunedModel.tuned_state`."""
        return self.inner.tuned_state()

    def load_tuned_state(self, state: dict[str, torch.Tensor]) -> None:
        """See `TunedModel.load_tuned_state`."""
        self.inner.load_tuned_state(state)


class TunedTeacher:
    """The foundation model tuned for a run: one network for each axis its slices are cut along.

    Args:
        work: the run.
        options: of the term.
        name: of the foundation model, or its file.
    """

    def __init__(self, work: Workspace, options: TuningOptions, name: str) -> None:
        model = work.model(name)
        if not isinstance(model, Tunable):
            raise ConfigError(
                f"the foundation model {name!r} answers prompts but cannot be tuned: "
                "choose one that can (scarceseg foundations list)"
            )
        if options.view != "auto":
            model = model.shown(options.view)
        self.work, self.options, self.model = work, options, model
        self.whole = model.sees == "volume"
        self.networks = [self._open(axis) for axis in options.axes]

    def idle(self, term: str, name: str) -> list[str]:
        """Words for options of `term` that were set and do nothing with this model."""
        found = []
        if self.whole and self.options.patch_augment is not None:
            found.append(f"terms.{term}.patch_augment changes nothing: {name!r} is shown whole volumes, see augment")
        if not self.whole and not self.model.slices and self.options.augment != 1:
            found.append(f"terms.{term}.augment changes nothing: {name!r} sees no slices, see patch_augment")
        return found

    @property
    def iterations(self) -> int:
        """Steps of fine-tuning."""
        usual = WHOLE_ITERATIONS if self.whole else min(self.work.config.iterations, PATCH_ITERATIONS)
        return self.options.tune_iterations or usual

    def _open(self, axis: int) -> TunedModel:
        size = list(self.common_size() if self.whole else self.work.plan.patch)
        size[axis], size[2] = size[2], size[axis]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.work.seed(f"tuning-axis{axis}"))
            tuned = self.model.tunable(
                len(self.work.plan.channels),
                self.work.classes,
                Tuning(self.options.strategy, self.options.rank or self.model.usual_rank),
                (size[0], size[1], size[2]),
            )
            if self._needs_float32(tuned, (size[0], size[1], size[2])):
                tuned = InFloat32(tuned)
        return (AlongAxis(tuned, axis) if axis != 2 else tuned).to(self.work.fabric.device)

    def _needs_float32(self, network: TunedModel, size: tuple[int, int, int]) -> bool:
        """Whether bf16, which is right for the student, gives this network wrong gradients on this processor."""
        device = self.work.fabric.device
        if self.work.precision != "bf16" or device.type != "cpu":
            return False
        return broken_in_bf16(network, len(self.work.plan.channels), size, device) is not None

    def common_size(self) -> tuple[int, int, int]:
        """Median size of the labelled volumes, voxels."""
        x, y, z = np.median([case.geometry.size for case in self.work.labelled], axis=0).round().astype(int)
        return int(x), int(y), int(z)

    def tune(self, folder: Path, stage: str, guessed: Sequence[Source] = (), iterations: int | None = None) -> None:
        """Fine-tune from where the networks stand, and leave their weights in `folder`.

        Args:
            folder: of the stage.
            stage: names checkpoints, logs and draws.
            guessed: volumes with guessed labels, that are learnt beside the reference ones.
            iterations: None is what the options say.
        """
        options = self.options
        optim = OptimConfig(
            name="adamw",
            lr=options.tune_lr or self.model.usual_lr,
            weight_decay=options.tune_weight_decay,
            schedule="poly",
            power=options.tune_power,
            warmup=options.tune_warmup,
            clip_norm=options.tune_clip,
        )
        terms = build_terms("supervised", {"supervised": {"background": True}}, self.work.classes)
        for axis, network in zip(options.axes, self.networks, strict=True):
            file, name = _file(folder, axis), f"{stage}-axis{axis}"
            if file.exists():
                self._read(network, file)
                continue
            sampler = self._sampler(name, guessed, axis)
            self.work.fit(name, network, terms, sampler, iterations or self.iterations, optim, "contiguous")
            self._write(network, file)
            self.work.discard(name)

    @property
    def files(self) -> list[str]:
        """Names of the weights in the folder of a stage."""
        return [_file(Path(), axis).name for axis in self.options.axes]

    def save(self, folder: Path) -> None:
        """Leave the networks' weights as they stand."""
        for axis, network in zip(self.options.axes, self.networks, strict=True):
            self._write(network, _file(folder, axis))

    def _write(self, network: TunedModel, file: Path) -> None:
        if self.work.fabric.is_global_zero:
            state = {key: value.detach().cpu().contiguous() for key, value in network.tuned_state().items()}
            write_atomic(file, partial(save_file, state))

    def load(self, folder: Path) -> None:
        """Put back what `tune` left in `folder`.

        Raises:
            RunError: it is missing or does not fit.
        """
        for axis, network in zip(self.options.axes, self.networks, strict=True):
            self._read(network, _file(folder, axis))

    def _read(self, network: TunedModel, file: Path) -> None:
        try:
            network.load_tuned_state(read_tensors(file).state)
        except DataError as error:
            raise RunError(f"cannot use the tuned weights {file}: {error}; remove that folder and --resume") from None

    def _sampler(self, stage: str, guessed: Sequence[Source], axis: int) -> Sampler:
        seed, rows = self.work.seed(stage), self.options.tune_rows
        reference = [Source(case.name, case.image, case.label) for case in self.work.labelled]
        sources = [reference, list(guessed)] if guessed else [reference]
        shares = [rows] if not guessed else [max(rows - rows // 2, 1), max(rows // 2, 1)]
        parts = [
            self._part(source, share, seed + number, axis)
            for number, (source, share) in enumerate(zip(sources, shares, strict=True))
        ]
        return SideBySide(parts) if len(parts) > 1 else parts[0]

    def _part(self, sources: list[Source], rows: int, seed: int, axis: int) -> Sampler:
        plan = self.work.plan
        if self.whole:
            return WholeVolumes(sources, self.common_size(), rows, seed, self.options.augment, plan.spacing_mm)
        augment = self.options.patch_augment or self.work.config.augment
        patches = PatchSampler(sources, [], plan.patch, rows, 0, seed, augment=augment, spacing_mm=plan.spacing_mm)
        return CurvedSlices(patches, seed, axis) if self.options.augment and self.model.slices else patches

    def probability(self, case: PreparedCase) -> NDArray[np.float32]:
        """Class probabilities of one volume ``[K, X, Y, Z]``: mean over the networks and, of patches, over overlapping ones."""
        parts = [self.work.predict(network, case, whole=self.whole) for network in self.networks]
        mean: NDArray[np.float32] = np.mean(parts, axis=0, dtype=np.float32)
        return mean

    @torch.no_grad()
    def on_patch(self, image: ImageBatch) -> torch.Tensor:
        """Class probabilities of training patches ``[B, K, X, Y, Z]``, the published variant."""
        return torch.stack([network(image).float().softmax(1) for network in self.networks]).mean(0)

    def freeze(self) -> None:
        """Evaluation mode and no gradients, for a teacher that is only asked from now on."""
        for network in self.networks:
            freeze(network)


def _file(folder: Path, axis: int) -> Path:
    return folder / f"tuned-axis{axis}.safetensors"
