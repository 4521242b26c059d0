"""A program run node by node: each weight looked up when it is used, each value freed after.

Between two layers the run can be held: `walk` yields what a layer left in the residual stream and
goes on when it is asked. Two programs are compared layer by layer that way, and of neither more
than a layer is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.codegen.eager.cache import PagedCache
from kvxform.codegen.eager.checkpoint import CheckpointExecutable
from kvxform.codegen.eager.step import Step
from kvxform.diffing.quick_ops import QuickOps
from kvxform.diffing.streaming import FileWeights
from kvxform.ir.cache import CacheState, make_handle
from kvxform.ir.execution import CacheSizes, Executable, LiveCache, StepInputs
from kvxform.ir.plan import CachePlan
from kvxform.ir.program import Program
from kvxform.ir.types import TensorType
from kvxform.runtime.session import Session

CPU = torch.device("cpu")
Operands = dict[int, tuple[Tensor, Tensor]]  # K and V `[B, Hk, S, D]` by layer


@dataclass(frozen=True)
class Stop:
    """A value that a run is held at.

    Attributes:
        layer: Layer that left it in the residual stream, or None for the logits.
        value: `[B, S, width]`, or logits `[B, S, vocab]`.
    """

    layer: int | None
    value: Tensor


def walk(
    program: Program,
    input_ids: Tensor,
    positions: Tensor,
    cache: CacheState | None = None,
    *,
    operands: Operands | None = None,
) -> Iterator[Stop]:
    """Run a program and yield what each layer leaves, and at last the logits.

    Args:
        program: What to run; its weights are looked up one by one.
        input_ids: int64 `[B, S]`.
        positions: int64 `[B, S]`.
        cache: The cache of a cached program, inside a step.
        operands: Takes K and V of each attention that has no cache, un-rotated, by layer.
    """
    inputs = {"input_ids": input_ids, "position_ids": positions}
    if cache is not None:
        inputs["cache"] = make_handle(cache)
    ends, dead = layer_ends(program), _last_uses(program.graph)
    values: dict[fx.Node, Any] = {}
    ops = QuickOps()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = inputs[str(node.target)]
        elif node.op == "call_function":
            values[node] = _compute(program, node, values, operands, ops)
            if node in ends:
                yield Stop(ends[node], values[node])
        elif node.op == "output":
            found = node.args[0]
            yield Stop(None, values[found[0] if isinstance(found, tuple | list) else found])
        for gone in dead.get(node, ()):
            values.pop(gone, None)


@torch.inference_mode()
def _compute(
    program: Program,
    node: fx.Node,
    values: dict[fx.Node, Any],
    operands: Operands | None,
    ops: QuickOps,
) -> Any:
    """Return the value of one operation; its weights are gone when it is done."""
    weights = program.weights
    if node.target is torch.ops.aten.embedding.default and isinstance(weights, FileWeights):
        table, *nodes = node.all_input_nodes
        if table.op == "get_attr" and len(nodes) == 1:
            return weights.rows(str(table.target), values[nodes[0]])

    def value(node: fx.Node) -> Any:
        return weights[str(node.target)] if node.op == "get_attr" else values[node]

    args: Any = fx.node.map_arg(node.args, value)
    kwargs: Any = fx.node.map_arg(node.kwargs, value)
    if node.target is kvx.ATTENTION and operands is not None:
        site = program.site(kwargs["layer"])
        operands[site.layer] = (
            site.k_basis.unrotate(args[1], weights),
            site.v_basis.unrotate(args[2], weights),
        )
    return ops.find(node.target)(*args, **kwargs)


def layer_ends(program: Program) -> dict[fx.Node, int]:
    """Return the nodes that alone carry tokens from one layer to the next, with the layer before.

    Such a node is the only value of all tokens `[B, S, width]` that is still needed once it is
    there. Of several between two attentions the last one is taken; after the last attention, the
    last one that is as wide as the others and no norm.
    """
    ends: dict[int, fx.Node] = {}
    layer: int | None = None
    last, waiting = _last_readers(program.graph), set()
    for node in program.graph.nodes:
        if node.target in kvx.ATTENTION_OPS:
            layer = node.kwargs["layer"]
        if _carries_tokens(node):
            waiting.add(node)
        waiting = {other for other in waiting if last.get(other) is not node}
        is_alone = waiting == {node} and node.op == "call_function"
        if is_alone and layer is not None and not _ends_run(node, ends.get(layer)):
            ends[layer] = node
    return {node: layer for layer, node in ends.items()}


def _carries_tokens(node: fx.Node) -> bool:
    """Whether a node is a value of every token and channel that comes from the tokens."""
    kind = node.meta.get("type")
    if not isinstance(kind, TensorType) or len(kind.shape) != 3 or node.op != "call_function":
        return False
    return kind.dtype.is_floating_point and kind.shape[0] == "B" and kind.shape[1] == "S"


def _ends_run(node: fx.Node, before: fx.Node | None) -> bool:
    """Whether a node after the residual stream of the last layer is part of the head."""
    if before is None:
        return False
    is_norm = node.target in (kvx.RMS_NORM, torch.ops.aten.layer_norm.default)
    return is_norm or node.meta["type"].shape != before.meta["type"].shape


def _last_readers(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for source in node.all_input_nodes:
            last[source] = node
    return last


def _last_uses(graph: fx.Graph) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """Return which values nothing reads after each node."""
    dead: dict[fx.Node, tuple[fx.Node, ...]] = {}
    last = _last_readers(graph)
    for node in graph.nodes:
        reader = last.get(node, node)
        dead[reader] = (*dead.get(reader, ()), node)
    return dead


class WalkingExecutable:
    """A cached program that runs node by node; see `kvxform.ir.execution.Executable`."""

    device = CPU

    def __init__(self, program: Program) -> None:
        self.program = program

    def new_cache(self, sizes: CacheSizes) -> PagedCache:
        """Return an empty cache."""
        assert self.program.plan is not None, "asked for by sessions of cached programs"
        return PagedCache(
            self.program.plan,
            num_pages=sizes.num_pages,
            page_size=sizes.page_size,
            num_rows=sizes.num_rows,
            device=CPU,
        )

    def step(
        self, input_ids: Tensor, inputs: StepInputs, cache: LiveCache, *, all_logits: bool = False
    ) -> Tensor:
        """Feed new tokens to a cache; see `Executable.step`."""
        inputs.check()
        *_, last = self.stops(input_ids, inputs, cache)
        if all_logits:
            return last.value
        return last.value[torch.arange(len(inputs.counts)), torch.tensor(inputs.counts) - 1]

    def stops(self, input_ids: Tensor, inputs: StepInputs, cache: LiveCache) -> Iterator[Stop]:
        """Feed new tokens to a cache, and stop behind each layer; see `walk`."""
        assert isinstance(cache, PagedCache), "made by `new_cache`"
        rows, starts, counts = list(inputs.rows), list(inputs.starts), list(inputs.counts)
        positions = torch.tensor(inputs.positions)[:, None] + torch.arange(input_ids.shape[1])
        cache.begin(Step(rows, starts, counts, inputs.block_table, cache.page_size, CPU))
        yield from walk(self.program, input_ids, positions, cache)
        cache.commit()


class _WalkingCheckpoint(CheckpointExecutable):
    """The `checkpoint` layout already runs layer by layer."""

    @property
    def device(self) -> torch.device:
        return CPU


class WalkingModel:
    """A program as `verify.protocols.ModelLike`: its sessions read weights as they need them.

    Args:
        program: On the CPU; with a cache, or without one and then without sessions.
    """

    def __init__(self, program: Program) -> None:
        self.program = program

    @property
    def plan(self) -> CachePlan | None:
        """What is cached and how."""
        return self.program.plan

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Return logits of all positions, `[B, S, vocab]`."""
        if self.plan is not None:
            rows, width = input_ids.shape
            session = self.new_session(max_batch_size=rows, max_seq_len=width)
            return session.prefill(input_ids, all_logits=True)
        positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        *_, last = walk(self.program, input_ids, positions)
        return last.value

    def new_session(self, *, max_batch_size: int, max_seq_len: int) -> Session:
        """Return an empty cache in use."""
        assert self.plan is not None, "a session needs a cache"
        is_checkpoint = self.plan.layout.kind == "checkpoint"
        executable: Executable = (
            _WalkingCheckpoint(self.program) if is_checkpoint else WalkingExecutable(self.program)
        )
        return Session(executable, max_batch_size=max_batch_size, max_seq_len=max_seq_len)
