"""Recognise RMSNorm by its values and replace it with `kvx::rms_norm`.

A candidate starts at `rsqrt` (or the like) and the first node that all of it is computed from. It is
extended over casts and the gain as long as `kvx::rms_norm` equals it on random input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.capture.heads import Axes, from_rows, num_features
from kvxform.capture.probing import Prober, Setting, is_close
from kvxform.capture.structure import (
    Stop,
    chain_back,
    literals,
    op_name,
    tensor_type,
)

aten = torch.ops.aten
_ROOTS = frozenset({"rsqrt", "sqrt", "pow", "norm", "linalg_vector_norm", "rms_norm"})
_INSIDE = frozenset(
    [
        "rsqrt",
        "sqrt",
        "pow",
        "reciprocal",
        "mean",
        "sum",
        "mul",
        "div",
        "add",
        "square",
        "to",
        "_to_copy",
        "type_as",
        "linalg_vector_norm",
        "norm",
        "clamp_min",
        "rms_norm",
    ]
)
_LONGEST = 12  # nodes of a norm
_SETTING = Setting.first(3, batch=2)


@dataclass(frozen=True)
class Norm:
    """A proven RMSNorm: `out = rms_norm(x, weight + offset, eps)`."""

    x: fx.Node
    out: fx.Node
    weight: fx.Node | None
    eps: float
    offset: float
    compute_dtype: torch.dtype | None


def raise_norms(prober: Prober) -> int:
    """Replace every RMSNorm of the graph; return how many there were."""
    count = 0
    for root in [n for n in prober.graph.nodes if n in prober.content and op_name(n) in _ROOTS]:
        norm = find_norm(prober, root)
        if norm is not None:
            _replace(prober, norm)
            count += 1
    return count


def find_norm(prober: Prober, root: fx.Node) -> Norm | None:
    """Return the longest RMSNorm around `root`, or None."""
    best = None
    for out in _forward(prober, root):
        for stop in chain_back(out, prober.content, lambda n: op_name(n) in _INSIDE):
            if root not in stop.region or len(stop.region) > _LONGEST:
                continue
            found = _explain(prober, stop, out)
            best = found or best
    return best


def _forward(prober: Prober, root: fx.Node) -> Iterator[fx.Node]:
    """Yield what may be the last node of the norm: products and casts after `root`."""
    node = root
    for _ in range(_LONGEST):
        yield node
        users = [u for u in node.users if u in prober.content]
        if len(users) != 1 or op_name(users[0]) not in _INSIDE:
            return
        node = users[0]


def _explain(prober: Prober, stop: Stop, out: fx.Node) -> Norm | None:
    """Return the norm that the region from `stop` to `out` computes, or None."""
    x_type, out_type, axes = tensor_type(stop.node), tensor_type(out), Axes.of(stop.node)
    if x_type is None or out_type is None or axes is None or x_type != out_type:
        return None
    if max(axes.batch, axes.sequence, *axes.features) not in axes.features[-1:]:
        return None  # the last axis must be a feature axis, the one that is normalised
    prober.remember(stop.region, _SETTING)
    rows = prober.random(2, 3, num_features(stop.node), dtype=x_type.dtype)
    samples = [from_rows(stop.node, rows * size) for size in (1.0, 1e-3, 30.0)]
    wants = [prober.run([out], _SETTING, {stop.node: x})[0] for x in samples]
    for norm in _hypotheses(prober, stop, out):
        gots = [apply_norm(prober, norm, x) for x in samples]
        if all(is_close(got, want) for got, want in zip(gots, wants, strict=True)):
            return norm
    return None


def _hypotheses(prober: Prober, stop: Stop, out: fx.Node) -> Iterator[Norm]:
    """Yield norms worth a trial: numbers, weights and dtypes that the region contains."""
    last = stop.node.meta["type"].shape[-1]
    weights = [n for n in prober.leaves(stop.region) if n.op == "get_attr" and _shape(n) == (last,)]
    numbers = sorted({n for _, n in literals(stop.region, float) if 0 < n < 1e-2})
    own = stop.node.meta["type"].dtype
    inner = {n.meta["type"].dtype for n in stop.region if tensor_type(n) is not None}
    dtypes = [None, *sorted(inner - {own}, key=str)]
    for dtype in dtypes:
        for eps in numbers or [float(torch.finfo(own).eps)]:
            for weight in weights or [None]:
                yield Norm(stop.node, out, weight, eps, 0.0, dtype)


def _shape(node: fx.Node) -> tuple[int | str, ...] | None:
    type_ = tensor_type(node)
    return type_.shape if type_ is not None else None


def apply_norm(prober: Prober, norm: Norm, x: Tensor) -> Tensor:
    """Return `kvx::rms_norm` of `x` as `norm` describes it."""
    weight = None if norm.weight is None else prober.weights[str(norm.weight.target)]
    return kvx.rms_norm(
        x, weight, norm.eps, weight_offset=norm.offset, compute_dtype=norm.compute_dtype
    )


def _replace(prober: Prober, norm: Norm) -> None:
    kwargs = {"weight_offset": norm.offset} if norm.offset else {}
    if norm.compute_dtype is not None:
        kwargs["compute_dtype"] = norm.compute_dtype  # type: ignore[assignment]
    with prober.graph.inserting_before(norm.out):
        node = prober.graph.call_function(kvx.RMS_NORM, (norm.x, norm.weight, norm.eps), kwargs)
    node.meta = dict(norm.out.meta)
    norm.out.replace_all_uses_with(node)
    prober.content.add(node)
