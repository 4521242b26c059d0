"""From an ExportedProgram to the graph contract of `ir.program`.

Nested graphs are inlined, checks dropped, parameters and constants become `get_attr` nodes, types
come from the traced values, and `module` and `origin` from the recorded stacks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from kvxform.capture.exporting import PREFIX
from kvxform.capture.structure import op_name
from kvxform.errors import CaptureError
from kvxform.ir.types import SymType, TensorType, TupleType, ValueType

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_DROPPED = frozenset(
    [
        "_assert_tensor_metadata",
        "_assert_scalar",
        "_assert_async",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
    ]
)
_ALIASES = frozenset({"alias", "detach", "lift_fresh_copy", "detach_copy", "alias_copy"})
_CASTS = frozenset({"to", "_to_copy", "type_as"})
_END = 1 << 31  # slice ends beyond this mean "to the end"


def normalise(exported: ExportedProgram) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Return the graph and its weights; weights share memory with the exported program.

    Raises:
        CaptureError: KVX302 for nested graphs that cannot be inlined, KVX304 for other inputs.
    """
    builder = _Builder(exported)
    builder.build()
    graph = builder.graph
    _drop_identities(graph)
    _split_to_slices(graph)
    _view_to_reshape(graph)
    remove_dead(graph)
    return graph, {k: v for k, v in builder.weights.items() if k in _used(graph)}


def remove_dead(graph: fx.Graph) -> None:
    """Erase calls and weights without users."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)


def _used(graph: fx.Graph) -> set[str]:
    return {str(n.target) for n in graph.nodes if n.op == "get_attr"}


class _Builder:
    """Copies nodes of an exported program into a new graph."""

    def __init__(self, exported: ExportedProgram) -> None:
        self.exported = exported
        self.graph = fx.Graph()
        self.weights: dict[str, Tensor] = {}
        self.env: dict[fx.Node, Any] = {}
        self.symbols: dict[str, str] = {}

    def build(self) -> None:
        source = self.exported.graph
        specs = {spec.arg.name: spec for spec in self.exported.graph_signature.input_specs}
        placeholders = [n for n in source.nodes if n.op == "placeholder"]
        users = [n for n in placeholders if specs[n.name].kind == InputKind.USER_INPUT]
        self._add_inputs(users)
        for node in placeholders:
            if node not in users:
                self._add_weight(node, specs[node.name])
        for node in source.nodes:
            if node.op == "call_function":
                self._copy_call(node, self.exported.graph_module)
            elif node.op == "get_attr":
                self._copy_attribute(node, self.exported.graph_module)
        self.graph.output(self._find_output())
        self.graph.lint()

    def _add_inputs(self, users: list[fx.Node]) -> None:
        tensors = [n for n in users if isinstance(n.meta.get("val"), Tensor)]
        names = ("input_ids", "position_ids")
        known = {n.name: n for n in tensors}
        first = known.get("input_ids", tensors[0] if tensors else None)
        second = known.get("position_ids", tensors[1] if len(tensors) == 2 else None)
        extra = [n.name for n in tensors if n is not first and n is not second]
        if first is None or extra:
            raise CaptureError(
                "KVX304",
                "a model may take only input_ids and position_ids",
                where="capture",
                got=[n.name for n in tensors],
                hint="export it without attention_mask, cache and labels",
            )
        shape = list(first.meta["val"].shape)
        if len(shape) != 2 or not all(isinstance(n, torch.SymInt) for n in shape):
            raise CaptureError(
                "KVX304",
                "batch and sequence of input_ids must be dynamic",
                where="capture",
                got=[str(n) for n in shape],
                hint="export with dynamic_shapes={0: Dim.DYNAMIC, 1: Dim.DYNAMIC}",
            )
        self.symbols = {str(n): name for n, name in zip(shape, "BS", strict=True)}
        for name, node in zip(names, (first, second), strict=True):
            new = self.graph.placeholder(name)
            type_ = TensorType(torch.int64, ("B", "S"))
            new.meta = {"type": type_, "module": "", "origin": "", "via": ()}
            if node is not None:
                self.env[node] = new
        for node in users:
            self.env.setdefault(node, None)  # options such as use_cache

    def _add_weight(self, node: fx.Node, spec: InputSpec) -> None:
        name = str(spec.target)
        store = self.exported.state_dict if name in self.exported.state_dict else None
        value = (store or self.exported.constants)[name]
        assert isinstance(value, Tensor) and isinstance(spec.arg, TensorArgument)
        self.env[node] = self._get_attr(name.removeprefix(PREFIX), value)

    def _get_attr(self, name: str, value: Tensor) -> fx.Node:
        self.weights[name] = value.detach()
        node = self.graph.create_node("get_attr", name)
        type_ = TensorType(value.dtype, tuple(value.shape))
        node.meta = {"type": type_, "module": "", "origin": "", "via": ()}
        return node

    def _copy_attribute(self, node: fx.Node, owner: fx.GraphModule) -> None:
        value = _attribute(owner, str(node.target))
        if isinstance(value, Tensor):
            self.env[node] = self._get_attr(str(node.target).replace(".", "_"), value)
        else:
            self.env[node] = value  # a nested graph, inlined where it is called

    def _copy_call(self, node: fx.Node, owner: fx.GraphModule) -> None:
        if op_name(node) in _DROPPED:
            return
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            self._inline(node)
            return
        if op_name(node) == "getitem" and isinstance(self.env[node.all_input_nodes[0]], tuple):
            self.env[node] = self.env[node.all_input_nodes[0]][node.args[1]]
            return
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.env[n])
        assert callable(node.target)
        if _is_scalar_check(node):
            return
        new = self.graph.create_node("call_function", node.target, args, kwargs, name=node.name)
        new.meta = {
            "type": self._type_of(node.meta.get("val")),
            "module": _module_of(node),
            "origin": _origin_of(node),
            "via": (),
        }
        self.env[node] = new

    def _inline(self, call: fx.Node) -> None:
        nested = [self.env[n] for n in call.all_input_nodes]
        inner = next((m for m in nested if isinstance(m, fx.GraphModule)), None)
        name = getattr(call.target, "__name__", str(call.target))
        if inner is None or name not in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            raise CaptureError(
                "KVX302", "nested graphs must be inlinable", where="capture", got=name
            )
        if name == "wrap_with_autocast" and call.args[2]:
            raise CaptureError("KVX304", "autocast must be off in the model", where="capture")
        arguments = iter([a for a in call.all_input_nodes if not _is_module(self.env[a])])
        for node in inner.graph.nodes:
            if node.op == "placeholder":
                self.env[node] = self.env[next(arguments)]
            elif node.op == "call_function":
                self._copy_call(node, inner)
            elif node.op == "get_attr":
                self._copy_attribute(node, inner)
            else:
                results = (
                    node.args[0] if isinstance(node.args[0], tuple | list) else (node.args[0],)
                )
                self.env[call] = tuple(self.env[n] for n in results)

    def _find_output(self) -> fx.Node:
        (output,) = (n for n in self.exported.graph.nodes if n.op == "output")
        tensors = [n for n in output.args[0] if isinstance(n, fx.Node)]
        for node in tensors:
            new = self.env[node]
            type_ = new.meta["type"] if isinstance(new, fx.Node) else None
            if isinstance(type_, TensorType) and type_.shape[:2] == ("B", "S"):
                if len(type_.shape) == 3:
                    return new
        raise CaptureError(
            "KVX304",
            "a model must return logits [B, S, vocab] of all positions",
            where="capture",
            got=[str(self.env[n].meta["type"]) for n in tensors],
        )

    def _type_of(self, value: Any) -> ValueType:
        if isinstance(value, Tensor):
            return TensorType(value.dtype, tuple(self._size(n) for n in value.shape))
        if isinstance(value, tuple | list):
            items = [self._type_of(item) for item in value]
            return TupleType(tuple(i for i in items if not isinstance(i, TupleType)))
        return SymType(str(self._size(value)))

    def _size(self, size: Any) -> int | str:
        if isinstance(size, int):
            return size
        text = str(size)
        for symbol, name in self.symbols.items():
            text = re.sub(rf"\b{symbol}\b", name, text)
        return int(text) if text.lstrip("-").isdigit() else text


def _is_module(value: Any) -> bool:
    return isinstance(value, fx.GraphModule)


def _is_scalar_check(node: fx.Node) -> bool:
    """Whether a node is a guard on sizes: a call without users that returns no tensor."""
    return not node.users and not isinstance(node.meta.get("val"), Tensor | tuple | list)


def _attribute(owner: Any, path: str) -> Any:
    for part in path.split("."):
        owner = getattr(owner, part)
    return owner


def _module_of(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    if not isinstance(path, str) or path.startswith("_empty"):
        return ""
    return path.removeprefix(PREFIX.rstrip(".")).removeprefix(".")


def _origin_of(node: fx.Node) -> str:
    """Return `op (file.py:line)`; the file is the innermost that is not part of torch."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if "torch" not in PurePath(frame[0]).parts]
    name = op_name(node)
    if not (own or frames):
        return name
    file, line = (own or frames)[-1]
    return f"{name} ({PurePath(file).name}:{line})"


def _drop_identities(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
            if _is_identity(node, node.args[0]):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)


def _is_identity(node: fx.Node, source: fx.Node) -> bool:
    name, same_type = op_name(node), node.meta["type"] == source.meta["type"]
    if name in _ALIASES:
        return True
    if name == "dropout":
        return not node.args[2] or node.args[1] == 0
    if name in _CASTS or name == "expand":
        return same_type
    if name == "slice":
        start, end, step = (*node.args[2:], *(None, None, None)[len(node.args) - 2 :])[:3]
        to_end = end is None or (isinstance(end, int) and end >= _END)
        return same_type and start in (0, None) and to_end and step in (1, None)
    return False


def _view_to_reshape(graph: fx.Graph) -> None:
    """Make no claim about strides: other implementations of an op may lay out results otherwise."""
    for node in graph.nodes:
        if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            node.target = torch.ops.aten.reshape.default


def _split_to_slices(graph: fx.Graph) -> None:
    """Replace split, chunk and unbind with one slice or select per part."""
    for node in list(graph.nodes):
        makers: dict[str, Callable[[fx.Node, int], fx.Node]] = {
            "split": _slice_part,
            "split_with_sizes": _slice_part,
            "chunk": _slice_part,
            "unbind": _select_part,
        }
        make = makers.get(op_name(node))
        if make is None or any(op_name(u) != "getitem" for u in node.users):
            continue
        axis = _axis(node)
        if any(not isinstance(u.meta["type"].shape[axis], int) for u in node.users):
            continue
        for user in list(node.users):
            with graph.inserting_before(user):
                part = make(node, int(user.args[1]))
            part.meta = {**user.meta, "origin": node.meta["origin"]}
            user.replace_all_uses_with(part)
            graph.erase_node(user)


def _axis(node: fx.Node) -> int:
    default = 0
    position = 1 if op_name(node) == "unbind" else 2
    axis = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
    assert isinstance(axis, int)
    rank = len(node.args[0].meta["type"].shape)  # type: ignore[union-attr]
    return axis % rank - (rank if op_name(node) != "unbind" else 0)


def _slice_part(node: fx.Node, index: int) -> fx.Node:
    axis = _axis(node)
    sizes = [item.shape[axis] for item in node.meta["type"].items]
    start = sum(sizes[:index])
    return node.graph.call_function(
        torch.ops.aten.slice.Tensor, (node.args[0], axis, start, start + sizes[index])
    )


def _select_part(node: fx.Node, index: int) -> fx.Node:
    return node.graph.call_function(torch.ops.aten.select.int, (node.args[0], _axis(node), index))
