"""Builds graphs of the dialect by hand, node by node, with types and provenance as capture leaves.

Types come from running every op on the meta device, on sizes that nothing else has; those become
the symbols of a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from kvxform.ir.program import AttentionSite, ModelInfo, Program
from kvxform.ir.types import SymType, TensorType, ValueType

aten = torch.ops.aten
BATCH, TOKENS = 11, 13  # sizes that nothing else has: they become the symbols B and S
SYMBOLS = {BATCH: "B", TOKENS: "S", BATCH * TOKENS: "B*S"}
CONTEXT = 64  # positions that a built model can take
WIDTH, VOCAB = 32, 48  # of the residual stream and of the logits


class Builder:
    """A graph that grows, with its weights.

    Args:
        dtype: Of weights.
        seed: Of weights; they are drawn in the order in which they are asked for.
    """

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.graph = fx.Graph()
        self.weights: dict[str, Tensor] = {}
        self.values: dict[fx.Node, Any] = {}
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.module = ""

    def stamp(self, node: fx.Node, value: Any, origin: str = "") -> fx.Node:
        """Give `node` its metadata; `value` is what it is on the meta device."""
        self.values[node] = value
        type_: ValueType
        if isinstance(value, int):
            type_ = SymType(SYMBOLS[value])
        else:
            type_ = TensorType(value.dtype, tuple(SYMBOLS.get(n, n) for n in value.shape))
        node.meta = {"type": type_, "module": self.module, "origin": origin, "via": ()}
        return node

    def input(self, name: str) -> fx.Node:
        """Append an input of ids or positions, int64 `[B, S]`."""
        value = torch.empty(BATCH, TOKENS, dtype=torch.int64, device="meta")
        return self.stamp(self.graph.placeholder(name), value)

    def weight(self, name: str, *shape: int, mean: float = 0.0, std: float = 0.1) -> fx.Node:
        """Return a node of weight `name`; its values are drawn the first time."""
        if name not in self.weights:
            noise = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
            self.weights[name] = (noise * std + mean).to(self.dtype)
        return self.get(name)

    def get(self, name: str) -> fx.Node:
        """Return a new node of a weight that is there."""
        node = self.graph.create_node("get_attr", name, name=name.replace(".", "_"))
        return self.stamp(node, self.weights[name].to("meta"))

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Append a call."""
        node = self.graph.call_function(target, args, kwargs)
        shown = fx.node.map_arg((args, kwargs), lambda n: self.values[n])
        return self.stamp(node, target(*shown[0], **shown[1]), f"{node.name} (programs.py:1)")

    def size(self, node: fx.Node, dim: int) -> fx.Node:
        """Append the size of an axis."""
        return self.call(aten.sym_size.int, node, dim)

    def heads(self, x: fx.Node, num_heads: int, head_dim: int) -> fx.Node:
        """Split the last axis into heads: `[B, S, H * D] -> [B, H, S, D]`."""
        shape = [self.size(x, 0), self.size(x, 1), num_heads, head_dim]
        return self.call(aten.transpose.int, self.call(aten.view.default, x, shape), 1, 2)

    def merge_heads(self, x: fx.Node, width: int) -> fx.Node:
        """Undo `heads`: `[B, H, S, D] -> [B, S, H * D]`."""
        x = self.call(aten.transpose.int, x, 1, 2)  # [B, H, S, D] -> [B, S, H, D]
        return self.call(aten.reshape.default, x, [self.size(x, 0), self.size(x, 1), width])

    def linear(self, x: fx.Node, name: str, out: int, bias: bool = False) -> fx.Node:
        """Append a linear layer whose weight is `[out, in]`."""
        w = self.weight(f"{name}.weight", out, self.values[x].shape[-1])
        b = [self.weight(f"{name}.bias", out)] if bias else []
        return self.call(aten.linear.default, x, w, *b)

    def conv1d(self, x: fx.Node, name: str, out: int) -> fx.Node:
        """Append a linear layer with bias whose weight is `[in, out]`, as GPT-2 has it."""
        width = self.values[x].shape[-1]
        flat = self.call(aten.view.default, x, [-1, width])
        b = self.weight(f"{name}.bias", out)
        w = self.weight(f"{name}.weight", width, out)
        y = self.call(aten.addmm.default, b, flat, w)
        return self.call(aten.view.default, y, [self.size(x, 0), self.size(x, 1), out])

    def finish(self, logits: fx.Node, sites: list[AttentionSite], vocab: int) -> Program:
        """Return the program that ends in `logits`."""
        self.graph.output(logits)
        dtype = str(self.dtype).removeprefix("torch.")
        info = ModelInfo("toy", "toy", vocab, dtype, CONTEXT)
        return Program(self.graph, self.weights, tuple(sites), info)
