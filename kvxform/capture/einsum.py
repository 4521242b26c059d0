"""Write `einsum` of two operands as permutations and one matrix product."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from kvxform.capture.emitting import insert
from kvxform.capture.structure import op_name, shape_of, tensor_type
from kvxform.capture.weights import size_node

aten = torch.ops.aten
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def expand_einsums(graph: fx.Graph) -> int:
    """Replace einsums of two operands, and sums of a product over one axis; return how many.

    Only contractions are replaced; an einsum that repeats a letter within an operand, sums a letter
    of one operand alone, or has an axis of another length, stays as it is.
    """
    count = 0
    for node in list(graph.nodes):
        found = _read_einsum(node) or _read_sum(node)
        if found is not None and _has_known_sizes(found[0], found[2]):
            _Contraction(node, *found).replace()
            count += 1
    return count


def _has_known_sizes(*operands: fx.Node) -> bool:
    """Whether all sizes are numbers, batch or tokens; chunks of a state-space layer are not."""
    sizes = {n for operand in operands for n in shape_of(operand)}
    return all(isinstance(n, int) or n in ("B", "S") for n in sizes)


def _read_einsum(node: fx.Node) -> tuple[fx.Node, str, fx.Node, str, str] | None:
    """Return operands and letters of an einsum that is one contraction, or None."""
    operands: Any = node.args[1] if op_name(node) == "einsum" else ()
    if len(operands) != 2:
        return None
    a, b = operands
    inputs, _, out = str(node.args[0]).replace(" ", "").partition("->")
    first, _, second = inputs.partition(",")
    if not out or out.count(".") > 3:
        return None
    spare = [c for c in _LETTERS if c not in inputs]
    left, right = (_spell(w, len(shape_of(n)), spare) for w, n in ((first, a), (second, b)))
    dots = max(len(shape_of(n)) - len(w.replace(".", "")) for w, n in ((first, a), (second, b)))
    out = out.replace("...", "".join(spare[:dots][::-1]))
    distinct = all(len(set(w)) == len(w) for w in (left, right, out))
    alone = (set(left) ^ set(right)) - set(out)
    return (a, left, b, right, out) if distinct and not alone else None


def _spell(word: str, rank: int, spare: list[str]) -> str:
    """Return `word` with a letter for every axis that its dots stand for, the last one first."""
    dots = rank - len(word.replace(".", ""))
    return word.replace("...", "".join(spare[:dots][::-1]))


def _read_sum(node: fx.Node) -> tuple[fx.Node, str, fx.Node, str, str] | None:
    """Return `(a * b).sum(axis)` over squares of scores as a contraction, or None."""
    product = node.args[0] if op_name(node) == "sum" and len(node.args) == 2 else None
    if not isinstance(product, fx.Node) or op_name(product) != "mul" or len(product.users) != 1:
        return None
    type_, axes = tensor_type(product), node.args[1]
    if type_ is None or not all(isinstance(a, fx.Node) for a in product.args):
        return None
    rank = len(type_.shape)
    if type_.shape.count("S") != 2 or not isinstance(axes, list) or len(axes) != 1:
        return None
    letters = _LETTERS[:rank]
    a, b = product.args
    assert isinstance(a, fx.Node)
    assert isinstance(b, fx.Node)
    if not len(shape_of(a)) == len(shape_of(b)) == rank:
        return None
    axis = int(axes[0]) % rank
    if 1 in (shape_of(a)[axis], shape_of(b)[axis]):
        return None
    squeezed = [_squeeze(x, letters, type_.shape, product) for x in (a, b)]
    (left, first), (right, second) = squeezed
    return left, first, right, second, letters[:axis] + letters[axis + 1 :]


def _squeeze(
    x: fx.Node, letters: str, full: tuple[int | str, ...], before: fx.Node
) -> tuple[fx.Node, str]:
    """Return `x` without the axes that it broadcasts along, and the letters of the others."""
    kept = [i for i, n in enumerate(shape_of(x)) if n != 1 or full[i] == 1]
    for axis in reversed([i for i in range(len(full)) if i not in kept]):
        shape = shape_of(x)
        x = insert(before, aten.squeeze.dim, (x, axis), shape[:axis] + shape[axis + 1 :])
    return x, "".join(letters[i] for i in kept)


class _Contraction:
    """One contraction of two operands.

    Letters in both operands and the result are batch axes. Of the letters of one operand alone, one
    is the axis of the matrix and the others become batch axes of size 1 in the other operand.
    """

    def __init__(
        self, node: fx.Node, a: fx.Node, left: str, b: fx.Node, right: str, out: str
    ) -> None:
        self.node, self.a, self.b = node, a, b
        self.left, self.right, self.out = left, right, out
        self.sizes = dict(zip(left, shape_of(a), strict=True))
        for letter, size in zip(right, shape_of(b), strict=True):
            if self.sizes.setdefault(letter, size) == 1:
                self.sizes[letter] = size
        self.inner = [c for c in left if c in right and c not in out]
        self.rows = self._matrix_axis(left, right)
        self.columns = self._matrix_axis(right, left)
        self.batch = [c for c in out if c not in (self.rows, self.columns)]

    def _matrix_axis(self, own: str, other: str) -> str:
        """Return the axis of the tokens if `own` has it alone, else the last; empty if none."""
        alone = [c for c in self.out if c in own and c not in other]
        tokens = [c for c in alone if self.sizes[c] == "S"]
        return (tokens or alone or [""])[-1]

    def replace(self) -> None:
        """Write the product in the place of the node."""
        a = self._arrange(self.a, self.left, [self.rows], self.inner)
        b = self._arrange(self.b, self.right, self.inner, [self.columns])
        batch = tuple(self.sizes[c] for c in self.batch)
        m, n = (self.sizes[c] if c else 1 for c in (self.rows, self.columns))
        product = insert(self.node, aten.matmul.default, (a, b), (*batch, m, n))
        order = [*self.batch]
        for letter, axis in ((self.rows, -2), (self.columns, -1)):
            if letter:
                order.append(letter)
                continue
            shape = list(shape_of(product))
            del shape[axis if self.columns or axis == -1 else -2]
            product = insert(self.node, aten.squeeze.dim, (product, axis), tuple(shape))
        result = self._permute(product, order, list(self.out))
        result.meta["origin"] = self.node.meta["origin"]
        self.node.replace_all_uses_with(result)
        self.node.graph.erase_node(self.node)

    def _arrange(self, x: fx.Node, own: str, rows: list[str], columns: list[str]) -> fx.Node:
        """Return an operand as `[batch..., rows, columns]`, with 1 where it lacks a batch axis."""
        batch = [c for c in self.batch if c in own]
        axes = [c for c in (*rows, *columns) if c]
        x = self._permute(x, list(own), [*batch, *axes])
        here = dict(zip([*batch, *axes], shape_of(x), strict=True))
        shape = [
            *(here.get(c, 1) for c in self.batch),
            *(_product([here[c] for c in part if c]) for part in (rows, columns)),
        ]
        if tuple(shape) == shape_of(x):
            return x
        symbols = {"B": size_node(x.graph, 0), "S": size_node(x.graph, 1)}
        sizes = [symbols.get(n, n) if isinstance(n, str) else n for n in shape]
        return insert(self.node, aten.reshape.default, (x, sizes), tuple(shape))

    def _permute(self, x: fx.Node, own: list[str], wanted: list[str]) -> fx.Node:
        order = [own.index(c) for c in wanted]
        if order == sorted(order):
            return x
        shape = tuple(shape_of(x)[i] for i in order)
        return insert(self.node, aten.permute.default, (x, order), shape)


def _product(sizes: list[Any]) -> int | str:
    """Return the product of sizes of which at most one is a symbol."""
    symbols = [n for n in sizes if isinstance(n, str)]
    number = math.prod(n for n in sizes if isinstance(n, int))
    if not symbols:
        return number
    return symbols[0] if number == 1 else f"{number}*{symbols[0]}"
