"""The state of a healing run in one file, so that an interrupted run goes on where it was.

A safetensors file: parameters, the moments of AdamW, and where the run stands. It is written as a
whole or not at all, and it is read without running anything in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from kvxform.atomic import write_atomically
from kvxform.errors import ArtifactError

_HINT = "remove it, or run without --resume"


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stands.

    Attributes:
        run: Hash of everything that decides how a run goes.
        stage: Index of the stage.
        step: Steps of that stage that are done.
        losses: Losses of its steps so far.
        tensors: Parameters and optimizer state by name.
    """

    run: str
    stage: int
    step: int
    losses: tuple[tuple[float, ...], ...]
    tensors: Mapping[str, Tensor]


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; the file that was there stays until the new one is complete."""
    place = {
        "run": checkpoint.run,
        "stage": checkpoint.stage,
        "step": checkpoint.step,
        "losses": checkpoint.losses,
    }
    tensors = {name: x.detach().cpu().contiguous() for name, x in checkpoint.tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    data = safetensors.torch.save(tensors, metadata={"kvxform": json.dumps(place)})
    write_atomically(path, data)


def load_checkpoint(path: Path, run: str) -> Checkpoint | None:
    """Return the checkpoint of `run`, or None if there is no file.

    Raises:
        ArtifactError: KVX607 if the file is that of another run, or no checkpoint.
    """
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            place = json.loads((file.metadata() or {})["kvxform"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        losses = tuple(tuple(stage) for stage in place["losses"])
        found = Checkpoint(place["run"], place["stage"], place["step"], losses, tensors)
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        rule = "a checkpoint must be a file that healing wrote"
        raise ArtifactError("KVX607", rule, where="heal", got=str(path), hint=_HINT) from error
    if found.run != run:
        rule = "a run goes on with the model, text and options it began with"
        raise ArtifactError("KVX607", rule, where="heal", got=str(path), hint=_HINT)
    return found
