"""Find what mixes tokens outside attention: convolutions, state-space layers, linear attention.

Every raised attention is replaced by the value of the token itself. Then a run on a part of the
tokens must give that part of a run on all of them. Where it does not, a *mixer* is at work, or a
position is counted from the start of the input. Its value is repaired, and the search goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.capture.probing import is_close
from kvxform.capture.structure import find_content, op_name, tensor_type
from kvxform.errors import CaptureError
from kvxform.ir.program import Program, RejectedSite

_LENGTH = 6
_PART = slice(2, 5)  # of the tokens
_SEQUENCE = ("S", "B*S")  # the batch is 1


def find_mixers(program: Program) -> tuple[RejectedSite, ...]:
    """Return one entry for every module in which tokens meet outside raised attention.

    Attention that was refused is not reported again.

    Raises:
        CaptureError: KVX304 if the program cannot be run on a part of its tokens.
    """
    known = [site.module for site in program.rejected]
    found: list[RejectedSite] = []
    for node, reason in _find_nodes(program):
        module = str(node.meta["module"])
        if any(_is_inside(module, other) for other in (*known, *(m.module for m in found))):
            continue
        found = [m for m in found if not _is_inside(m.module, module)]
        found.append(RejectedSite(module, reason, node.meta["origin"], kind="mixer"))
    return tuple(found)


def _is_inside(module: str, other: str) -> bool:
    """Return whether `module` is `other` or part of it."""
    return module == other or module.startswith(f"{other}.")


def _find_nodes(program: Program) -> Iterator[tuple[fx.Node, str]]:
    """Yield the nodes at which tokens meet, in graph order, and how."""
    rows = int(program.info.vocab_size)
    device = next(iter(program.weights.values())).device
    ids = ((torch.arange(_LENGTH, device=device) * 7 + 1) % min(rows, 50))[None]
    positions = torch.arange(_LENGTH, device=device)[None]
    changed = (ids + 3) % min(rows, 50)
    changed[:, _PART] = ids[:, _PART]
    whole = _Alone(program)
    whole.run(ids, positions)
    other = _Repaired(program, whole.values)
    other.run(changed, positions)
    part = _Repaired(program, whole.values, _PART)
    try:
        part.run(ids[:, _PART], positions[:, _PART])
    except (RuntimeError, IndexError) as failure:
        raise CaptureError(
            "KVX304",
            "the model must run on sequences of any length",
            where="capture",
            got=f"{str(failure).splitlines()[0][:200]} on {_PART.stop - _PART.start} tokens",
        ) from failure
    mixes = {node.name for node in other.repaired}
    for node in sorted({*other.repaired, *part.repaired}):
        name = op_name(node)
        if node.name in mixes:
            yield node, f"{name} outside attention mixes tokens"
        else:
            yield node, f"{name} depends on the length or on positions that it counts itself"


class _Alone(fx.Interpreter):
    """Runs a program in which every token attends only to itself, and keeps all values."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.to_module(), garbage_collect_values=False)
        self.source = {n.name: n for n in program.graph.nodes}
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and keep its value under its name."""
        with torch.no_grad():
            self.values[n.name] = super().run_node(n)
        return self.values[n.name]

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the value of the token itself for attention."""
        if target is not kvx.ATTENTION:
            return super().call_function(target, args, kwargs)
        q, _, v = args[:3]
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1)


class _Repaired(_Alone):
    """Compares every content value with that of another run, and goes on with the latter.

    Args:
        program: What to run.
        want: Values of the run on all tokens.
        part: Which of those tokens this run has; None if it has all, and only `_PART` is compared.
    """

    def __init__(self, program: Program, want: dict[str, Any], part: slice | None = None) -> None:
        super().__init__(program)
        self.want, self.part = want, part
        self.content = find_content(program.graph)
        self.repaired: list[fx.Node] = []

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; return the wanted value of `_PART`: not even rounding is passed on."""
        value = super().run_node(n)
        node = self.source[n.name]
        axis = _sequence_axis(node) if node in self.content else None
        if axis is None or node.op != "call_function":
            return value
        want = _slice(self.want[n.name], axis, _PART)
        got = value if self.part else _slice(value, axis, _PART)
        if not _is_same(got, want):
            self.repaired.append(node)
        if not self.part:
            fixed = value.clone()
            _slice(fixed, axis, _PART).copy_(want)
            want = fixed
        self.values[n.name] = want
        return want


def _sequence_axis(node: fx.Node) -> int | None:
    """Return the axis of the tokens if there is exactly one; `S + 1` counts as one, too."""
    type_ = tensor_type(node)
    shape: Sequence[int | str] = () if type_ is None else type_.shape
    axes = [i for i, size in enumerate(shape) if "S" in str(size)]
    return axes[0] if len(axes) == 1 and shape[axes[0]] in _SEQUENCE else None


def _is_same(got: Tensor, want: Tensor) -> bool:
    """Return whether values are close; infinities, as in the scores of routers, must be equal."""
    same = (got == want) & ~want.isfinite()
    return is_close(got.masked_fill(same, 0), want.masked_fill(same, 0))


def _slice(value: Tensor, axis: int, part: slice) -> Tensor:
    return value[(slice(None),) * axis + (part,)]
