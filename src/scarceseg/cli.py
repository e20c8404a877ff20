"""The command `scarceseg`: reads what the user typed, calls one function, prints. No logic."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from scarceseg.errors import Interrupted, ScarceSegError

app = typer.Typer(
    help="Train a small 3D segmentation network from a few labelled volumes and a pool of unlabelled ones.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
datasets_app = typer.Typer(help="Public datasets: list, download, convert.", no_args_is_help=True)
app.add_typer(datasets_app, name="datasets")
foundations_app = typer.Typer(help="Weights of foundation models: list, download, check.", no_args_is_help=True)
app.add_typer(foundations_app, name="foundations")
benchmark_app = typer.Typer(help="Measure models on your own data.", no_args_is_help=True)
app.add_typer(benchmark_app, name="benchmark")

DatasetArg = Annotated[Path, typer.Argument(help="Folder in nnU-Net raw layout (dataset.json, imagesTr, labelsTr).")]
LabeledOpt = Annotated[
    str | None, typer.Option(help="Number of labelled cases kept (first by name), or their names a,b,c.")
]
ValOpt = Annotated[str | None, typer.Option(help="Validation cases: names or patterns such as 'la_06[4-9],la_07*'.")]
MethodOpt = Annotated[str | None, typer.Option(help="Terms joined by '+', such as mean-teacher.")]
RecipeOpt = Annotated[str | None, typer.Option(help="Recipe name or YAML file; flags given here win.")]
SetOpt = Annotated[
    list[str] | None, typer.Option("--set", help="Any setting of the config, KEY=VALUE, such as optim.lr=0.005.")
]
SpacingOpt = Annotated[str | None, typer.Option(help="Voxel spacing in mm: one number, or X,Y,Z.")]
PatchOpt = Annotated[str | None, typer.Option(help="Patch in voxels: X,Y,Z.")]


def _version(asked: bool) -> None:
    if asked:
        from scarceseg import __version__

        typer.echo(f"scarceseg {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options that come before the command."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for data, runs and the report.")] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train, predict, evaluate and report on synthetic volumes: no download, a few minutes on a CPU."""
    from scarceseg.demo import run_demo

    typer.echo(f"report: {run_demo(out, seed)}")


@app.command()
def plan(
    dataset: DatasetArg,
    method: MethodOpt = None,
    recipe: RecipeOpt = None,
    labeled: LabeledOpt = None,
    val: ValOpt = None,
    network: Annotated[str | None, typer.Option(help="Network the patch has to fit.")] = None,
    spacing: SpacingOpt = None,
    patch: PatchOpt = None,
    set_: SetOpt = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show what training on a dataset would use: spacing, patch, memory, and warnings about the data."""
    from scarceseg.show import plan_dataset, print_plan

    made = plan_dataset(
        _config(
            recipe=recipe,
            assignments=set_ or [],
            dataset=dataset,
            method=method,
            labeled=labeled,
            val=val,
            network=network,
            spacing=spacing,
            patch=patch,
        )
    )
    typer.echo(made.model_dump_json(indent=1)) if json else print_plan(made)


@app.command()
def train(
    dataset: Annotated[
        Path | None, typer.Argument(help="Folder in nnU-Net raw layout; may be left out with --resume.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Run folder to make, or to go on with.")] = ...,  # type: ignore[assignment]
    method: MethodOpt = None,
    recipe: RecipeOpt = None,
    labeled: LabeledOpt = None,
    val: ValOpt = None,
    network: Annotated[str | None, typer.Option(help="vnet, unet3d, or any MONAI network.")] = None,
    foundation: Annotated[str | None, typer.Option(help="Foundation model, for methods that use one.")] = None,
    spacing: SpacingOpt = None,
    patch: PatchOpt = None,
    iterations: Annotated[int | None, typer.Option(help="Training iterations.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all randomness.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32 or bf16.")] = None,
    set_: SetOpt = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a stopped run.")] = False,
) -> None:
    """Train a network and leave everything about it in the run folder."""
    from scarceseg.engine.parallel import rank
    from scarceseg.engine.run import train as train_run

    config = _config(
        recipe=recipe,
        saved=out / "config.yaml" if resume else None,
        assignments=set_ or [],
        dataset=dataset,
        method=method,
        labeled=labeled,
        val=val,
        network=network,
        foundation=foundation,
        spacing=spacing,
        patch=patch,
        iterations=iterations,
        seed=seed,
        device=device,
        precision=precision,
    )
    result = train_run(config, out, resume=resume)
    if rank() > 0:
        return  # the first process tells
    for warning in result.warnings:
        typer.echo(f"warning: {warning}", err=True)
    if result.evaluation is not None:
        from scarceseg.evaluation.tables import print_evaluation

        print_evaluation(result.evaluation)
    typer.echo(f"run: {result.folder}  report: {result.folder / 'report.html'}")


@app.command()
def predict(
    run: Annotated[
        Path,
        typer.Argument(help="Run folder, bundle of 'export', or any folder with model.json and model.safetensors."),
    ],
    inputs: Annotated[list[Path], typer.Argument(help="Image files, folders of images, or one DICOM series folder.")],
    out: Annotated[Path, typer.Option(help="Folder for the masks.")],
    with_: Annotated[
        list[Path] | None,
        typer.Option("--with", help="Another run, whose probabilities are averaged in. May be repeated."),
    ] = None,
    probabilities: Annotated[bool, typer.Option(help="Also write the probability of each class.")] = False,
    uncertainty: Annotated[bool, typer.Option(help="Also write the voxel-wise entropy / ln K, in [0, 1].")] = False,
    largest_component: Annotated[bool, typer.Option(help="Keep the largest component of each class.")] = False,
    largest_component_of: Annotated[
        str | None, typer.Option(help="Keep the largest component of these classes, such as liver,spleen.")
    ] = None,
    legacy: Annotated[bool, typer.Option(help="Uniform 18x18x4 windows of the published scripts (slow).")] = False,
    whole: Annotated[bool, typer.Option(help="Each volume in one piece (fastest, most memory).")] = False,
    tta: Annotated[
        bool, typer.Option(help="Average over the turns and flips of training (up to 8 times slower).")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Windows per forward pass.")] = 4,
    existing: Annotated[
        str, typer.Option(help="Results that are there: replace them, skip their cases, or refuse to begin.")
    ] = "replace",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Segment images; each mask has the size, spacing, origin and direction of its input file."""
    from scarceseg.inference.predictor import predict as predict_files

    written = predict_files(
        [run, *(with_ or [])],
        inputs,
        out,
        probabilities=probabilities,
        uncertainty=uncertainty,
        largest_component=largest_component if largest_component_of is None else largest_component_of,
        legacy=legacy,
        whole=whole,
        tta=tta,
        batch=batch,
        existing=existing,  # type: ignore[arg-type]
        device=device,
    )
    typer.echo(f"{len(written)} files in {out}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run folder, or any folder with model.json and model.safetensors.")],
    out: Annotated[Path, typer.Option(help="Folder to make (bundle), or file (.onnx, .ts).")],
    to: Annotated[str, typer.Option(help="bundle (MONAI), onnx or torchscript.")] = "bundle",
) -> None:
    """Write the trained network for other programs, checked against the original."""
    from scarceseg.inference.export_model import export_model

    typer.echo(f"{to}: {export_model(run, out, to)}")


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder of masks, or one mask.")],
    references: Annotated[Path, typer.Argument(help="Folder of reference masks, or one.")],
    json: Annotated[Path | None, typer.Option(help="Write the results here as JSON.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write one row a case and class here.")] = None,
    units: Annotated[str, typer.Option(help="Unit of distances: mm or voxel.")] = "mm",
    empty: Annotated[
        str, typer.Option(help="Distance of an empty mask: nan, or zero as published LA code has it.")
    ] = "nan",
) -> None:
    """Dice, Jaccard, ASD, ASSD and HD95 of every case and class."""
    from scarceseg.evaluation.evaluate import IncompleteEvaluation
    from scarceseg.evaluation.evaluate import evaluate as evaluate_files
    from scarceseg.evaluation.tables import print_evaluation

    try:
        result = evaluate_files(predictions, references, json=json, csv=csv, units=units, empty=empty)  # type: ignore[arg-type]
    except IncompleteEvaluation as error:
        print_evaluation(error.result)
        raise
    print_evaluation(result)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders of one dataset, measured on the same cases.")],
    baseline: Annotated[str | None, typer.Option(help="Test against this run's group, or this method's.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write all numbers here as JSON.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write one row a group, class and metric here.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with tables, box plots and masks here.")] = None,
    units: Annotated[str | None, typer.Option(help="Unit of distances: mm or voxel; default as measured.")] = None,
    scores: Annotated[
        str, typer.Option(help="Result of 'evaluate --json' in each run folder, such as test.json.")
    ] = "evaluation.json",
) -> None:
    """Mean and spread over seeds, a paired test against a baseline, and the published figures beside them."""
    from scarceseg.evaluation.compare import compare as compare_runs
    from scarceseg.evaluation.comparison_tables import print_comparison

    found = compare_runs(runs, baseline=baseline, json=json, csv=csv, html=html, units=units, scores=scores)  # type: ignore[arg-type]
    print_comparison(found)


@app.command()
def segment(
    image: Annotated[Path, typer.Argument(help="Image file, or folder with one DICOM series.")],
    out: Annotated[Path, typer.Option(help="Mask to write, on the grid of the image.")],
    foundation: Annotated[str, typer.Option(help="Model: a name of 'foundations list', or a file.")] = "tiny-sam3d",
    point: Annotated[
        list[str] | None, typer.Option(help="Click inside: X,Y,Z, voxels from 0. May be repeated.")
    ] = None,
    negative: Annotated[list[str] | None, typer.Option(help="Click outside: X,Y,Z. May be repeated.")] = None,
    box: Annotated[str | None, typer.Option(help="Box: X0,Y0,Z0,X1,Y1,Z1, both corners inside it.")] = None,
    mask: Annotated[Path | None, typer.Option(help="First mask or probability, on the grid of the image.")] = None,
    world: Annotated[bool, typer.Option("--world", help="Places are in mm, LPS (ITK, DICOM).")] = False,
    ras: Annotated[bool, typer.Option("--ras", help="Places are in mm, RAS (NIfTI, 3D Slicer).")] = False,
    channel: Annotated[int | None, typer.Option(min=0, help="Channel of a file that holds several.")] = None,
    probabilities: Annotated[Path | None, typer.Option(help="Also write the probability here.")] = None,
    keep: Annotated[str, typer.Option(help="Pieces kept: clicked (those with a click inside) or all.")] = "clicked",
    view: Annotated[str | None, typer.Option(help="How a 2D SAM sees a volume: slices or mosaic.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Segment what clicks, a box or a mask point at, with a foundation model and no training."""
    from scarceseg.inference.segment import segment_typed

    result = segment_typed(
        image,
        point=point or [],
        negative=negative or [],
        box=box,
        mask=mask,
        foundation=foundation,
        world=world,
        ras=ras,
        channel=channel,
        keep=keep,
        device=device,
        out=out,
        probabilities=probabilities,
        view=view,
    )
    for note in result.notes:
        typer.echo(f"warning: {note}", err=True)
    typer.echo(f"mask: {out}  {result}")


@app.command()
def suggest(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    count: Annotated[int, typer.Option("--count", "-n", help="Volumes to suggest.")] = 3,
    json: Annotated[Path | None, typer.Option(help="Write the whole ranking here as JSON too.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Rank the unlabelled volumes of a run by what labelling them promises; the report shows the first ones."""
    from scarceseg.active.suggest import suggest as suggest_cases
    from scarceseg.active.words import print_suggestions

    print_suggestions(suggest_cases(run, count, json=json, device=device))
    typer.echo(f"report: {run / 'report.html'}")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Run folder.")]) -> None:
    """Make the report of a run again."""
    from scarceseg.report import build_report

    typer.echo(f"report: {build_report(run)}")


@datasets_app.command("list")
def datasets_list() -> None:
    """Show the known datasets."""
    from scarceseg.data.catalogue import print_datasets

    print_datasets()


@datasets_app.command("get")
def datasets_get(
    name: Annotated[str, typer.Argument(help="Dataset name, see 'datasets list'.")],
    out: Annotated[Path, typer.Option(help="Folder in which the dataset's own folder is made.")] = Path(),
) -> None:
    """Download an openly available dataset and convert it."""
    from scarceseg.data.catalogue import get_dataset

    typer.echo(f"dataset: {get_dataset(name, out)}")


@datasets_app.command("convert")
def datasets_convert(
    name: Annotated[str, typer.Argument(help="Dataset name, see 'datasets list'.")],
    src: Annotated[Path, typer.Argument(help="Folder with the published files.")],
    dst: Annotated[Path, typer.Argument(help="Folder to make, in nnU-Net raw layout.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Option of the dataset, KEY=VALUE, such as spacing_mm=1 or fold=2."),
    ] = None,
) -> None:
    """Convert the files of a public benchmark to nnU-Net raw layout."""
    from scarceseg.data.catalogue import convert_dataset
    from scarceseg.settings import read_assignments

    typer.echo(f"dataset: {convert_dataset(name, src, dst, **read_assignments(set_ or []))}")


@foundations_app.command("list")
def foundations_list(
    json: Annotated[bool, typer.Option("--json", help="Print as JSON, with more facts.")] = False,
) -> None:
    """Show the known weights: licence, size, source, and whether they are here."""
    from scarceseg.foundation.weights import print_weights

    print_weights(as_json=json)


@foundations_app.command("get")
def foundations_get(
    name: Annotated[str, typer.Argument(help="Name of the weights, see 'foundations list'.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the file; default is the cache, where it is found.")
    ] = None,
) -> None:
    """Download weights; a later call goes on with an interrupted one."""
    from scarceseg.foundation.weights import get

    typer.echo(f"weights: {get(name, out)}")


@foundations_app.command("check")
def foundations_check(
    file: Annotated[Path, typer.Argument(help="File of weights, Hugging Face folder, or run folder.")],
) -> None:
    """Tell what a file of weights is, and which names it lacks or has too many; exit status 2 when it does not fit."""
    from scarceseg.foundation.identify import check

    found = check(file)
    typer.echo(found.text)
    if not found.ok:
        raise typer.Exit(2)


@benchmark_app.callback()
def _benchmark() -> None:
    """Keeps the name of the only subcommand."""


@benchmark_app.command("clicks")
def benchmark_clicks(
    dataset: DatasetArg,
    foundation: Annotated[
        str, typer.Option(help="Promptable model: a name, see 'foundations list', or a file.")
    ] = "tiny-sam3d",
    clicks: Annotated[str, typer.Option(help="Numbers of clicks after which the mask is scored.")] = "1,2,5,10",
    cases: Annotated[str, typer.Option(help="Names or patterns of cases, such as 'la_06[4-9],la_07*'.")] = "*",
    spacing: SpacingOpt = None,
    style: Annotated[str, typer.Option(help="largest (deepest error), ritm or random.")] = "largest",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json: Annotated[Path | None, typer.Option(help="File for all numbers.")] = None,
) -> None:
    """Score a promptable model after 1, 2, 5, 10 simulated clicks on the labelled cases of a dataset."""
    from scarceseg.benchmark.clicks import run_clicks

    run_clicks(dataset, foundation, clicks, cases, spacing, style, seed, device, json)


def _config(
    recipe: str | None = None, saved: Path | None = None, assignments: list[str] | None = None, **flags: Any
) -> Any:
    from scarceseg.settings import config_from_flags

    return config_from_flags(recipe, saved, assignments or [], flags)


def main(arguments: list[str] | None = None) -> None:
    """Run the command; exit status 0 done, 2 bad input or usage, 130 interrupted, 1 our fault."""
    sys.exit(guarded(lambda: app(arguments, standalone_mode=True)))


def guarded(call: Callable[[], Any]) -> int:
    """Call, and turn what a user can mend into one line on stderr and an exit status."""
    try:
        call()
    except ScarceSegError as error:
        if not error.told:
            typer.echo(f"error: {error}", err=True)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT):
            raise
        typer.echo(
            f"error: {error}: free the disk, or choose a place that may be written; what is done is kept", err=True
        )
        return 2
    except Interrupted as error:
        typer.echo(str(error), err=True)
        return 130
    return 0


if __name__ == "__main__":
    main()
