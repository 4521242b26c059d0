"""Which output of a linear layer each channel of a later value is, found by running its views."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from kvxform.ir.types import SymType


def replay(
    chain: Sequence[fx.Node],
    weights: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    *,
    skipped: Collection[Any] = (),
    device: torch.device | None = None,
) -> Any:
    """Send the numbers of all outputs of a linear layer through what follows it.

    Args:
        chain: The linear layer, and the calls that lead on, one after the other.
        weights: Weights of the program; views may take indices from there.
        sizes: Value of each symbolic size.
        skipped: Targets that leave every channel where it is, such as norms.
        device: Where the numbers are.

    Returns:
        What the last call of `chain` gives for int64 numbers in place of values.

    Raises:
        TypeError: A call reads another tensor as well; calls that are no views raise what they do.
    """

    def value(node: fx.Node) -> Any:
        if node in values:
            return values[node]
        if node.op == "get_attr":
            return weights[str(node.target)]
        type_ = node.meta["type"]
        if not isinstance(type_, SymType):
            raise TypeError("a view takes one tensor, sizes and indices")
        return _size(type_.expression, sizes)

    shape = [_size(n, sizes) for n in chain[0].meta["type"].shape]
    numbers = torch.arange(shape[-1], device=device).expand(shape)
    values: dict[fx.Node, Any] = {chain[0]: numbers}
    for node in chain[1:]:
        if node.target in skipped:
            values[node] = value(node.all_input_nodes[0])
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        assert callable(node.target), "it is a call"
        values[node] = node.target(*args, **kwargs)
    return values[chain[-1]]


def _size(size: int | str, sizes: Mapping[str, int]) -> int:
    """Return the value of a size, such as `B*S`."""
    product = 1
    for factor in str(size).split("*"):
        product *= sizes[factor] if factor in sizes else int(factor)
    return product
