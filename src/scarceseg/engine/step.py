"""One optimisation step: the student on all rows, the sum of the terms, the update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from scarceseg.methods.base import Parts, Term
from scarceseg.networks.base import WithFeatures, require_halves
from scarceseg.types import ImageBatch, Labelled, Step, Unlabelled

Called = Callable[[torch.Tensor], Any]
"""A student as `as_called` gives it: logits, or logits with the features of both halves."""


def as_called(student: nn.Module, terms: Mapping[str, Term]) -> nn.Module:
    """The student, or one that also hands out its features where a term shares them.

    Raises:
        ConfigError: a term shares features and the network has no encoder and decoder.
    """
    asking = [name for name, term in terms.items() if term.shares_features]
    return WithFeatures(require_halves(student, asking[0])) if asking else student


def forward_step(
    model: Called,
    terms: Mapping[str, Term],
    labelled: Labelled,
    unlabelled: Unlabelled | None,
    iteration: int,
    total: int,
    generator: torch.Generator,
    split: bool = False,
) -> Step:
    """Run the student once on all rows (labelled, unlabelled, the terms' own) and hand out its output.

    Args:
        split: run it on each kind of rows by itself, so that batch norm takes the statistics of each kind. In a common batch
            the supervised loss has a gradient through the statistics to what the network makes of the unlabelled rows,
            and can set these apart from the labelled ones.
    """
    parts: dict[str, ImageBatch] = {"labelled": labelled.image}
    if unlabelled is not None and any(_predicts_unlabelled(term) for term in terms.values()):
        parts["unlabelled"] = unlabelled.image
    for name, term in terms.items():
        extra = term.extra_inputs(labelled, unlabelled, generator)
        if extra is not None:
            parts[f"extra/{name}"] = extra
    images = list(parts.values())
    groups = images if split or len(images) == 1 else [torch.cat(images)]
    output = _joined([model(x) for x in groups])
    logits, *halves = output if isinstance(output, tuple) else (output,)

    def by_part(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        names = [key.removeprefix("extra/") for key in parts]
        return dict(zip(names, rows.split([len(x) for x in images]), strict=True))

    def by_level(levels: list[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
        levels_of = [by_part(level) for level in levels]
        return {name: [level[name] for level in levels_of] for name in levels_of[0]}

    logits_of = by_part(logits.float())
    encoded, decoded = (by_level(half) for half in halves) if halves else ({}, {})
    return Step(
        iteration=iteration,
        total=total,
        labelled=labelled,
        unlabelled=unlabelled,
        logits_l=logits_of.pop("labelled"),
        logits_u=logits_of.pop("unlabelled", None),
        generator=generator,
        extra=logits_of,
        encoded=encoded,
        decoded=decoded,
    )


def _joined(outputs: Sequence[Any]) -> Any:
    """Outputs of the same structure (tensors, lists and tuples of them), their rows one after the other."""
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(list(outputs)) if len(outputs) > 1 else first
    return type(first)(_joined(parts) for parts in zip(*outputs, strict=True))


def _predicts_unlabelled(term: Term) -> bool:
    return term.predicts_unlabelled and "unlabelled" in term.reads


def train_step(
    model: Called,
    student: nn.Module,
    terms: Mapping[str, Term],
    optimizer: torch.optim.Optimizer,
    batch: tuple[Labelled, Unlabelled | None],
    iteration: int,
    total: int,
    generator: torch.Generator,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
    clip_norm: float | None = None,
    after_backward: Callable[[], None] | None = None,
    split: bool = False,
) -> dict[str, torch.Tensor]:
    """One optimisation step: forward, sum of terms, backward, update, EMA.

    Args:
        model: the student as it is called (wrapped for precision or several processes).
        student: the same network, bare.
        clip_norm: largest norm of the gradient; None does not clip.
        after_backward: called when the gradients are there.
        split: see `forward_step`.

    Returns:
        Detached scalars: ``loss`` and ``loss/<term>`` (raw), ``weight/<term>``, and ``own/<term>`` for what a term adds
        outside its weight.
    """
    with autocast():
        step = forward_step(model, terms, *batch, iteration, total, generator, split)
        losses = {name: term.loss(step) for name, term in terms.items()}
    own = {name: loss.fixed for name, loss in losses.items() if isinstance(loss, Parts)}
    raw = {name: loss.ramped if isinstance(loss, Parts) else loss for name, loss in losses.items()}
    weights = {name: term.weight(iteration, total) for name, term in terms.items()}
    loss = torch.stack([*(weights[name] * raw[name] for name in terms), *own.values()]).sum()
    backward(loss)
    if after_backward is not None:
        after_backward()
    if clip_norm is not None:
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for term in terms.values():
            term.after_update(student, iteration)
    report = {"loss": loss.detach()}
    for name in terms:
        report[f"loss/{name}"] = raw[name].detach()
        report[f"weight/{name}"] = torch.tensor(weights[name])
    return report | {f"own/{name}": value.detach() for name, value in own.items()}


def place(
    batch: tuple[Labelled, Unlabelled | None], device: torch.device, memory_format: str
) -> tuple[Labelled, Unlabelled | None]:
    """Move a batch to the device, in the network's memory format."""

    def image(x: torch.Tensor) -> torch.Tensor:
        x = x.to(device, non_blocking=True)
        return x.contiguous(memory_format=torch.channels_last_3d) if memory_format == "channels_last_3d" else x

    def fields(maps: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: value.to(device, non_blocking=True) for key, value in maps.items()}

    labelled, unlabelled = batch
    labelled = replace(
        labelled, image=image(labelled.image), label=labelled.label.to(device), fields=fields(labelled.fields)
    )
    if unlabelled is not None:
        unlabelled = replace(unlabelled, image=image(unlabelled.image), fields=fields(unlabelled.fields))
    return labelled, unlabelled
