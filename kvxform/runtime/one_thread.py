"""What is done to logits beside ONNX Runtime on the CPU, by the thread that asks for it.

After each larger operation the threads of torch wait actively for the next one, for milliseconds,
on the cores that ONNX Runtime needs. numpy has no such threads, so nothing is said to torch about
its own, which belong to the caller.
"""

from __future__ import annotations

import torch
from torch import Tensor


def copy_alone(source: Tensor, target: Tensor) -> None:
    """Copy one tensor into another of the same shape and dtype; the last axis of both is dense."""
    if source.device.type != "cpu":
        target.copy_(source)
        return
    new, old = (x.detach().view(torch.uint8).numpy() for x in (source, target))
    old[...] = new


def largest(x: Tensor) -> Tensor:
    """Return where the largest value of the last axis is, the first one of equal ones."""
    if x.device.type != "cpu" or x.dtype == torch.bfloat16:  # unknown to numpy
        return x.argmax(-1)
    return torch.from_numpy(x.detach().numpy().argmax(-1))
