"""The weight average of the student (EMA teacher): decided in one place for every term that needs one."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import nn

from scarceseg.functional.ramps import ema_alpha
from scarceseg.networks.base import WithFeatures, require_halves
from scarceseg.types import ImageBatch, Logits


class EmaTeacher(nn.Module):
    """Weight average ``w' <- a w' + (1 - a) w`` with ``a = min(1 - 1/(t+1), decay)`` (Tarvainen & Valpola 2017, eq. 2).

    Only parameters are averaged. Its batch norm works in one of two ways:

    - ``"batch"`` (default, as published by UA-MT, SSL4MIS and SFR): the teacher stays in training mode, normalises by
      its own batch and keeps its own running statistics; dropout is active.
    - ``"running"``: evaluation mode with the student's running statistics, copied after each update.

    Args:
        student: network to follow; copied, never referenced.
        decay: upper limit of a, in [0, 1).
        norm: "batch" or "running".
    """

    def __init__(self, student: nn.Module, decay: float = 0.99, norm: Literal["batch", "running"] = "batch") -> None:
        super().__init__()
        self.network = copy.deepcopy(student).requires_grad_(False)
        self.decay = decay
        self.norm = norm
        self.train()

    def train(self, mode: bool = True) -> EmaTeacher:
        """The mode follows from `norm`, whatever is asked."""
        super().train(mode)
        self.network.train(self.norm == "batch")
        return self

    @torch.no_grad()
    def forward(self, x: ImageBatch) -> Logits:
        """Logits in float32, without gradient."""
        return self.network(x).float()

    @torch.no_grad()
    def features(self, x: ImageBatch) -> tuple[Logits, list[torch.Tensor]]:
        """Logits, and what the decoder computed for them from fine to coarse, in float32 and without gradient.

        Raises:
            ConfigError: the network has no encoder and decoder.
        """
        logits, _, decoded = WithFeatures(require_halves(self.network, "the teacher"))(x)
        return logits.float(), [level.float() for level in decoded]

    @torch.no_grad()
    def update(self, student: nn.Module, iteration: int) -> None:
        """Follow the student after its update of iteration t; at t = 0 the teacher becomes the student."""
        alpha = ema_alpha(iteration, self.decay)
        torch._foreach_lerp_(list(self.network.parameters()), [p.detach() for p in student.parameters()], 1.0 - alpha)
        if self.norm == "running":
            for mine, theirs in zip(self.network.buffers(), student.buffers(), strict=True):
                mine.copy_(theirs)
