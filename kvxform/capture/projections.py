"""Which entries of which weight make the heads of q, k, v, and read the heads of o."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from kvxform.capture.heads import HeadMap, find_stride, from_rows, read_index, to_rows
from kvxform.capture.probing import Prober, Setting, is_close
from kvxform.capture.structure import TRANSPARENT, ancestors, chain_back, op_name, tensor_type
from kvxform.ir.program import Projection
from kvxform.ir.rounding import coarsest

_NORMS = frozenset({"rms_norm", "layer_norm"})
LINEAR = frozenset({"linear", "addmm", "mm", "matmul"})


@dataclass(frozen=True)
class LinearNode:
    """A call that multiplies by one constant matrix.

    Attributes:
        node: The call.
        x: Its input, last axis `in`.
        weight: Key of the matrix.
        bias: Key of the bias, or None.
        layout: `out_in` or `in_out`.
    """

    node: fx.Node
    x: fx.Node
    weight: str
    bias: str | None
    layout: Literal["out_in", "in_out"]

    def matrix(self, prober: Prober) -> Tensor:
        """Return the weight as `[out, in]`."""
        weight = prober.weights[self.weight]
        return weight if self.layout == "out_in" else weight.T

    def apply(self, prober: Prober, x: Tensor, rows: Tensor) -> Tensor:
        """Return outputs `rows` for inputs `x` `[..., in]`."""
        bias = None if self.bias is None else prober.weights[self.bias][rows]
        return torch.nn.functional.linear(x, self.matrix(prober)[rows], bias)


def read_linear(prober: Prober, node: fx.Node) -> LinearNode | None:
    """Return the linear layer that `node` is, or None."""
    name = op_name(node)
    if name not in LINEAR:
        return None
    arguments = [a for a in node.args if isinstance(a, fx.Node)]
    bias = arguments.pop(0) if name == "addmm" else None
    if name == "linear" and len(arguments) == 3:
        bias = arguments.pop()
    if len(arguments) != 2 or node.kwargs or arguments[0] not in prober.content:
        return None
    found = _find_matrix(prober, arguments[1], transposed=name != "linear")
    if found is None or (bias is not None and bias.op != "get_attr"):
        return None
    return LinearNode(
        node, arguments[0], found[0], None if bias is None else str(bias.target), found[1]
    )


def _find_matrix(
    prober: Prober, node: fx.Node, *, transposed: bool
) -> tuple[str, Literal["out_in", "in_out"]] | None:
    """Return the weight that `node` is, or is the transpose of."""
    source = next((n for n in ancestors([node]) if n.op == "get_attr"), None)
    if source is None or len(source.meta["type"].shape) != 2:
        return None
    name = str(source.target)
    if node is source:
        return name, "in_out" if transposed else "out_in"
    held, used = prober.weights[name], prober.value(node, Setting.first(1))
    shares = used.data_ptr() == held.data_ptr() and used.shape == held.T.shape
    if shares and used.stride() == held.T.stride():
        return name, "out_in" if transposed else "in_out"
    return None


def source_projection(prober: Prober, heads: HeadMap) -> Projection | None:
    """Return the projection that makes the heads, or None.

    None if the anchor is not the output of a linear layer, or heads are not evenly spaced.
    """
    stop = chain_back(heads.anchor, prober.content, lambda n: op_name(n) in TRANSPARENT)[-1]
    linear, stride = read_linear(prober, stop.node), find_stride(heads.index)
    if linear is None or stride is None:
        return None
    projection = Projection(linear.weight, linear.bias, linear.layout, stride.start, stride.step)
    return projection if _makes_heads(prober, linear, heads) else None


def why_unnamed(prober: Prober, heads: HeadMap) -> str:
    """Return why heads have no `source_projection`, if one can say, or an empty text."""
    stop = chain_back(heads.anchor, prober.content, lambda n: op_name(n) in TRANSPARENT)[-1]
    if op_name(stop.node) in _NORMS:
        return "a norm lies between the projection and the heads"
    if read_linear(prober, stop.node) is not None and find_stride(heads.index) is None:
        return "heads are not evenly spaced in the projection"
    return ""


def _makes_heads(prober: Prober, linear: LinearNode, heads: HeadMap) -> bool:
    """Compare the anchor with the rows of the weight on random input."""
    index = heads.index.flatten()
    x_type = tensor_type(linear.x)
    assert x_type is not None
    shape = [{"B": 1, "S": 3, "B*S": 3}.get(str(n), n) for n in x_type.shape]
    x = prober.random(*(int(n) for n in shape), dtype=x_type.dtype)
    (value,) = prober.run([heads.anchor], Setting.first(3), {linear.x: x})
    got = to_rows(heads.anchor, value)[0][:, index]
    want = linear.apply(prober, x.reshape(3, -1), index)
    return is_close(got, want, coarsest(got.dtype, want.dtype))


def output_projection(prober: Prober, out: fx.Node, heads: int, channels: int) -> Projection | None:
    """Return the projection that reads the attention output `[B, H, S, Dv]`, or None."""
    node = out
    while op_name(node) not in LINEAR:
        users = [u for u in node.users if u in prober.content]
        if len(users) != 1 or (node is not out and op_name(node) not in TRANSPARENT):
            return None
        node = users[0]
    linear = read_linear(prober, node)
    if linear is None:
        return None
    setting = Setting.first(3)
    dtype = out.meta["type"].dtype
    count = heads * channels

    def read(features: Tensor) -> Tensor:
        value = from_rows(out, features.to(prober.device, dtype).expand(1, 3, count))
        (seen,) = prober.run([linear.x], setting, {out: value})
        rows: Tensor = seen.reshape(3, -1)
        return rows

    places = read_index(read, count)  # of each input of the projection, [3, inputs]
    if places is None or places.shape[1] != count or bool((places != places[0]).any()):
        return None
    index = places[0].argsort()
    stride = find_stride(index.view(heads, channels))
    if stride is None or not torch.equal(places[0][index], torch.arange(count)):
        return None
    return Projection(linear.weight, linear.bias, linear.layout, stride.start, stride.step)
