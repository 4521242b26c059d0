"""Rules of the verifier for nodes: inputs, calls, metadata, weights, output."""

from __future__ import annotations

import torch
from torch import fx

from kvxform.errors import PassError
from kvxform.ir.program import META_KEYS, Program
from kvxform.ir.targets import call_problem, target_name
from kvxform.ir.text import format_value, number_nodes
from kvxform.ir.types import SymType, TensorType, TupleType

_INPUT_TYPES = {
    "input_ids": TensorType(torch.int64, ("B", "S")),
    "position_ids": TensorType(torch.int64, ("B", "S")),
    "cache": TensorType(torch.int64, ()),
}


def verify_graph(program: Program) -> None:
    """Check every node of the graph and the weights it reads.

    Raises:
        PassError: KVX215.
    """
    try:
        program.graph.lint()  # names are unique, values are defined before they are used
    except RuntimeError as error:
        raise invalid("a graph must be well formed for torch.fx", error) from error
    for node in program.graph.nodes:
        if node.op != "output":
            _check_meta(node)
    _check_placeholders(program.graph)
    _check_calls(program.graph)
    _check_weights(program)
    _check_output(program)


def invalid(
    rule: str, got: object, node: fx.Node | None = None, *, layer: int | None = None
) -> PassError:
    """Return the error of a broken rule, placed at a node (as printed) or at a layer."""
    at = "" if layer is None else f"layer {layer}"
    if node is not None:
        source = ", ".join(filter(None, (node.meta.get("module"), node.meta.get("origin"))))
        at = f"%{number_nodes(node.graph)[node]}" if node.op != "output" else "the output"
        at += f" ({source})" if source else ""
    return PassError("KVX215", rule, where="verifier", got=got, at=at)


def _check_meta(node: fx.Node) -> None:
    if set(node.meta) != set(META_KEYS):
        keys = ", ".join(sorted(node.meta)) or "no keys"
        raise invalid(f"node.meta must hold {', '.join(META_KEYS)}", keys, node)
    if not isinstance(node.meta["type"], TensorType | SymType | TupleType):
        raise invalid("every node must have a type", repr(node.meta["type"]), node)
    module, origin, via = (node.meta[key] for key in ("module", "origin", "via"))
    is_plain = isinstance(module, str) and isinstance(origin, str) and isinstance(via, tuple)
    if not is_plain or not all(isinstance(name, str) for name in via):
        raise invalid("module and origin must be texts and via a tuple of texts", via, node)


def _check_placeholders(graph: fx.Graph) -> None:
    found = [node for node in graph.nodes if node.op == "placeholder"]
    names = [str(node.target) for node in found]
    expected = list(_INPUT_TYPES)
    if names not in (expected[:2], expected):
        raise invalid(
            "the inputs must be input_ids, position_ids and, once cached, cache", ", ".join(names)
        )
    for node in found:
        wanted = _INPUT_TYPES[str(node.target)]
        if node.meta["type"] != wanted:
            raise invalid(f"the type of {node.target} must be {wanted}", node.meta["type"], node)


def _check_calls(graph: fx.Graph) -> None:
    numbers = number_nodes(graph)
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        name = target_name(node.target)
        if node.op != "call_function" or name is None:
            raise invalid(
                "a graph may call only functional aten ops and kvx ops",
                f"{node.op} {node.target}",
                node,
            )
        problem = call_problem(node.target, len(node.args), node.kwargs)
        if problem:
            raise invalid("a call must fit the schema of its op", f"{name} {problem}", node)
        keywords = (v for v in node.kwargs.values() if not isinstance(v, torch.device))
        for value in (*node.args, *keywords):
            try:
                format_value(value, numbers)
            except PassError as error:
                raise invalid(error.rule, error.got, node) from error


def _check_weights(program: Program) -> None:
    for node in program.graph.nodes:
        if node.op != "get_attr":
            continue
        weight = program.weights.get(node.target)
        if weight is None:
            raise invalid("a get_attr node must name a weight", repr(node.target), node)
        found = TensorType(weight.dtype, tuple(weight.shape))
        if found != node.meta["type"]:
            raise invalid(f"weight {node.target} must be {node.meta['type']}", found, node)
    unknown = sorted(set(program.touched) - set(program.weights))
    if unknown:
        raise invalid("what healing may train must be a weight", repr(unknown[0]))


def _check_output(program: Program) -> None:
    outputs = [node for node in program.graph.nodes if node.op == "output"]
    if len(outputs) != 1 or not isinstance(outputs[0].args[0], fx.Node):
        raise invalid("a graph must return the logits and nothing else", f"{len(outputs)} outputs")
    logits = outputs[0].args[0]
    found = logits.meta["type"]
    vocab = program.info.vocab_size
    is_logits = isinstance(found, TensorType) and found.dtype.is_floating_point
    if not is_logits or found.shape != ("B", "S", vocab):
        raise invalid(f"the logits must be floating point [B, S, {vocab}]", found, logits)
