"""Recognise RMSNorm by its values and replace it with `kvx::rms_norm`.

A candidate starts at a root and at a node that all of it is computed from. It is extended over
casts and the gain as long as `kvx::rms_norm` equals it on random input.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.capture.heads import Axes, from_rows, num_features
from kvxform.capture.probing import Prober, Setting, is_close
from kvxform.capture.structure import (
    Stop,
    ancestors,
    chain_back,
    literals,
    op_name,
    tensor_type,
)

_ROOTS = frozenset({"rsqrt", "sqrt", "pow", "norm", "linalg_vector_norm", "rms_norm"})
_INSIDE = _ROOTS | frozenset(
    {
        *("mean", "sum", "square", "mul", "div", "add", "reciprocal", "clamp_min"),
        *("to", "_to_copy", "type_as"),
    }
)
LONGEST = 12  # nodes of a norm
LARGEST_EPS = 1e-2
_SETTING = Setting.first(3, batch=2)
_SIZES = (1.0, 1e-3, 30.0)  # of the inputs; the small one makes eps count


@dataclass(frozen=True)
class Norm:
    """A proven RMSNorm: `out = rms_norm(x, weight + offset, eps)`."""

    x: fx.Node
    out: fx.Node
    weight: fx.Node | None
    eps: float
    offset: float
    compute_dtype: torch.dtype | None
    region: tuple[fx.Node, ...]


def raise_norms(prober: Prober) -> int:
    """Replace every RMSNorm of the graph; return how many there were."""
    return raise_each(prober, _ROOTS, find_norm, _replace)


def find_norm(prober: Prober, root: fx.Node) -> Norm | None:
    """Return the longest RMSNorm around `root`, or None."""
    return find_longest(prober, root, _INSIDE, _explain)


class Found(Protocol):
    """A proven norm."""

    @property
    def region(self) -> tuple[fx.Node, ...]:
        """The nodes that compute it."""


F = TypeVar("F", bound=Found)


def raise_each(
    prober: Prober,
    roots: Container[str],
    find: Callable[[Prober, fx.Node], F | None],
    replace: Callable[[Prober, F], None],
) -> int:
    """Replace what `find` returns for every node called one of `roots`; return how many.

    A root inside the region of a norm that was found before is passed over.
    """
    count, done = 0, set[fx.Node]()
    for root in [n for n in prober.graph.nodes if n in prober.content and op_name(n) in roots]:
        norm = None if root in done else find(prober, root)
        if norm is not None:
            replace(prober, norm)
            done.update(norm.region)
            count += 1
    return count


def find_longest(
    prober: Prober,
    root: fx.Node,
    inside: Container[str],
    explain: Callable[[Prober, Stop, fx.Node], F | None],
) -> F | None:
    """Return the longest region of ops `inside` around `root` that `explain` knows, or None."""
    best = None
    for out in forward_chain(prober, root, inside):
        for stop in chain_back(out, prober.content, lambda n: op_name(n) in inside):
            if root in stop.region and len(stop.region) <= LONGEST:
                best = explain(prober, stop, out) or best
    return best


def forward_chain(prober: Prober, root: fx.Node, inside: Container[str]) -> Iterator[fx.Node]:
    """Yield what may be the last node of a norm: products and casts after `root`."""
    node = root
    for _ in range(LONGEST):
        yield node
        users = [u for u in node.users if u in prober.content]
        if len(users) != 1 or op_name(users[0]) not in inside:
            return
        node = users[0]


def _explain(prober: Prober, stop: Stop, out: fx.Node) -> Norm | None:
    """Return the norm that the region from `stop` to `out` computes, or None."""
    axes = Axes.of(stop.node)
    if axes is None or tensor_type(stop.node) != tensor_type(out) or not axes.is_last_feature():
        return None
    prober.remember(stop.region, _SETTING)
    dtype = stop.node.meta["type"].dtype
    rows = prober.random(2, 3, num_features(stop.node), dtype=dtype)
    samples = [from_rows(stop.node, rows * size) for size in _SIZES]
    wants = [prober.run([out], _SETTING, {stop.node: x})[0] for x in samples]
    for norm in _hypotheses(prober, stop, out):
        gots = (apply_norm(prober, norm, x) for x in samples)
        if all(is_close(got, want) for got, want in zip(gots, wants, strict=True)):
            return norm
    return None


def _hypotheses(prober: Prober, stop: Stop, out: fx.Node) -> Iterator[Norm]:
    """Yield norms worth a trial: numbers, weights and dtypes that the region contains."""
    own = stop.node.meta["type"].dtype
    inner = {n.meta["type"].dtype for n in stop.region if tensor_type(n) is not None}
    found = sorted({n for _, n in literals(stop.region, float) if 0 < n < LARGEST_EPS})
    gains = list(_gains(prober, stop))
    # Wide statistics first: of small values, narrow ones look the same, and overflow on large ones.
    for dtype in (*sorted(inner - {own}, key=str), None):
        for eps in found or [float(torch.finfo(own).eps)]:
            for weight, offset in gains or [(None, 0.0)]:
                yield Norm(stop.node, out, weight, eps, offset, dtype, stop.region)


def _gains(prober: Prober, stop: Stop) -> Iterator[tuple[fx.Node | None, float]]:
    """Yield weights of the region that fit the last axis, and what is added to them."""
    last = stop.node.meta["type"].shape[-1]
    for leaf in prober.leaves(stop.region):
        type_ = tensor_type(leaf)
        if type_ is None or type_.shape != (last,):
            continue
        gain = prober.value(leaf, _SETTING)
        for node in ancestors([leaf]):
            if node.op == "get_attr" and tensor_type(node) == type_:
                offset = (gain - prober.weights[str(node.target)]).double()
                yield node, round(float(offset.mean()), 6)


def apply_norm(prober: Prober, norm: Norm, x: Tensor) -> Tensor:
    """Return `kvx::rms_norm` of `x` as `norm` describes it."""
    weight = None if norm.weight is None else prober.weights[str(norm.weight.target)]
    return kvx.rms_norm(
        x, weight, norm.eps, weight_offset=norm.offset, compute_dtype=norm.compute_dtype
    )


def _replace(prober: Prober, norm: Norm) -> None:
    options: dict[str, fx.node.Argument] = {}
    if norm.offset:
        options["weight_offset"] = norm.offset
    if norm.compute_dtype is not None:
        options["compute_dtype"] = norm.compute_dtype
    with prober.graph.inserting_before(norm.out):
        node = prober.graph.call_function(kvx.RMS_NORM, (norm.x, norm.weight, norm.eps), options)
    node.meta = dict(norm.out.meta)
    norm.out.replace_all_uses_with(node)
    prober.content.add(node)
