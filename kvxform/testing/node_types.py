"""Types of nodes, computed by running a graph on shapes, beside those that it states."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from kvxform.ir.program import Program
from kvxform.ir.types import SymType, TensorType, TupleType, ValueType
from kvxform.testing.builder import BATCH, TOKENS

_SIZES = {sympy.Symbol("B"): BATCH, sympy.Symbol("S"): TOKENS}
_NAMES = {"B": sympy.Symbol("B"), "S": sympy.Symbol("S")}  # S alone means something to sympy


def wrong_types(program: Program) -> Iterator[str]:
    """Run a program on shapes; yield a sentence for each node that is not what its type says."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        weights = {name: mode.from_tensor(w.to("meta")) for name, w in program.weights.items()}
        runner = _Typed(program, weights)
        ids = torch.zeros(BATCH, TOKENS, dtype=torch.int64)
        handle = [torch.tensor(0)] if program.is_cached else []
        runner.run(ids, ids, *handle)
    yield from runner.complaints


class _Typed(fx.Interpreter):
    """Runs a graph and compares every value with the type of its node."""

    def __init__(self, program: Program, weights: Mapping[str, Tensor]) -> None:
        super().__init__(torch.nn.Module(), graph=program.graph)
        self._weights = weights
        self.complaints: list[str] = []

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Tensor:
        return self._weights[target]

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "output" and not _fits(value, n.meta["type"]):
            found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else value
            at = f"for B = {BATCH} and S = {TOKENS}"
            self.complaints.append(f"{n.name} says {n.meta['type']}, and is {found} {at}")
        return value


def _fits(value: Any, type_: ValueType) -> bool:
    if isinstance(type_, TupleType):
        return all(_fits(v, t) for v, t in zip(value, type_.items, strict=True))
    if isinstance(type_, SymType):
        return int(value) == _size(type_.expression)
    assert isinstance(type_, TensorType), "there are three kinds of types"
    return value.dtype == type_.dtype and tuple(value.shape) == tuple(map(_size, type_.shape))


@functools.cache
def _size(size: int | str) -> int:
    return int(sympy.sympify(size, locals=_NAMES).subs(_SIZES))
