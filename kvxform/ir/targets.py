"""Which functions a graph may call, and their names in text.

This list is what makes a saved graph safe to load: a name that is not on it does not resolve, so
a graph can compute with tensors and do nothing else. Allowed are functional `aten` ops, the ops of
the `kvx` dialect, and arithmetic on run-time sizes (`py.mul` and the like).
"""

from __future__ import annotations

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
    arguments = target._schema.arguments
    if num_args > sum(not a.kwarg_only for a in arguments):
        return f"takes fewer than {num_args} positional arguments"
    rest = {a.name: a for a in arguments[num_args:]}
    for keyword in keywords:
        if keyword not in rest:
            return f"takes no argument {keyword!r} here"
    missing = [n for n, a in rest.items() if not a.has_default_value() and n not in keywords]
    return f"needs the argument {missing[0]!r}" if missing else None


def keyword_order(target: Callable[..., Any], keywords: Collection[str]) -> list[str]:
    """Return `keywords` in the order of the schema of `target`."""
    if not isinstance(target, OpOverload):
        return sorted(keywords)
    order = {a.name: i for i, a in enumerate(target._schema.arguments)}
    return sorted(keywords, key=lambda name: (order.get(name, len(order)), name))


def _op_name(op: OpOverload) -> str:
    namespace, base = op._schema.name.split("::")
    overload = op._schema.overload_name
    return f"{namespace}.{base}.{overload}" if overload else f"{namespace}.{base}"


def _is_allowed_op(op: OpOverload) -> bool:
    if op.namespace == "kvx":
        return op in kvx.DIALECT
    # Ops without a dispatcher kernel belong to TorchScript; some of those touch files (aten::save).
    has_kernel = torch._C._dispatch_has_kernel(op.name())
    is_known = op.namespace == "aten" and op._schema.name not in _FORBIDDEN and has_kernel
    return is_known and not op._schema.is_mutable
