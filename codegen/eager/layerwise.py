"""A cached program run layer by layer over all tokens of a sequence, holding K and V of one layer.

A graph is cut behind each of its attentions. Between two of them, every op treats tokens one by
one. So a part runs over one piece of the tokens after the other, in their order, before the next
part begins: what has to be held is the residual stream of all tokens that are computed, and K and V
of the layer at hand.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.ir.program import Program
from kvxform.ir.scoring import Scoring, attend

PIECE = 256  # tokens that go through a part together
LayerKV = tuple[Tensor, ...]  # what one owner caches, K and V or K alone, `[1, Hk, T, D]` each


@dataclass
class Pass:
    """One run over a sequence of `total` tokens, of which `kept` have their K and V already.

    Attributes:
        input_ids: Tokens that are computed, `[1, n]`: those before the kept ones, then new ones.
        positions: Their positions, `[1, n]`.
        kept: K and V by owner, of tokens `first_kept` to `first_kept` + m - 1.
        first_kept: Position of the first.
        total: Tokens of the sequence.
        window: How many of the last tokens to hand back K and V of.
    """

    input_ids: Tensor
    positions: Tensor
    kept: Mapping[int, LayerKV]
    first_kept: int
    total: int
    window: int


@dataclass
class Result:
    """What a run gives.

    Attributes:
        hidden: Output of the program for the tokens from `wanted` on, `[1, n, vocab]`.
        held: K and V by owner of the last `window` tokens.
        peak_bytes: Most bytes of values between parts and of K and V at hand, at any time.
    """

    hidden: Tensor
    held: dict[int, LayerKV] = field(default_factory=dict)
    peak_bytes: int = 0


class LayerwiseRunner:
    """Runs a cached program part by part.

    Args:
        program: With a cache; its codecs are ignored, K and V are used as they are handed over.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        plan = program.plan
        assert plan is not None, "the program has a cache"
        self._owner = {site.layer: site.owner for site in plan.sites}
        self._last_reader = {site.owner: site.layer for site in plan.sites}
        self._parts = _parts(program.graph)
        self._dead = _last_uses(program.graph)

    @torch.inference_mode()
    def run(self, task: Pass, wanted: int) -> Result:
        """Compute `task`; the output of its tokens from index `wanted` on is returned."""
        state = _State(self._program, task, self._owner)
        pieces = _pieces(task, wanted)
        result = Result(torch.empty(0))
        for i, part in enumerate(self._parts):
            is_last = i == len(self._parts) - 1
            for piece in pieces:
                if is_last and piece.stop <= wanted:
                    continue
                for node in part:
                    state.call(node, piece)
                    piece.drop(self._dead.get(node, ()))
                result.peak_bytes = max(result.peak_bytes, state.bytes_held(pieces))
            if not is_last:
                state.leave(part[-1], self._last_reader, result.held)
        outputs = [piece.output for piece in pieces if piece.output is not None]
        result.hidden = torch.cat(outputs, 1)
        return result


class _Piece:
    """Some of the tokens, and the values of nodes for them that are still needed."""

    def __init__(self, task: Pass, start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        self.ids, self.positions = (x[:, start:stop] for x in (task.input_ids, task.positions))
        self.values: dict[fx.Node, Any] = {}
        self.output: Tensor | None = None

    def drop(self, nodes: tuple[fx.Node, ...]) -> None:
        """Forget values that nothing reads any more."""
        for node in nodes:
            self.values.pop(node, None)

    def bytes_held(self) -> int:
        """Return bytes of the values."""
        return sum(x.nbytes for x in self.values.values() if isinstance(x, Tensor))


class _State:
    """K and V of the layers at hand, and what the nodes of a graph do."""

    def __init__(self, program: Program, task: Pass, owner: Mapping[int, int]) -> None:
        self._program, self._task, self._owner = program, task, owner
        self._stores: dict[int, LayerKV] = {}

    def call(self, node: fx.Node, piece: _Piece) -> None:
        """Compute one node for one piece."""
        if node.op == "placeholder":
            inputs = {"input_ids": piece.ids, "position_ids": piece.positions, "cache": None}
            piece.values[node] = inputs[str(node.target)]
            return
        args: Any = fx.node.map_arg(node.args, lambda n: self._value(n, piece))
        kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: self._value(n, piece))
        if node.op == "output":
            piece.output = args[0][0] if isinstance(args[0], tuple | list) else args[0]
        elif node.target is kvx.CACHE_APPEND:
            self._append(kwargs["layer"], args[:2], piece)
            piece.values[node] = None
        elif node.target is kvx.CACHED_ATTENTION:
            piece.values[node] = self._attend(args[0], piece, **kwargs)
        else:
            assert callable(node.target), "the graph holds calls alone"
            piece.values[node] = node.target(*args, **kwargs)

    def bytes_held(self, pieces: list[_Piece]) -> int:
        """Return bytes of all values and of K and V."""
        stored = sum(x.nbytes for store in self._stores.values() for x in store)
        return stored + sum(piece.bytes_held() for piece in pieces)

    def leave(
        self, attention: fx.Node, last_reader: Mapping[int, int], held: dict[int, LayerKV]
    ) -> None:
        """Keep the last K and V of what an attention has read, if it is the last reader."""
        layer = attention.kwargs["layer"]
        assert isinstance(layer, int), "layer is a number in the schema"
        owner, window = self._owner[layer], self._task.window
        if last_reader[owner] == layer:
            store, first = self._stores.pop(owner), max(0, self._task.total - window)
            held[owner] = tuple(x[:, :, first:].clone() for x in store)

    def _value(self, node: fx.Node, piece: _Piece) -> Any:
        is_weight = node.op == "get_attr"
        return self._program.weights[str(node.target)] if is_weight else piece.values[node]

    def _append(self, layer: int, new: tuple[Tensor | None, ...], piece: _Piece) -> None:
        given = tuple(x for x in new if x is not None)
        if layer not in self._stores:
            self._stores[layer] = self._make(layer, given)
        first = int(piece.positions[0, 0])
        for store, x in zip(self._stores[layer], given, strict=True):
            store[:, :, first : first + x.shape[2]] = x

    def _make(self, layer: int, like: LayerKV) -> LayerKV:
        """Return room for K and V of all tokens, with those in it that are there already."""
        task = self._task
        made = tuple(x.new_empty(1, x.shape[1], task.total, x.shape[3]) for x in like)
        for store, old in zip(made, task.kept.get(layer, ()), strict=False):
            store[:, :, task.first_kept : task.first_kept + old.shape[2]] = old
        return made

    def _attend(
        self, q: Tensor, piece: _Piece, *, layer: int, v_head_dim: int, **options: Any
    ) -> Tensor:
        scoring, end = Scoring(**options), int(piece.positions[0, -1]) + 1
        k, v = (self._stores[self._owner[layer]] * 2)[:2]  # K twice where V is a view of it
        k, v = k[:, :, :end], v[:, :, :end]
        read = scoring.key_read
        if read is not None:
            table = None if read.inv_freq is None else read.table(end, k.dtype)
            k = read.apply(k, 0, table)
        v = scoring.read_values(v)
        columns = torch.arange(end, device=q.device)[None]
        mask = scoring.span.sees(piece.positions, columns)
        out = attend(q, k, v, mask, scoring, bias=scoring.bias(piece.positions, columns))
        return out[..., :v_head_dim]


def _pieces(task: Pass, wanted: int) -> list[_Piece]:
    """Return runs of at most `PIECE` tokens without a gap in their positions, cut at `wanted`."""
    computed = task.first_kept if task.kept else 0
    cuts = sorted({0, min(computed, task.input_ids.shape[1]), wanted, task.input_ids.shape[1]})
    spans = [
        (start, min(start + PIECE, stop))
        for first, stop in itertools.pairwise(cuts)
        for start in range(first, stop, PIECE)
    ]
    return [_Piece(task, start, stop) for start, stop in spans]


def _parts(graph: fx.Graph) -> list[list[fx.Node]]:
    """Return the nodes of a graph, weights left out, cut behind each attention."""
    parts: list[list[fx.Node]] = [[]]
    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        parts[-1].append(node)
        if node.target is kvx.CACHED_ATTENTION:
            parts.append([])
    return parts


def _last_uses(graph: fx.Graph) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """Return which values nothing reads after each node."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        last[node] = node
        for source in node.all_input_nodes:
            last[source] = node
    dead: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node, reader in last.items():
        dead[reader] = (*dead.get(reader, ()), node)
    return dead
