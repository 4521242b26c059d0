"""From an ExportedProgram to the graph contract of `ir.program`.

Nested graphs are inlined, checks dropped, parameters and constants become `get_attr` nodes, types
come from the traced values, and `module` and `origin` from the recorded stacks.
"""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec

from kvxform.capture.exporting import PREFIX, find_inputs
from kvxform.capture.flex import expand_flex
from kvxform.capture.structure import op_name
from kvxform.capture.tidy import tidy
from kvxform.capture.weights import new_meta
from kvxform.errors import CaptureError
from kvxform.ir.types import SymType, TensorType, TupleType, ValueType

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_DROPPED = frozenset(
    {
        *("_assert_tensor_metadata", "_assert_scalar", "_assert_async"),
        *("sym_constrain_range", "sym_constrain_range_for_size"),
    }
)


def normalise(exported: ExportedProgram) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Return the graph and its weights; weights share memory with the exported program.

    Raises:
        CaptureError: KVX302 for nested graphs that cannot be inlined, KVX304 for inputs or outputs
            that are not those of a decoder.
    """
    builder = _Builder(exported)
    builder.build()
    tidy(builder.graph)
    used = {str(n.target) for n in builder.graph.nodes if n.op == "get_attr"}
    return builder.graph, {k: v for k, v in builder.weights.items() if k in used}


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
            self._copy(node, self.exported.graph_module)
        self.graph.output(self._find_output())
        self.graph.lint()

    def _add_inputs(self, users: list[fx.Node]) -> None:
        self.env |= dict.fromkeys(users)  # options such as use_cache
        inputs = [users[i] for i in find_inputs(self.exported)]
        shape = list(inputs[0].meta["val"].shape)
        if len(shape) != 2 or not all(isinstance(n, torch.SymInt) for n in shape):
            raise CaptureError(
                "KVX304",
                "batch and sequence of input_ids must be dynamic",
                where="capture",
                got=[str(n) for n in shape],
                hint="export with dynamic_shapes={0: Dim.DYNAMIC, 1: Dim.DYNAMIC}",
            )
        for given in inputs:  # positions may have symbols of their own
            sizes = given.meta["val"].shape[-2:]
            self.symbols |= {str(n): name for n, name in zip(sizes, "BS", strict=True)}
        for i, name in enumerate(("input_ids", "position_ids")):
            new = self.graph.placeholder(name)
            new.meta = new_meta(TensorType(torch.int64, ("B", "S")))
            if i < len(inputs):
                self.env[inputs[i]] = new

    def _add_weight(self, node: fx.Node, spec: InputSpec) -> None:
        name = str(spec.target)
        in_state = name in self.exported.state_dict
        value = (self.exported.state_dict if in_state else self.exported.constants)[name]
        assert isinstance(value, Tensor)
        self.env[node] = self._get_attr(name.removeprefix(PREFIX), value)

    def _get_attr(self, name: str, value: Tensor) -> fx.Node:
        self.weights[name] = value.detach()
        node = self.graph.create_node("get_attr", name)
        node.meta = new_meta(TensorType(value.dtype, tuple(value.shape)))
        return node

    def _copy(self, node: fx.Node, owner: fx.GraphModule) -> None:
        if node.op == "call_function":
            self._copy_call(node)
        elif node.op == "get_attr":
            self._copy_attribute(node, owner)

    def _copy_attribute(self, node: fx.Node, owner: fx.GraphModule) -> None:
        value = _attribute(owner, str(node.target))
        if isinstance(value, Tensor):
            self.env[node] = self._get_attr(str(node.target).replace(".", "_"), value)
        else:
            self.env[node] = value  # a nested graph, inlined where it is called

    def _copy_call(self, node: fx.Node) -> None:
        if op_name(node) in _DROPPED or _is_scalar_check(node):
            return
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            self._inline(node)
            return
        if op_name(node) == "getitem":
            whole, index = self.env[node.all_input_nodes[0]], node.args[1]
            if isinstance(whole, tuple) and isinstance(index, int):
                self.env[node] = whole[index]  # of a nested graph
                return
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.env[n])
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
        if name == "flex_attention":
            self._inline_flex(call)
            return
        if inner is None or name not in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            raise CaptureError(
                "KVX302", "nested graphs must be inlinable", where="capture", got=name
            )
        if name == "wrap_with_autocast" and call.args[2]:
            raise CaptureError("KVX304", "autocast must be off in the model", where="capture")
        arguments = iter([a for a in call.all_input_nodes if self.env[a] is not inner])
        for node in inner.graph.nodes:
            if node.op == "placeholder":
                self.env[node] = self.env[next(arguments)]
            elif node.op == "output":
                self.env[call] = tuple(self.env[n] for n in node.all_input_nodes)
            else:
                self._copy(node, inner)

    def _inline_flex(self, call: fx.Node) -> None:
        if any(user.args[1] != 0 and user.users for user in call.users):
            raise CaptureError(
                "KVX304",
                "only the output of FlexAttention may be used",
                where="capture",
                got="its logsumexp or its maxima",
                at=_module_of(call),
            )
        arguments = fx.node.map_arg(call.args, lambda n: self.env[n])
        meta = {"module": _module_of(call), "origin": _origin_of(call), "via": ()}
        out = expand_flex(self.graph, arguments, meta, self._get_attr)
        self.env[call] = (out, None, None)

    def _find_output(self) -> fx.Node:
        (output,) = (n for n in self.exported.graph.nodes if n.op == "output")
        tensors = [n for n in output.args[0] if isinstance(n, fx.Node)]
        for node in tensors:
            new = self.env[node]
            assert isinstance(new, fx.Node)
            shape = getattr(new.meta["type"], "shape", ())
            if len(shape) == 3 and shape[:2] == ("B", "S"):
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
        if re.fullmatch(r"[\w*]+", text):
            text = "*".join(sorted(text.split("*")))  # B*S, however it was multiplied
        return int(text) if text.lstrip("-").isdigit() else text


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
