"""Part of a program as a program of its own.

Values at which it is cut become tables with a row for each token id, so the part takes token ids
like every program, and every pass, lowering and check works on it. The rows are values recorded in
the whole model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, fx

from kvxform.ir.program import AttentionSite, Program, Projection, default_positions
from kvxform.ir.types import SymType, TensorType, ValueType
from kvxform.verify.probe import Probe

aten = torch.ops.aten
ORIGIN = "recorded input"
TABLE = "recorded."  # names of the tables begin with it


def width_of(node: fx.Node) -> int | None:
    """Return how many numbers a value has per token, or None if no part can be cut there."""
    kind = node.meta["type"]
    if not isinstance(kind, TensorType) or not kind.dtype.is_floating_point:
        return None
    layout = _layout(kind.shape)
    return None if layout is None else _product(layout)


def record(program: Program, names: Collection[str], probe: Probe) -> dict[str, Tensor]:
    """Return the values of some nodes on a probe, `[tokens that count, width]` each.

    Args:
        program: A program without a cache.
        names: Nodes that have a `width_of`.
        probe: What to run on.
    """
    kept: dict[str, Tensor] = {}

    class _Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            if n.name in names:
                kept[n.name] = _rows(result, n.meta["type"].shape, probe)
            return result

    device = next(iter(program.weights.values())).device
    ids = probe.input_ids.to(device)
    with torch.inference_mode():
        _Recorder(program.to_module()).run(ids, default_positions(ids))
    return {name: kept[name].clone() for name in names}


def cut_program(program: Program, entries: Mapping[str, Tensor], end: str) -> Program:
    """Return what lies between some values and one value that is made from them.

    Args:
        program: A program without a cache; it is not changed.
        entries: Names of nodes that become inputs, with what `record` returned for them.
        end: Name of the node that is returned, as `[B, S, width]`.
    """
    part = program.clone()
    part.calibration, part.store, part.rejected = None, None, ()
    nodes = {node.name: node for node in part.graph.nodes}
    width = width_of(nodes[end])
    assert width is not None, "a value with a width"
    for name, rows in entries.items():
        _add_table(part, nodes[name], f"{TABLE}{name}", rows, width)
    _return(part.graph, nodes[end], width)
    part.info = dataclasses.replace(
        part.info,
        vocab_size=width,
        tokenizer_path=None,
        bos_token_id=None,
        eos_token_ids=(),
        pad_token_id=None,
    )
    _drop_unused(part)
    return part


def inputs_of(part: Program) -> list[str]:
    """Return the names of the nodes that are inputs of a part."""
    return [name.removeprefix(TABLE) for name in part.weights if name.startswith(TABLE)]


def operations(program: Program) -> list[fx.Node]:
    """Return the calls of a program that neither stand for recorded inputs nor make sizes."""
    calls = (node for node in program.graph.nodes if node.op == "call_function")
    return [
        node
        for node in calls
        if node.meta["origin"] != ORIGIN and not isinstance(node.meta["type"], SymType)
    ]


def _add_table(part: Program, node: fx.Node, name: str, rows: Tensor, vocab: int) -> None:
    """Let the users of `node` read a row of a table by token id instead."""
    kind = node.meta["type"]
    layout = _layout(kind.shape)
    assert layout is not None, "a value with a width"
    index = torch.arange(vocab) % rows.shape[0]
    part.weights[name] = rows[index].contiguous()
    writer = _Writer(part.graph, node)
    table = writer.weight(name, TensorType(kind.dtype, (vocab, _product(layout))))
    ids = part.placeholder("input_ids")
    shape: tuple[int | str, ...] = ("B", "S", _product(layout))
    value = writer.call(aten.embedding.default, (table, ids), TensorType(kind.dtype, shape))
    if kind.shape != shape:
        value = _as_shape(writer, value, ids, kind, layout)
    node.replace_all_uses_with(value)


def _as_shape(
    writer: _Writer, value: fx.Node, ids: fx.Node, kind: TensorType, layout: tuple[int, ...]
) -> fx.Node:
    """Bring `[B, S, width]` into the shape that its users expect."""
    if kind.shape[0] == "B*S":
        return writer.call(aten.view.default, (value, [-1, *layout]), kind)
    batch, tokens = (
        writer.call(aten.sym_size.int, (ids, dim), SymType(symbol))
        for dim, symbol in enumerate("BS")
    )
    spread = TensorType(kind.dtype, ("B", "S", *layout))
    value = writer.call(aten.view.default, (value, [batch, tokens, *layout]), spread)
    if kind.shape[1] == "S":
        return value
    return writer.call(aten.transpose.int, (value, 1, 2), kind)


def _return(graph: fx.Graph, end: fx.Node, width: int) -> None:
    """Let the graph return `end` as `[B, S, width]`."""
    output = next(node for node in graph.nodes if node.op == "output")
    ids = next(node for node in graph.nodes if node.target == "input_ids")
    kind = end.meta["type"]
    wanted = TensorType(kind.dtype, ("B", "S", width))
    value = end
    if kind != wanted:
        writer = _Writer(graph, output, end)
        layout = _layout(kind.shape)
        assert layout is not None, "a value with a width"
        if kind.shape[0] == "B" and kind.shape[1] != "S":
            spread = TensorType(kind.dtype, ("B", "S", *layout))
            value = writer.call(aten.transpose.int, (value, 1, 2), spread)
        sizes = [
            writer.call(aten.sym_size.int, (ids, dim), SymType(symbol))
            for dim, symbol in enumerate("BS")
        ]
        value = writer.call(aten.reshape.default, (value, [*sizes, width]), wanted)
    output.args = (value,)


def _drop_unused(part: Program) -> None:
    """Remove nodes, weights and sites that the part does not need."""
    for node in reversed(list(part.graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            part.graph.erase_node(node)
    used = {str(node.target) for node in part.graph.nodes if node.op == "get_attr"}
    layers = {node.kwargs["layer"] for node in part.calls(torch.ops.kvx.attention.default)}
    part.sites = tuple(_fit(s, used, layers) for s in part.sites if s.layer in layers)
    bases = {b.weight for s in part.sites for b in (s.k_basis, s.v_basis)}
    bases |= {b.inverse for s in part.sites for b in (s.k_basis, s.v_basis)}
    part.weights = {n: w for n, w in part.weights.items() if n in used or n in bases}
    part.touched = {n: by for n, by in part.touched.items() if n in part.weights}
    part.graph.lint()


def _fit(site: AttentionSite, used: Collection[str], layers: Collection[object]) -> AttentionSite:
    """Return a site that names no weight and no layer outside of its part."""

    def here(projection: Projection | None) -> Projection | None:
        return projection if projection is not None and projection.weight in used else None

    has_latent = site.latent is not None and site.latent.up_k.weight in used
    return dataclasses.replace(
        site,
        q=here(site.q),
        k=here(site.k),
        v=here(site.v),
        o=here(site.o),
        rope=site.rope if site.rope is not None and site.rope.inv_freq in used else None,
        latent=site.latent if has_latent else None,
        shared_with=site.shared_with if site.shared_with in layers else None,
    )


class _Writer:
    """Adds nodes before an anchor, with provenance."""

    def __init__(self, graph: fx.Graph, anchor: fx.Node, like: fx.Node | None = None) -> None:
        self._graph, self._anchor, self._like = graph, anchor, like or anchor

    def call(self, target: object, args: tuple[object, ...], kind: ValueType) -> fx.Node:
        with self._graph.inserting_before(self._anchor):
            node = self._graph.call_function(target, args)  # type: ignore[arg-type]
        return self._stamp(node, kind)

    def weight(self, name: str, kind: ValueType) -> fx.Node:
        with self._graph.inserting_before(self._anchor):
            node = self._graph.create_node("get_attr", name)
        return self._stamp(node, kind)

    def _stamp(self, node: fx.Node, kind: ValueType) -> fx.Node:
        module = self._like.meta["module"]
        node.meta = {"type": kind, "module": module, "origin": ORIGIN, "via": ()}
        return node


def _layout(shape: tuple[int | str, ...]) -> tuple[int, ...] | None:
    """Return the sizes of a token's part of a value, heads first; None if tokens are not apart."""
    for first in (("B", "S"), ("B*S",)):
        rest = shape[len(first) :]
        if shape[: len(first)] == first and rest and all(isinstance(n, int) for n in rest):
            return tuple(int(n) for n in rest)
    if len(shape) == 4 and (shape[0], shape[2]) == ("B", "S"):
        heads, channels = shape[1], shape[3]
        if isinstance(heads, int) and isinstance(channels, int):
            return (heads, channels)
    return None


def _rows(value: Tensor, shape: tuple[int | str, ...], probe: Probe) -> Tensor:
    """Return the tokens of a value that count, `[tokens, width]`."""
    if shape[0] == "B" and shape[1] != "S":
        value = value.transpose(1, 2)
    batch, tokens = probe.input_ids.shape
    return value.reshape(batch, tokens, -1)[probe.real.to(value.device)]


def _product(sizes: Iterable[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
