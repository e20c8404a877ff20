"""From a dataset and a config to a run folder: plan, prepare, the terms' stages, train, export, validate, report."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

from scarceseg.config import Config, Section
from scarceseg.data.dataset import Dataset, Split, load_dataset, make_split
from scarceseg.data.fingerprint import Fingerprint, alike, fingerprint
from scarceseg.data.plan import Plan, make_plan
from scarceseg.data.prepare import PreparedCase, prepare_cases
from scarceseg.engine.folder import FACTS, given_back, open_run, read_json, timed_stage, write_json
from scarceseg.engine.logging import Display, RunLog, say_warnings
from scarceseg.engine.loop import Loop, LoopTask
from scarceseg.engine.machine import make_fabric, stop_signals, uses_cuda
from scarceseg.engine.parallel import check_rows, check_tasks, first_alone, meet, processes, rank, wait
from scarceseg.engine.pictures import keep_pool
from scarceseg.engine.validation import Validation, finish
from scarceseg.engine.workspace import Workspace, patch_sampler
from scarceseg.errors import ConfigError, Interrupted, RunError
from scarceseg.files import write_text
from scarceseg.foundation.load import check_foundation
from scarceseg.inference.predictor import save_model
from scarceseg.methods.base import Term, build_terms, check_options
from scarceseg.methods.models import foundation_models, settle_foundations, with_places
from scarceseg.networks.base import SegmentationNetwork, Sides, build_network, require_halves, sides_of
from scarceseg.report import build_report
from scarceseg.seeds import seed_init

FINISHING = timedelta(days=7)
"""How long other processes wait for the first one to measure the model."""


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves.

    Attributes:
        folder: the run folder.
        evaluation: metrics on the validation cases in the form `evaluate` writes, or None without any.
        warnings: what the user should know.
    """

    folder: Path
    evaluation: dict[str, Any] | None
    warnings: tuple[str, ...]


def train(config: Config, out: Path | str, *, resume: bool = False, cache: Path | None = None) -> RunResult:
    """Train one network and leave everything about it in `out`.

    Args:
        config: the run; see `scarceseg.config.Config`.
        out: run folder, new or, with `resume`, one that was stopped.
        resume: go on where the folder's checkpoint stands; starts afresh when there is none.
        cache: folder of prepared volumes; None is the user's cache folder.

    Raises:
        DataError, ConfigError, RunError: with one message that says what to do.
        Interrupted: stopped by Ctrl-C or SIGTERM after saving.
    """
    folder = Path(out)
    check_tasks()
    check_options(config.method, config.terms)  # before any work
    meet(uses_cuda(config))
    dataset, split = first_alone(lambda: _data(config))
    method_terms = build_terms(config.method, config.terms, len(dataset.classes))
    config = with_places(settle_foundations(config, len(split.labelled)))
    if config.select == "best" and not split.val:
        raise ConfigError("select: best needs validation cases: name them with --val, or keep select: last")
    sides = sides_of(config.network.name, config.network.args, len(dataset.channels), len(dataset.classes))
    if not (resume and (folder / "config.yaml").exists()):  # a run that goes on may be past the stages that need them
        for name in {name for names in foundation_models(config).values() for name in names}:
            check_foundation(name)
    resumed = first_alone(lambda: open_run(folder, config, resume))
    with stop_signals() as stop:
        warnings = [*split.warnings, *_useless(config, method_terms)]
        with given_back(folder, resumed):
            with timed_stage(folder, "prepare"):
                plan = first_alone(lambda: _plan(config, dataset, split, folder, sides, resumed, cache))
                warnings += plan.warnings
                terms = _terms(config, method_terms, split, plan, warnings)
                say_warnings(warnings)
                cases = _prepared(split, plan, cache, stop)
            said = len(warnings)
            student, work = _workspace(config, folder, split, plan, cases, terms, stop, cache, warnings)
            first_alone(lambda: _check(terms, student, work))
            say_warnings(warnings[said:])
        finish_run = _train_stage(student, work, split, terms)

        def result() -> RunResult:
            finish_run()
            write_json(folder / "warnings.json", warnings)
            build_report(folder)
            return RunResult(folder, read_json(folder / "evaluation.json", None), tuple(warnings))

        return first_alone(result, FINISHING)  # the others wait for the model, and have the result too


def _data(config: Config) -> tuple[Dataset, Split]:
    dataset = load_dataset(Path(config.dataset))
    return dataset, make_split(dataset, config.labeled, config.val)


def _prepared(split: Split, plan: Plan, cache: Path | None, stop: Callable[[], bool]) -> dict[str, PreparedCase]:
    """All cases; with several processes each prepares its share first, and finds the others in the cache."""
    if processes() > 1:
        share = slice(rank(), None, processes())
        prepare_cases(split.labelled[share], split.unlabelled[share], plan, cache)
        wait()
    with Display("prepare", 0, len(split.labelled) + len(split.unlabelled)) as display:

        def tell(done: int, _: int, name: str) -> None:
            display.update(done, note=name)
            if stop():
                raise Interrupted(
                    "stopped while preparing volumes; those that are done are kept, --resume goes on from there"
                )

        return prepare_cases(split.labelled, split.unlabelled, plan, cache, tell)


def _useless(config: Config, terms: dict[str, Term]) -> list[str]:
    """Settings of this run that change nothing."""
    found = []
    if config.foundation is not None and not any(term.foundation for term in terms.values()):
        found.append(
            f"foundation {config.foundation!r} changes nothing: no term of {config.method!r} uses a foundation model"
        )
    elif config.foundation is not None and config.foundation not in _taken(config, terms):
        found.append(f"foundation {config.foundation!r} changes nothing: every term that uses a model names its own")
    if config.batch_norm == "split" and not _needs_unlabelled(terms):
        found.append(f"batch_norm 'split' changes nothing: no term of {config.method!r} reads unlabelled rows")
    learnt_from = {getattr(term.options, "learn_from", None) for term in terms.values()}
    for name, term in terms.items():
        for option, why in term.options.idle().items():
            if option == "largest_component" and name in learnt_from:  # from its hard labels, which that cleans
                continue
            if _is_set(term.options, option):
                found.append(f"terms.{name}.{option} changes nothing {why}")
    for option, schedule in (("step", "step"), ("gamma", "step"), ("power", "poly")):
        if config.optim.schedule != schedule and _is_set(config.optim, option):
            found.append(f"optim.{option} changes nothing with optim.schedule: {config.optim.schedule}")
    if config.select == "last" and config.validate_every and not config.val:
        found.append("validate_every changes nothing: there are no validation cases, name them with --val")
    return found


def _is_set(section: Section, key: str) -> bool:
    """Whether a setting has another value than its default; a saved config has them all."""
    return bool(getattr(section, key) != type(section).model_fields[key].get_default())


def _taken(config: Config, terms: dict[str, Term]) -> set[str]:
    """Models the terms work with, and those that a config has filled in when none is named."""
    usual = {term.usual_foundation({}, labels) or "" for term in terms.values() for labels in (1, 2)}
    return usual | {name for names in foundation_models(config).values() for name in names}


def _plan(
    config: Config, dataset: Dataset, split: Split, folder: Path, sides: Sides, resumed: bool, cache: Path | None
) -> Plan:
    plan_file, split_file = folder / "plan.json", folder / "split.json"
    if resumed and plan_file.exists() and split_file.exists():
        if read_json(split_file, None) != split.to_json():
            raise RunError(
                f"the cases of {dataset.folder} are not those the run {folder} was started with ({split_file}): "
                "restore the dataset, or start a new run"
            )
        if with_places(Config.load(folder / "config.yaml")).dataset != config.dataset:  # moved, or another one
            _require_same_volumes(fingerprint(dataset, split, cache), dataset, folder)
        try:
            return Plan.model_validate_json(plan_file.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise RunError(
                f"cannot read {plan_file} ({str(error).splitlines()[0]}): restore it, or start a new run"
            ) from None
    facts = fingerprint(dataset, split, cache)
    plan = make_plan(facts, dataset, split, config, *sides)
    write_json(folder / FACTS, facts.model_dump(mode="json"))
    write_json(split_file, split.to_json())
    write_text(plan_file, plan.model_dump_json(indent=1) + "\n")
    return plan


def _require_same_volumes(facts: Fingerprint, dataset: Dataset, folder: Path) -> None:
    try:
        known = Fingerprint.model_validate(read_json(folder / FACTS, None))
    except ValueError as error:
        raise RunError(
            f"cannot read {folder / FACTS} ({str(error).splitlines()[0]}): restore it, or resume with the dataset where it was"
        ) from None
    if not alike(known, facts):
        raise RunError(
            f"the volumes of {dataset.folder} are not those the run {folder} was started with ({folder / FACTS}): "
            "restore the dataset, or start a new run"
        )


def _terms(config: Config, names: dict[str, Term], split: Split, plan: Plan, warnings: list[str]) -> dict[str, Term]:
    kept = list(names)
    if not split.unlabelled:
        kept = [name for name, term in names.items() if "unlabelled" not in term.reads]
    if len(kept) < len(names):
        warnings.append(
            f"there is no unlabelled case, so {config.method!r} has nothing to learn from beyond the labels: "
            f"training {'+'.join(kept)!r} alone"
        )
    return build_terms(
        "+".join(kept), {key: value for key, value in config.terms.items() if key in kept}, len(plan.classes)
    )


def _workspace(
    config: Config,
    folder: Path,
    split: Split,
    plan: Plan,
    cases: dict[str, PreparedCase],
    terms: dict[str, Term],
    stop: Callable[[], bool],
    cache: Path | None,
    warnings: list[str],
) -> tuple[SegmentationNetwork, Workspace]:
    rows = [config.batch_labeled]
    if split.unlabelled and _needs_unlabelled(terms):
        rows.append(config.batch_unlabeled)
    for count in rows if config.batch_norm == "split" else [sum(rows)]:
        check_rows(count)
    seed_init(config.seed)
    student = build_network(config.network.name, len(plan.channels), len(plan.classes), config.network.args)
    fabric, precision, memory_format = make_fabric(config, folder, student, plan)
    student.to(fabric.device)
    work = Workspace(
        run=folder,
        config=config,
        plan=plan,
        labelled=[cases[c.name] for c in split.labelled],
        unlabelled=[cases[c.name] for c in split.unlabelled],
        fabric=fabric,
        memory_format=memory_format,
        precision=precision,
        log=RunLog(folder, fabric.is_global_zero),
        stop=stop,
        warnings=warnings,
        cache=cache,
    )
    return student, work


def _check(terms: dict[str, Term], student: SegmentationNetwork, work: Workspace) -> None:
    for name, term in terms.items():
        if term.shares_features:
            require_halves(student, name)
        term.check(student, work)


def _train_stage(
    student: SegmentationNetwork, work: Workspace, split: Split, terms: dict[str, Term]
) -> Callable[[], None]:
    """Run the stages and the training; what it returns makes and measures the model, in the first process alone."""
    config, folder, plan, fabric = work.config, work.run, work.plan, work.fabric
    with closing(work.log):
        _ready(student, work, terms)
        sampler = patch_sampler(
            config, plan, work.labelled, work.unlabelled, config.seed, _fields(work, terms), _needs_unlabelled(terms)
        )

        def on_round(iteration: int) -> None:
            for name, term in terms.items():
                if iteration in term.rounds(config.iterations):
                    with timed_stage(folder, f"{name}-refresh"):
                        term.refresh(iteration, student, work)
            sampler.set_fields(_fields(work, terms))

        validation = Validation(config, split.val, plan, folder, work.log, fabric, work.cache, work.stop)
        task = LoopTask(
            stage="train",
            student=student,
            terms=terms,
            sampler=sampler,
            optim=config.optim,
            iterations=config.iterations,
            seed=config.seed,
            checkpoint=folder / "checkpoints" / "last.pt",
            checkpoint_every=config.checkpoint_every,
            log_every=config.log_every,
            memory_format=work.memory_format,
            split=config.batch_norm == "split",
            after_step=validation.hook(student),
            rounds=sorted({number for term in terms.values() for number in term.rounds(config.iterations)}),
            on_round=on_round,
        )
        with timed_stage(folder, "train"):
            Loop(task, fabric, work.log, work.stop).run()

    return partial(_make_model, student, work, split, terms, validation)


def _ready(student: SegmentationNetwork, work: Workspace, terms: dict[str, Term]) -> None:
    """The terms' offline stages, then what they need beside the student."""
    for name, term in terms.items():
        for stage in term.stages():
            _offline_stage(work, name, term, stage)
    for term in terms.values():
        term.initialise(student, work)
    if not any(term.rounds(work.config.iterations) for term in terms.values()):
        work.release_models()  # large ones would stay in memory to the end
    for name, term in terms.items():
        torch.manual_seed(work.seed(f"{name}-attach"))
        term.attach(student)
        term.to(work.fabric.device)


def _make_model(
    student: SegmentationNetwork, work: Workspace, split: Split, terms: dict[str, Term], validation: Validation
) -> None:
    """Make the model of the trained student and measure it."""
    config, folder = work.config, work.run
    trained = work.log.entries("train")
    work.warnings += [f"{name}: {words}" for name, term in terms.items() if (words := term.conclude(trained))]
    validation.load_best(student)
    network = student
    if config.takes_pool_statistics:
        with timed_stage(folder, "statistics"):
            network = work.as_saved(student)  # its batch norms belong to this process alone
    summary = {
        "method": config.method,
        "labelled": len(split.labelled),
        "unlabelled": len(split.unlabelled),
        "iterations": config.iterations,
        "seed": config.seed,
        "precision": work.precision,
        "augment": config.augment,
    }
    save_model(folder, network, config.network, work.plan, summary)
    with timed_stage(folder, "validate"):
        if broken := finish(folder, split, config.device, work.stop):
            work.warnings.append(
                f"the network's output is not a number everywhere for {', '.join(broken)}: look at their intensities beside "
                "those of the other volumes, or train with --precision fp32"
            )
        keep_pool(work, terms)


def _offline_stage(work: Workspace, name: str, term: Term, stage: str) -> None:
    target = work.folder(name, stage)

    def make() -> None:
        with timed_stage(work.run, target.name):
            term.prepare(stage, work)

    work.once(target, make)


def _needs_unlabelled(terms: dict[str, Term]) -> bool:
    return any("unlabelled" in term.reads for term in terms.values())


def _fields(work: Workspace, terms: dict[str, Term]) -> dict[str, dict[str, Any]]:
    """Maps of every unlabelled case, of all terms together; empty when no term has any."""
    if not any(term.field_kinds for term in terms.values()):
        return {}
    return {
        case.name: {key: values for term in terms.values() for key, values in term.fields(case.name, work).items()}
        for case in work.unlabelled
    }
