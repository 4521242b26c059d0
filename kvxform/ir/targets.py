"""Which functions a graph may call, and their names in text.

This list is what makes a saved graph safe to load: a name that is not on it does not resolve, so
a graph can compute with tensors and do nothing else. Allowed are functional `aten` ops, the ops of
the `kvx` dialect, and arithmetic on run-time sizes (`py.mul` and the like).
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket

import kvxform.ir.ops as kvx

PYTHON_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "py.add": operator.add,
    "py.eq": operator.eq,
    "py.floordiv": operator.floordiv,
    "py.ge": operator.ge,
    "py.getitem": operator.getitem,
    "py.gt": operator.gt,
    "py.le": operator.le,
    "py.lt": operator.lt,
    "py.mod": operator.mod,
    "py.mul": operator.mul,
    "py.ne": operator.ne,
    "py.neg": operator.neg,
    "py.sub": operator.sub,
}
_PYTHON_NAMES = {function: name for name, function in PYTHON_FUNCTIONS.items()}
_FORBIDDEN = frozenset({"aten::from_file"})  # reads and writes files
_NAME = re.compile(r"^(aten|kvx)\.(\w+)(?:\.(\w+))?$", re.ASCII)


def target_name(target: object) -> str | None:
    """Return the text name of a callable, or None if a graph may not call it.

    The overload `default` is left out: `aten.relu`, `aten.add.Tensor`, `kvx.rope`, `py.mul`.
    """
    if isinstance(target, OpOverload):
        return _op_name(target) if _is_allowed_op(target) else None
    try:
        return _PYTHON_NAMES.get(target)  # type: ignore[call-overload, no-any-return]
    except TypeError:  # not hashable, so not a function of the list
        return None


@functools.cache
def resolve_target(name: str) -> Callable[..., Any] | None:
    """Return the callable with the text name `name`, or None if it is not on the list."""
    if name in PYTHON_FUNCTIONS:
        return PYTHON_FUNCTIONS[name]
    found = _NAME.match(name)
    if found is None:
        return None
    namespace, base, overload = found[1], found[2], found[3] or "default"
    packet = getattr(getattr(torch.ops, namespace), base, None)
    if not isinstance(packet, OpOverloadPacket) or overload not in packet.overloads():
        return None
    op = getattr(packet, overload)
    return op if isinstance(op, OpOverload) and _is_allowed_op(op) else None


def call_problem(
    target: Callable[..., Any], num_args: int, keywords: Collection[str]
) -> str | None:
    """Return what is wrong with the number and names of arguments of a call, or None."""
    if not isinstance(target, OpOverload):
        return "takes no keyword arguments" if keywords else None
    num_positional, is_required = _arguments(target)
    if num_args > num_positional:
        return f"takes fewer than {num_args} positional arguments"
    rest = list(is_required)[num_args:]
    for keyword in keywords:
        if keyword not in rest:
            return f"takes no argument {keyword!r} here"
    missing = [name for name in rest if is_required[name] and name not in keywords]
    return f"needs the argument {missing[0]!r}" if missing else None


def keyword_order(target: Callable[..., Any], keywords: Collection[str]) -> list[str]:
    """Return `keywords` in the order of the schema of `target`, unknown ones last."""
    known = list(_arguments(target)[1]) if isinstance(target, OpOverload) else []
    return [n for n in known if n in keywords] + sorted(n for n in keywords if n not in known)


@functools.cache
def _arguments(op: OpOverload) -> tuple[int, dict[str, bool]]:
    """Return the number of positional arguments, and which arguments by name are required."""
    arguments = op._schema.arguments
    num_positional = sum(not argument.kwarg_only for argument in arguments)
    return num_positional, {a.name: not a.has_default_value() for a in arguments}


def _op_name(op: OpOverload) -> str:
    namespace, base = op._schema.name.split("::")
    overload = op._schema.overload_name
    return f"{namespace}.{base}.{overload}" if overload else f"{namespace}.{base}"


@functools.cache
def _is_allowed_op(op: OpOverload) -> bool:
    if op.namespace == "kvx":
        return op in kvx.DIALECT
    # Ops without a dispatcher kernel belong to TorchScript; some of those touch files (aten::save).
    has_kernel = torch._C._dispatch_has_kernel(op.name())
    is_known = op.namespace == "aten" and op._schema.name not in _FORBIDDEN and has_kernel
    return is_known and not op._schema.is_mutable
