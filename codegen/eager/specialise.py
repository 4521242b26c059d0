"""From a Program to a graph of direct torch calls: the same values with less work a step.

Dialect ops become plain functions, without the dispatcher of torch. Cosine and sine of RoPE are
computed once a step for all layers, Hadamard matrices once for all steps, and the cache itself
takes the place of its handle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.codecs.hadamard import hadamard_matrix
from kvxform.ir.cache import CacheState
from kvxform.ir.program import Program
from kvxform.ir.scoring import Scoring
from kvxform.ir.types import TensorType

SHORT_DTYPES = (torch.float16, torch.bfloat16)
WIDE_DTYPES = (torch.float32, torch.float64)  # 16-bit ops keep the widening of the reference


def specialise(
    program: Program, *, fuse_norms: bool = False, keep_handle: bool = False
) -> fx.GraphModule:
    """Return a module `(input_ids, position_ids[, cache, ...]) -> logits` with direct calls.

    Args:
        program: A clone that nobody else uses; its graph is rewritten.
        fuse_norms: Let RMSNorm in 16 bits be one operation too. It multiplies by the gain before
            it rounds, the reference after.
        keep_handle: Leave the cached ops as they are, with a handle: opaque to `torch.compile`.
    """
    _Specialiser(program, fuse_norms, keep_handle).run()
    program.graph.lint()
    return fx.GraphModule(program.weights, program.graph, "EagerProgram")


class _Specialiser:
    def __init__(self, program: Program, fuse_norms: bool, keep_handle: bool) -> None:
        self._program, self._graph, self._fuse_norms = program, program.graph, fuse_norms
        self._tables: dict[tuple[object, ...], fx.Node] = {}
        self._rewrites: dict[object, Callable[[fx.Node], fx.Node | None]] = {
            kvx.ROPE: self._rope,
            kvx.RMS_NORM: self._rms_norm,
            kvx.HADAMARD: self._hadamard,
            kvx.ROTATE: lambda node: self._same(node, kvx.rotate),
            kvx.ATTENTION: lambda node: self._same(node, kvx.attention),
            kvx.CACHE_APPEND: lambda node: self._same(node, append),
            kvx.CACHED_ATTENTION: self._cached_attention,
            torch.ops.aten.matmul.default: self._matmul,
        }
        if keep_handle:
            del self._rewrites[kvx.CACHE_APPEND], self._rewrites[kvx.CACHED_ATTENTION]

    def run(self) -> None:
        """Replace every dialect op."""
        for node in list(self._graph.nodes):
            rewrite = self._rewrites.get(node.target)
            new = None if rewrite is None else rewrite(node)
            if new is not None:
                new.meta = dict(node.meta)
                node.replace_all_uses_with(new)
                self._graph.erase_node(node)
        for node in reversed(list(self._graph.nodes)):
            if node.op == "get_attr" and not node.users:
                self._graph.erase_node(node)
        self._flatten_weights()

    def _call(
        self, node: fx.Node, function: Callable[..., Any], args: tuple[Any, ...], **kwargs: Any
    ) -> fx.Node:
        with self._graph.inserting_before(node):
            return self._graph.call_function(function, args, kwargs)

    def _same(self, node: fx.Node, function: Callable[..., Any]) -> fx.Node:
        return self._call(node, function, node.args, **node.kwargs)

    def _cached_attention(self, node: fx.Node) -> fx.Node:
        kwargs = {name: value for name, value in node.kwargs.items() if name != "v_head_dim"}
        return self._call(node, attend, node.args, **kwargs)

    def _matmul(self, node: fx.Node) -> fx.Node | None:
        stack = node.args[1]
        is_stack = isinstance(stack, fx.Node) and stack.op == "get_attr"
        if not is_stack or len(stack.meta["type"].shape) != 3:  # type: ignore[union-attr]
            return None
        return self._call(node, multiply_heads, node.args)

    def _rms_norm(self, node: fx.Node) -> fx.Node:
        x, weight, eps = node.args
        dtype = _dtype(node)
        computed = node.kwargs.get("compute_dtype") or dtype
        is_same = computed == dtype and dtype in WIDE_DTYPES
        is_wider = dtype in SHORT_DTYPES and computed is torch.float32  # as torch widens by itself
        if (is_same or (is_wider and self._fuse_norms)) and not node.kwargs.get("weight_offset"):
            return self._call(node, fused_rms_norm, (x, weight, eps))
        return self._same(node, kvx.rms_norm)

    def _hadamard(self, node: fx.Node) -> fx.Node:
        dtype, block = _dtype(node), node.kwargs["block"]
        assert isinstance(block, int), "block is a number in the schema"
        if dtype not in WIDE_DTYPES:
            return self._same(node, kvx.hadamard)
        name = f"hadamard_{block}_{str(dtype).removeprefix('torch.')}"
        if name not in self._program.weights:
            device = next(iter(self._program.weights.values())).device
            self._program.weights[name] = hadamard_matrix(block).to(device, dtype)
        with self._graph.inserting_before(node):
            matrix = self._graph.create_node("get_attr", name)
        return self._call(node, rotate_blocks, (node.args[0], matrix, node.kwargs.get("signs")))

    def _rope(self, node: fx.Node) -> fx.Node:
        x, positions, inv_freq = node.args
        options = dict(node.kwargs)
        if options.get("interleaved") or not isinstance(inv_freq, fx.Node):
            return self._same(node, kvx.rope)
        scaling, dtype = options.get("attention_scaling", 1.0), _dtype(node)
        key = (positions, inv_freq.op, inv_freq.target, scaling, dtype)
        if key not in self._tables:
            self._tables[key] = self._call(
                node, rope_table, (positions, inv_freq), scaling=scaling, dtype=dtype
            )
        return self._call(node, rotate_halves, (x, self._tables[key]))

    def _flatten_weights(self) -> None:
        """Give weights short names, for every dot in a name costs a lookup in every step."""
        names: dict[str, str] = {}
        for node in self._graph.nodes:
            if node.op == "get_attr":
                names.setdefault(str(node.target), f"w{len(names)}")
                node.target = names[str(node.target)]
        weights = self._program.weights
        self._program.weights = {short: weights[name] for name, short in names.items()}


def _dtype(node: fx.Node) -> torch.dtype | None:
    kind = node.meta.get("type")
    return kind.dtype if isinstance(kind, TensorType) else None


def fused_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`kvx::rms_norm` where statistics need no wider dtype."""
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


def rope_table(
    positions: Tensor, inv_freq: Tensor, *, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return cosine and signed sine of all angles, each `[B, 1, S, rotary_dim]`."""
    angles = positions[:, None, :, None].to(inv_freq.dtype) * inv_freq
    cos, sin = (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate_halves(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """`kvx::rope` of pairs (i, i + rotary_dim / 2), with the table given."""
    cos, sin = table
    rotary_dim = cos.shape[-1]
    if rotary_dim == x.shape[-1]:
        return torch.addcmul(x * cos, x.roll(rotary_dim // 2, -1), sin)
    turned = rotate_halves(x[..., :rotary_dim], table)
    return torch.cat([turned, x[..., rotary_dim:]], -1)


def rotate_blocks(x: Tensor, matrix: Tensor, signs: Tensor | None) -> Tensor:
    """`kvx::hadamard` with the matrix of one block given."""
    if signs is not None:
        x = x * signs.to(x)
    if matrix.shape[0] == x.shape[-1]:
        return x @ matrix
    rotated: Tensor = x.unflatten(-1, (-1, matrix.shape[0])) @ matrix
    return rotated.flatten(-2)


def multiply_heads(x: Tensor, stack: Tensor) -> Tensor:
    """`x @ stack` of x `[B, H, S, n]` and one matrix a head `[H, n, m]`.

    The plain product would copy all matrices for every sequence.
    """
    batch = x.shape[0]
    if batch == 1 or x.dim() != 4:
        return x @ stack
    rows = x.transpose(0, 1).flatten(1, 2) @ stack  # [H, B * S, m]
    product: Tensor = rows.unflatten(1, (batch, -1)).transpose(0, 1)
    return product


def append(k: Tensor, v: Tensor | None, cache: CacheState, *, layer: int) -> CacheState:
    """`kvx::cache_append` on the cache itself."""
    cache.append(layer, k, v)
    return cache


def attend(
    q: Tensor, cache: CacheState, positions: Tensor, *, layer: int, **options: Any
) -> Tensor:
    """`kvx::cached_attention` on the cache itself; `options` are those of `Scoring`."""
    return cache.attend(layer, q, positions, Scoring(**options))
