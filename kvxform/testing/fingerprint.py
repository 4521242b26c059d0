"""Everything that a pass could change, in a form that can be compared."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from kvxform.ir.program import Program
from kvxform.ir.text import format_program

Fingerprint = Mapping[str, str]


def fingerprint(program: Program) -> Fingerprint:
    """Return a digest of every part of a program, by the name of the part.

    Weights are parts of their own, `weight layers.0.attn.q`, with their values. Names of nodes
    count: a pass that only renames has changed the program all the same.
    """
    nodes = [(n.op, n.name, repr(n.args), repr(n.kwargs), repr(n.meta)) for n in _nodes(program)]
    parts = {
        "graph": format_program(program),
        "nodes": repr(nodes),
        "sites": repr(program.sites),
        "plan": repr(program.plan),
        "facts": repr(program.facts),
        "passes": repr(program.passes),
        "touched": repr(program.touched),
        "info": repr((program.info, program.rejected)),
        "names of weights": repr(list(program.weights)),
    }
    weights = {f"weight {name}": hash_tensor(w) for name, w in program.weights.items()}
    return {name: _hash(text.encode()) for name, text in parts.items()} | weights


def changed_parts(before: Fingerprint, after: Fingerprint) -> list[str]:
    """Return the names of the parts that differ, in order."""
    names = dict.fromkeys((*before, *after))
    return [name for name in names if before.get(name) != after.get(name)]


def digest(program: Program) -> str:
    """Return one digest of a whole program."""
    return _hash("\n".join(f"{k} {v}" for k, v in fingerprint(program).items()).encode())


def hash_tensor(tensor: Tensor) -> str:
    """Return a digest of dtype, shape and values; of a meta tensor, dtype and shape alone."""
    head = f"{tensor.dtype} {tuple(tensor.shape)}"
    if tensor.is_meta:
        return _hash(head.encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return _hash(head.encode() + flat.view(torch.uint8).numpy().tobytes())


def _nodes(program: Program) -> list[torch.fx.Node]:
    return list(program.graph.nodes)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
