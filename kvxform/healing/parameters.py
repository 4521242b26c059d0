"""What is trained: the touched weights of a program, in full or by low-rank additions (LoRA).

Names that share one tensor are trained as one as long as all of them are touched; a touched name
whose tensor is read elsewhere under a name that nobody touched gets a tensor of its own. A weight
that several nodes read is one parameter with the sum of their gradients.

Source: LoRA, arXiv 2106.09685, section 4.1: W + B A with B zero at the start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvxform.ir.artifact import weight_table
from kvxform.ir.program import Program

FACTORS = ("lora_a", "lora_b")


@dataclass(frozen=True)
class _Group:
    """One tensor, the names it has, and its parameters: itself, or the factors A and B."""

    names: tuple[str, ...]
    start: Tensor
    parameters: tuple[Tensor, ...]

    @property
    def current(self) -> Tensor:
        """The value now, in the dtype of the program."""
        if len(self.parameters) == 1:
            return self.parameters[0].to(self.start.dtype)
        a, b = self.parameters
        return (self.start.to(a.dtype) + b @ a).to(self.start.dtype)


class Parameters:
    """The trained weights of one program.

    Args:
        program: On the device to train on.
        rank: Rank of the additions to matrices, or None to train them in full. Vectors are always
            trained in full.
        seed: Of the first factors.
    """

    def __init__(self, program: Program, rank: int | None, seed: int) -> None:
        self._fixed = dict(program.weights)
        generator = torch.Generator().manual_seed(seed)
        table = weight_table({name: program.weights[name] for name in trainable(program)})
        names: dict[str, list[str]] = {}
        for name, entry in table.items():
            names.setdefault(entry.stored, []).append(name)
        self._groups = [
            _make_group(tuple(own), program.weights[stored], rank, generator)
            for stored, own in names.items()
        ]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What an optimizer changes, by name."""
        found = {}
        for group in self._groups:
            name = group.names[0]
            if len(group.parameters) == 1:
                found[name] = group.parameters[0]
            else:
                found |= {
                    f"{name}:{factor}": x
                    for factor, x in zip(FACTORS, group.parameters, strict=True)
                }
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the weights that are trained."""
        return tuple(sorted(name for group in self._groups for name in group.names))

    @property
    def count(self) -> int:
        """Numbers that are trained."""
        return sum(x.numel() for x in self.tensors.values())

    def weights(self) -> dict[str, Tensor]:
        """Return all weights of the program; those that are trained carry gradients."""
        trained = {
            name: value
            for group, value in ((g, g.current) for g in self._groups)
            for name in group.names
        }
        return {**self._fixed, **trained}

    def merged(self) -> dict[str, Tensor]:
        """Return all weights as an artifact holds them: plain tensors, additions merged."""
        return {
            name: weight.detach() if weight.requires_grad else weight
            for name, weight in self.weights().items()
        }


def trainable(program: Program) -> list[str]:
    """Return the touched weights that gradients can reach, sorted.

    Bases of cached streams are no such weights, since codecs rely on what they are, and neither are
    the frequencies of RoPE or the slopes of ALiBi.
    """
    fixed = {site.alibi_slopes for site in program.sites}
    fixed |= {site.rope.inv_freq for site in program.sites if site.rope is not None}
    for site in program.sites:
        for basis in (site.k_basis, site.v_basis):
            fixed |= {basis.weight, basis.inverse}
    read = {node.target for node in program.graph.nodes if node.op == "get_attr"}
    return sorted(
        name
        for name in program.touched
        if name in read - fixed and program.weights[name].is_floating_point()
    )


def load_tensors(parameters: Parameters, saved: Mapping[str, Tensor]) -> None:
    """Let parameters, in place, take the values of a checkpoint."""
    with torch.no_grad():
        for name, tensor in parameters.tensors.items():
            tensor.copy_(saved[name])


def _make_group(
    names: tuple[str, ...], weight: Tensor, rank: int | None, generator: torch.Generator
) -> _Group:
    wide = torch.promote_types(weight.dtype, torch.float32)
    if rank is None or weight.ndim != 2 or rank >= min(weight.shape):
        return _Group(names, weight, (weight.to(wide, copy=True).requires_grad_(),))
    out, into = weight.shape
    noise = torch.randn(rank, into, generator=generator, dtype=torch.float64)
    a = (noise / math.sqrt(into)).to(weight.device, wide)
    b = torch.zeros(out, rank, dtype=wide, device=weight.device)
    return _Group(names, weight, (a.requires_grad_(), b.requires_grad_()))
