"""Training in stages: AdamW, warm-up and cosine, clipped gradients, a checkpoint now and then.

Nothing depends on anything but the seed and the number of the step, so a run that goes on from a
checkpoint ends with the same bits as one that was never interrupted (on the CPU; sums of a GPU may
come in another order every time).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvxform.healing.checkpoints import Checkpoint, save_checkpoint
from kvxform.healing.parameters import Parameters, load_tensors

WARM_UP = 0.1  # share of a stage in which steps grow to their full length
LARGEST_NORM = 1.0  # of the gradient of all parameters
REPORTS = 10  # lines of progress a stage
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")

Loss = Callable[[Mapping[str, Tensor], Tensor], Tensor]
Talk = Callable[[str], None]


@dataclass(frozen=True)
class Stage:
    """One part of a run.

    Attributes:
        name: For lines of progress.
        steps: Steps of gradient descent; 0 leaves the stage out.
        loss: From weights by name and token ids `[B, S]` to a number.
    """

    name: str
    steps: int
    loss: Loss


@dataclass(frozen=True)
class Schedule:
    """How to train.

    Attributes:
        learning_rate: Of the longest step.
        every: Steps between checkpoints.
    """

    learning_rate: float
    every: int


class Batches:
    """Windows in an order of their own for every pass over the text.

    Args:
        windows: int64 `[N, S]`.
        batch_size: Windows of a step; all of them if there are fewer.
        seed: Of the order.
    """

    def __init__(self, windows: Tensor, batch_size: int, seed: int) -> None:
        self._windows, self._seed = windows, seed
        self.size = min(batch_size, len(windows))

    def batch(self, step: int) -> Tensor:
        """Return the windows of one step, counted over all stages."""
        places = range(step * self.size, (step + 1) * self.size)
        count = len(self._windows)
        return self._windows[[self._order(place // count)[place % count] for place in places]]

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        order: list[int] = torch.randperm(len(self._windows), generator=generator).tolist()
        return order


def train(
    parameters: Parameters,
    stages: Sequence[Stage],
    batches: Batches,
    schedule: Schedule,
    *,
    run: str = "",
    start: Checkpoint | None = None,
    path: Path | None = None,
    talk: Talk | None = None,
) -> tuple[tuple[float, ...], ...]:
    """Train `parameters` in place and return the losses of every step by stage.

    Args:
        parameters: What is trained.
        stages: One after the other; each has a schedule and moments of its own.
        batches: What is trained on.
        schedule: How.
        run: Identity of the run, for checkpoints.
        start: Where to go on.
        path: Where checkpoints are written, or None.
        talk: Takes a line of progress.
    """
    losses = [list(stage) for stage in start.losses] if start else [[] for _ in stages]
    first = start.stage if start else 0
    for index in range(first, len(stages)):
        stage, before = stages[index], sum(s.steps for s in stages[:index])
        own = start if start is not None and index == first else None
        state = _Descent(parameters, schedule.learning_rate, stage.steps, own)
        for step in range(own.step if own else 0, stage.steps):
            ids = batches.batch(before + step)
            losses[index].append(state.step(stage.loss, ids))
            _report(stage, step + 1, losses[index][-1], talk)
            if path is not None and (step + 1) % schedule.every == 0:
                done = tuple(tuple(found) for found in losses)
                place = Checkpoint(run, index, step + 1, done, state.tensors())
                save_checkpoint(path, place)
    return tuple(tuple(found) for found in losses)


class _Descent:
    """The optimizer of one stage."""

    def __init__(
        self, parameters: Parameters, rate: float, steps: int, start: Checkpoint | None
    ) -> None:
        self._parameters, self._tensors = parameters, parameters.tensors
        self._adam = torch.optim.AdamW(self._tensors.values(), lr=rate, weight_decay=0.0)
        if start is not None:
            load_tensors(parameters, start.tensors)
            self._load_moments(start.tensors)
        for group in self._adam.param_groups:
            group["initial_lr"] = rate
        done = start.step if start else 0
        self._rates = torch.optim.lr_scheduler.LambdaLR(
            self._adam, lambda step: rate_factor(step, steps), last_epoch=done - 1
        )

    def step(self, loss_of: Loss, ids: Tensor) -> float:
        """Take one step and return the loss before it."""
        self._adam.zero_grad()
        with torch.enable_grad():
            loss = loss_of(self._parameters.weights(), ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._tensors.values(), LARGEST_NORM)
        self._adam.step()
        self._rates.step()
        return float(loss.detach())

    def tensors(self) -> dict[str, Tensor]:
        """Return parameters and moments by name."""
        found = dict(self._tensors)
        for name, tensor in self._tensors.items():
            moments = self._adam.state.get(tensor, {})
            found |= {f"{name}/{moment}": moments[moment] for moment in moments}
        return found

    def _load_moments(self, saved: Mapping[str, Tensor]) -> None:
        state = {
            index: {moment: saved[f"{name}/{moment}"] for moment in _MOMENTS}
            for index, name in enumerate(self._tensors)
            if f"{name}/step" in saved
        }
        groups = self._adam.state_dict()["param_groups"]
        self._adam.load_state_dict({"state": state, "param_groups": groups})


def rate_factor(step: int, steps: int) -> float:
    """Return the length of a step as a share of the longest: warm-up, then half a cosine."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    share = (step - warm) / max(1, steps - warm)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def _report(stage: Stage, step: int, loss: float, talk: Talk | None) -> None:
    if talk is not None and (step % math.ceil(stage.steps / REPORTS) == 0 or step == stage.steps):
        talk(f"heal: {stage.name} {step}/{stage.steps}, loss {loss:.4g}")
