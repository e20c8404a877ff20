"""The command `scarceseg-pretrain`: make the weights of `tiny-sam3d` and `tiny-sam` again, from synthetic volumes alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scarceseg.cli import guarded
from scarceseg.errors import RunError

if TYPE_CHECKING:
    from scarceseg.pretrain.loop import Pretraining, Schedule, Task

app = typer.Typer(
    help="Pre-train the small foundation models on synthetic volumes (hours; stops and resumes at any step).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

OutOpt = Annotated[Path, typer.Option(help="Folder for the checkpoint, metrics.jsonl and, at the end, the weights.")]
IterationsOpt = Annotated[int, typer.Option(min=1, help="Steps in all.")]
SeedOpt = Annotated[int, typer.Option(min=0)]
LrOpt = Annotated[float, typer.Option(min=0.0, help="Highest learning rate.")]
ThreadsOpt = Annotated[int, typer.Option(min=0, help="Threads; 0 leaves it to PyTorch.")]
ResumeOpt = Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")]
StartOpt = Annotated[
    Path | None, typer.Option(help="Start from the weights of this file instead of random ones.", exists=True)
]


@app.command("tiny-sam3d")
def pretrain_tiny_sam3d(
    out: OutOpt,
    iterations: IterationsOpt = 6000,
    seed: SeedOpt = 0,
    lr: LrOpt = 1e-3,
    threads: ThreadsOpt = 0,
    start: StartOpt = None,
    resume: ResumeOpt = False,
) -> None:
    """Clicks, boxes and masks on synthetic volumes (the weights in the package)."""
    from scarceseg.foundation.tiny_sam3d import read_tiny_sam3d, save_tiny_sam3d
    from scarceseg.foundation.tiny_sam3d_net import TinySam3DNet
    from scarceseg.pretrain.click_task import ClickTask
    from scarceseg.pretrain.loop import Schedule

    _prepare(out, seed, threads, resume)
    network = TinySam3DNet() if start is None else read_tiny_sam3d(start)
    run = _run(ClickTask(network), Schedule(iterations, lr=lr, seed=seed), out, resume)
    network.load_state_dict(run.average)
    path = out / "tiny_sam3d.safetensors"
    save_tiny_sam3d(path, network, {"iterations": str(iterations), "seed": str(seed)})
    typer.echo(f"weights: {path}")


@app.command("tiny-sam")
def pretrain_tiny_sam(
    out: OutOpt,
    teacher: Annotated[
        str, typer.Option(help="tiny-sam3d, or a file of its kind: its features are foretold.")
    ] = "tiny-sam3d",
    iterations: IterationsOpt = 6000,
    seed: SeedOpt = 0,
    lr: LrOpt = 7e-4,
    threads: ThreadsOpt = 0,
    start: StartOpt = None,
    resume: ResumeOpt = False,
) -> None:
    """Features of tiny-sam3d, foretold on stitched mosaics of synthetic volumes (the weights in the package)."""
    from scarceseg.foundation.catalogue import CATALOGUE
    from scarceseg.foundation.tiny_sam import read_tiny_sam, save_tiny_sam, start_tiny_sam
    from scarceseg.foundation.tiny_sam3d import read_tiny_sam3d
    from scarceseg.foundation.weights import find
    from scarceseg.pretrain.loop import Schedule
    from scarceseg.pretrain.mosaic_task import MosaicTask

    _prepare(out, seed, threads, resume)
    teaching = read_tiny_sam3d(find(teacher) if teacher in CATALOGUE else Path(teacher))
    sam = start_tiny_sam(seed) if start is None else read_tiny_sam(start)
    run = _run(MosaicTask(sam, teaching), Schedule(iterations, lr=lr, seed=seed), out, resume)
    sam.load_state_dict(
        {key.removeprefix("sam."): value for key, value in run.average.items() if key.startswith("sam.")}
    )
    path = out / "tiny_sam.safetensors"
    save_tiny_sam(path, sam, {"iterations": str(iterations), "seed": str(seed)})
    typer.echo(f"weights: {path}")


def _prepare(out: Path, seed: int, threads: int, resume: bool) -> None:
    import torch

    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file: choose a folder for --out")
    present = (out / "checkpoint.pt").exists()
    if present and not resume:
        raise RunError(f"{out} holds a pre-training already: add --resume to go on with it, or choose another --out")
    if resume and not present:
        raise RunError(f"{out} holds no checkpoint to resume: leave --resume away to start")
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)


def _run(task: Task, schedule: Schedule, out: Path, resume: bool) -> Pretraining:
    from scarceseg.engine.machine import stop_signals
    from scarceseg.pretrain.loop import Pretraining

    with stop_signals() as stop:
        run = Pretraining(task, schedule, out, stop=stop)
        if resume:
            run.restore()
        run.run()
    return run


def main(arguments: list[str] | None = None) -> None:
    """Run the command; exit status as of `scarceseg`."""
    sys.exit(guarded(lambda: app(arguments)))


if __name__ == "__main__":
    main()
