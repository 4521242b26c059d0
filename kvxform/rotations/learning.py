"""Learns bases of K and V: least loss of the rounded program on calibration tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvxform.ir.program import Program
from kvxform.rotations.fake_quant import RoundedProgram
from kvxform.rotations.stiefel import CayleySgd

CHECKS = 4  # times that all windows are looked at on the way
Place = tuple[str, int]  # stream and owner layer, as in `fake_quant.Bases`


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to learn.

    Attributes:
        bits: Bits of K and V while learning.
        steps: Gradient steps, each on one window.
        tokens: Tokens of a window that are used.
        learning_rate: Length of the first step; the last is almost zero, cosine between.
        momentum: Of the descent.
        windows: Windows that the result is judged on.
    """

    bits: int
    steps: int
    tokens: int
    learning_rate: float
    momentum: float = 0.0
    windows: int = 4


@dataclass(frozen=True)
class Learned:
    """Bases, and what they are worth.

    Attributes:
        bases: `[Hk, D, D]`, float64, by stream and owner layer.
        start_loss: Mean cross entropy of the rounded program with the bases to start from.
        loss: The same with `bases`; never more.
    """

    bases: Mapping[Place, Tensor]
    start_loss: float
    loss: float


def learn_bases(
    program: Program, token_ids: Tensor, start: Mapping[Place, Tensor], schedule: Schedule
) -> Learned:
    """Return the best bases that were seen on the way from `start`.

    Args:
        program: Without a cache, on any device.
        token_ids: int64 `[windows, window]`, each row a sequence of its own.
        start: Orthogonal matrices `[Hk, D, D]` to start from; other streams are rounded as they
            are.
        schedule: How long and how fast.
    """
    device = next(iter(program.weights.values())).device
    windows = token_ids[:, : schedule.tokens].to(device).clone()
    rounded = RoundedProgram(program, schedule.bits)
    places = list(start)
    descent = CayleySgd([m.to(device) for m in start.values()], momentum=schedule.momentum)
    judged = windows[: schedule.windows]

    def judge() -> tuple[float, dict[Place, Tensor]]:
        bases = dict(zip(places, descent.points, strict=True))
        with torch.no_grad():
            losses = [float(rounded.loss(row[None], _single(bases))) for row in judged]
        return sum(losses) / len(losses), bases

    start_loss, best = judge()
    loss, every = start_loss, math.ceil(schedule.steps / CHECKS)
    for step in range(schedule.steps):
        row = windows[step % len(windows)][None]
        rate = schedule.learning_rate * (1 + math.cos(math.pi * step / schedule.steps)) / 2
        descent.step(_gradients(rounded, row, places, descent.points), rate)
        if (step + 1) % every == 0 or step + 1 == schedule.steps:
            found, bases = judge()
            if found < loss:
                loss, best = found, bases
    return Learned(best, start_loss, loss)


def _single(bases: Mapping[Place, Tensor]) -> dict[Place, Tensor]:
    return {place: matrices.float() for place, matrices in bases.items()}


def _gradients(
    rounded: RoundedProgram, row: Tensor, places: list[Place], points: list[Tensor]
) -> list[Tensor]:
    leaves = [point.float().requires_grad_(True) for point in points]
    with torch.enable_grad():
        loss = rounded.loss(row, dict(zip(places, leaves, strict=True)))
    return list(torch.autograd.grad(loss, leaves))
