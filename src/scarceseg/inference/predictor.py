"""A trained network on whole volumes: in memory with `Predictor`, from files to files with `predict`."""

from __future__ import annotations

import sys
from collections import ChainMap
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn

from scarceseg.data.images import list_images, read_volume
from scarceseg.data.prepare import prepare_volume
from scarceseg.engine.logging import Display
from scarceseg.engine.parallel import gathered, local_rank, meet, processes, rank
from scarceseg.errors import ConfigError, DataError, RunError
from scarceseg.functional.sliding import sliding_window
from scarceseg.inference.export import Existing, Job, classes_named, open_folder, plan_jobs, write_job
from scarceseg.inference.model import load_model, save_model
from scarceseg.inference.orientations import MeanOverOrientations
from scarceseg.inference.prediction import MeanPrediction, Prediction, Prepared
from scarceseg.networks.selftest import to_memory_format
from scarceseg.types import Geometry, Volume

__all__ = ["Prediction", "Predictor", "load_model", "pick_device", "predict", "save_model"]


class Predictor:
    """A trained network, loaded once.

    Windows overlap by half with Gaussian weights, or lie 18x18x4 voxels apart with equal weights (`legacy`, as in the
    published evaluations of UA-MT and its successors; slow), or there is one, the `whole` volume (fastest, most memory; masks
    differ a little, as the network sees more than in training). On the kind of device it was trained on the network runs
    in the precision of its training, elsewhere in float32.

    Args:
        run: folder with ``model.json`` and ``model.safetensors``.
        device: "auto" takes a GPU if there is one; "cpu", "cuda" or "cuda:1".
        legacy, whole: see above; at most one of them.
        tta: test-time augmentation, the mean over the orientations of training (`MeanOverOrientations`): two to eight times
            the work.
        batch: windows in one forward pass.

    Raises:
        ConfigError: `legacy` and `whole` together, or `tta` for a network trained in one orientation.
        RunError: the run cannot be used (see `load_model`), or there is no such device.
    """

    def __init__(
        self,
        run: Path | str,
        *,
        device: str = "auto",
        legacy: bool = False,
        whole: bool = False,
        tta: bool = False,
        batch: int = 4,
    ) -> None:
        if legacy and whole:
            raise ConfigError("legacy and whole exclude each other: windows of the published scripts, or one for all")
        self.run = Path(run)
        self.device = pick_device(device)
        self.legacy = legacy
        self.whole = whole
        self.batch = batch
        network, self.plan, self.info = load_model(self.run)
        self.network = network.to(self.device)
        to_memory_format(self.network, self.info.memory_format)
        self.tta = tta
        self._asked()  # a network that cannot be asked so is refused before any volume is read

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; the first is the background."""
        return self.plan.classes

    def prepare(self, volume: Volume, geometry: Geometry) -> Prepared:
        """Orient, resample and normalise a volume ``[C, X, Y, Z]`` as for training.

        Raises:
            DataError: another number of channels than the network has.
        """
        image, prepared = prepare_volume(volume, geometry, self.plan)
        return Prepared(image, prepared, geometry)

    def predict_prepared(self, volume: Prepared, progress: Callable[[int, int], None] | None = None) -> Prediction:
        """Prediction for a volume that `prepare` has prepared.

        Args:
            volume: what `prepare` returned.
            progress: called with the windows done and their number.

        Raises:
            RunError: the device has too little memory, or the network takes no whole volumes.
        """
        window = self.window(volume)
        try:
            probability = sliding_window(
                volume.image,
                self._asked(),
                window,
                mode="legacy" if self.legacy else "gaussian",
                batch=self.batch,
                device=self.device,
                autocast=self._autocast,
                progress=progress,
            )
        except torch.cuda.OutOfMemoryError:
            raise RunError(
                f"{self.device} has too little memory for {self.batch} windows of "
                f"{'x'.join(map(str, window))} voxels at once: take a smaller batch, windows instead of the whole, or the CPU"
            ) from None
        except (RuntimeError, ValueError, ConfigError) as error:
            if not self.whole:
                raise
            raise RunError(
                f"the network {self.info.network.name} cannot take {'x'.join(map(str, window))} voxels in one piece "
                f"({str(error).splitlines()[0]}): predict without 'whole'"
            ) from None
        return Prediction(probability.cpu().numpy(), volume.geometry, volume.original)

    def window(self, volume: Prepared) -> tuple[int, ...]:
        """Size of a window: the patch, or the whole volume rounded up to what the network's halvings need."""
        if not self.whole:
            return self.plan.patch
        sides = zip(volume.image.shape[1:], self.network.divisor, strict=True)
        return tuple(-(-side // divisor) * divisor for side, divisor in sides)

    def predict_volume(
        self, volume: Volume, geometry: Geometry, progress: Callable[[int, int], None] | None = None
    ) -> Prediction:
        """Segment one volume.

        Args:
            volume: ``[C, X, Y, Z]`` in the file's own intensities.
            geometry: its grid; the prediction has the same.
            progress: called with the windows done and their number.

        Raises:
            DataError: another number of channels than the network has.
            RunError: the device has too little memory.
        """
        return self.predict_prepared(self.prepare(volume, geometry), progress)

    def _asked(self) -> nn.Module:
        """The network, or its mean over orientations."""
        x, y, _ = self.plan.patch
        return MeanOverOrientations(self.network, self.info.augment, x == y) if self.tta else self.network

    def _autocast(self) -> AbstractContextManager[object]:
        if self.info.precision == "bf16" and self.info.device == self.device.type:
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the first GPU, or the CPU where there is none. ``torchrun`` gives each process its own.

    Raises:
        RunError: not a device's name, or a GPU that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and processes() > 1:
        name = f"cuda:{local_rank() % max(torch.cuda.device_count(), 1)}"
    device: torch.device | None
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in {"cpu", "cuda", "mps"}:
        raise RunError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise RunError(f"device {name!r}: this machine has no Apple GPU that PyTorch can use; take cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RunError(
            f"device {name!r}: this machine shows {torch.cuda.device_count()} CUDA devices; take cpu or auto"
        )
    return device


def predict(
    run: Path | str | Sequence[Path | str],
    inputs: Path | str | Sequence[Path | str],
    out: Path | str,
    *,
    probabilities: bool = False,
    uncertainty: bool = False,
    largest_component: bool | str | Sequence[str] = False,
    legacy: bool = False,
    whole: bool = False,
    tta: bool = False,
    batch: int = 4,
    device: str = "auto",
    existing: Existing = "replace",
    on_progress: Callable[[float, int, str], None] | None = None,
) -> list[Path]:
    """Segment image files; every result has the size, spacing, origin and direction of its input, and its format.

    Writes ``CASE.EXT`` with class indices, on request ``CASE_prob_CLASS.EXT`` (float32 in [0, 1], one file a class) and
    ``CASE_uncertainty.EXT`` (float32, entropy / ln K in [0, 1]). A DICOM series becomes ``.nii.gz``. The next volume is
    read and the last result written while the network works. A case that cannot be used does not stop the others. Started by
    ``torchrun``, each process takes every W-th case.

    Args:
        run: folder with ``model.json`` and ``model.safetensors``, or several: the mean of their class probabilities is taken
            on the grid of each input. Their channels and classes have to be the same, spacing and network may differ.
        inputs: image files, folders of images or DICOM folders.
        out: folder for the results, made if it is missing.
        probabilities, uncertainty: write these maps too.
        largest_component: keep the largest connected piece in the mask, of every class or of those named; the maps stay as they
            are. Of paired organs that are one class it keeps one.
        legacy, whole, tta, batch, device: see `Predictor`.
        existing: "replace" results of an earlier call, "skip" them (a case with some of its files gets the others) or "refuse"
            to begin; a file is there as a whole or not at all. Inputs are never replaced.
        on_progress: called with the cases done (a fraction counts the current one's windows), their number, and the
            current name; None shows a progress bar.

    Returns:
        The files written, in the order of the cases.

    Raises:
        ConfigError: a class of `largest_component` that the network does not have, or options that exclude each other.
        RunError: a run or the device cannot be used, runs do not go together, `out` cannot be written, or results are there and
            `existing` refuses.
        DataError: nothing to predict; or, after all others are done, the list of the cases that failed.
    """
    runs = [run] if isinstance(run, str | Path) else run
    predictors = [Predictor(one, device=device, legacy=legacy, whole=whole, tta=tta, batch=batch) for one in runs]
    _check_alike(predictors)
    predictor = predictors[0]
    entries = [inputs] if isinstance(inputs, str | Path) else inputs
    found = list_images([Path(entry) for entry in entries], len(predictor.plan.channels))
    clean = classes_named(largest_component, predictor.classes)
    planned = plan_jobs(found, predictor.classes, Path(out), probabilities, uncertainty, existing)
    open_folder(Path(out))
    left = [job for job in planned if job.missing]
    if len(left) < len(planned) and rank() == 0:
        done = f"{len(planned) - len(left)} of {len(planned)} cases are done"
        print(f"skip: {done} in {out} and stay as they are", file=sys.stderr, flush=True)
    jobs = left[rank() :: processes()]
    meet(cuda=False, patience=timedelta(days=30))  # who has done its share waits for the others, however long that is
    written: list[Path] = []
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        if jobs:
            report = on_progress or _bar(stack.enter_context(Display("predict", 0, len(jobs))))
            written, failed = _run_jobs(predictors, jobs, clean, report)
    # A process that ends with an error ends the others, so that all wait for the last one.
    everything = gathered((len(jobs), failed))
    total, failed = sum(count for count, _ in everything), dict(ChainMap(*(part for _, part in everything)))
    if failed:
        listing = "; ".join(f"{name}: {message}" for name, message in sorted(failed.items()))
        rest = f"the other {total - len(failed)} are in {out}" if len(failed) < total else "nothing was written"
        error = DataError(f"{len(failed)} of {total} cases failed ({rest}): {listing}")
        error.told = rank() > 0
        raise error
    return written


def _check_alike(predictors: Sequence[Predictor]) -> None:
    if not predictors:
        raise RunError("there is no run to predict with: name one, or several")
    first = predictors[0]
    for other in predictors[1:]:
        for what, a, b in (
            ("channels", first.plan.channels, other.plan.channels),
            ("classes", first.classes, other.classes),
        ):
            if a != b:
                raise RunError(
                    f"expected runs with the same {what} to average, got {', '.join(a)} in {first.run} and {', '.join(b)} in "
                    f"{other.run}: predict with them one by one"
                )


def _run_jobs(
    predictors: Sequence[Predictor],
    jobs: Sequence[Job],
    clean: Collection[int] | None,
    on_progress: Callable[[float, int, str], None],
) -> tuple[list[Path], dict[str, str]]:
    """Three stages side by side: the next case is read and prepared, one is in the network, the last one is written."""
    written: list[Path] = []
    failed: dict[str, str] = {}

    def load(job: Job) -> list[Prepared]:
        volume = read_volume(job.inputs)
        return [predictor.prepare(*volume) for predictor in predictors]

    with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as writer:
        coming: Future[list[Prepared]] | None = reader.submit(load, jobs[0])
        leaving: Future[list[Path]] | None = None
        try:
            for number, job in enumerate(jobs):
                assert coming is not None
                ready, coming = coming, None
                coming = reader.submit(load, jobs[number + 1]) if number + 1 < len(jobs) else None
                try:
                    prediction = _ask(predictors, ready.result(), _within(on_progress, number, len(jobs), job.name))
                    if not prediction.is_number:
                        raise DataError(
                            "the network's output for this volume is not a number everywhere: expected probabilities; look "
                            "at its intensities beside those of the training volumes"
                            + (", or predict with --device cpu" if predictors[0].device.type != "cpu" else "")
                        )
                except DataError as error:
                    failed[job.name] = str(error)
                else:
                    if leaving is not None:
                        written += leaving.result()
                    leaving = writer.submit(write_job, job, prediction, clean)
                    del prediction
                del ready
                on_progress(number + 1, len(jobs), job.name)
            if leaving is not None:
                written += leaving.result()
        except BaseException:
            reader.shutdown(wait=False, cancel_futures=True)
            raise
    return written, failed


def _ask(
    predictors: Sequence[Predictor], volumes: Sequence[Prepared], progress: Callable[[int, int], None]
) -> Prediction | MeanPrediction:
    """One network after the other, the mean where there are several."""
    parts = []
    for number, (predictor, volume) in enumerate(zip(predictors, volumes, strict=True)):

        def within(windows: int, of: int, before: int = number) -> None:
            progress(before * of + windows, len(predictors) * of)

        parts.append(predictor.predict_prepared(volume, within))
    return parts[0] if len(parts) == 1 else MeanPrediction(tuple(parts), volumes[0].original)


def _bar(display: Display) -> Callable[[float, int, str], None]:
    def report(done: float, _total: int, name: str) -> None:
        display.update(int(done), note=name if done == int(done) else f"{name} {done % 1:.0%}")

    return report


def _within(
    on_progress: Callable[[float, int, str], None], number: int, total: int, name: str
) -> Callable[[int, int], None]:
    def report(windows: int, of: int) -> None:
        if windows < of:
            on_progress(number + windows / of, total, name)

    return report
