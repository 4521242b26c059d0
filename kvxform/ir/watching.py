"""Runs a program without a cache and shows what goes into its attentions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.ir.program import default_positions
from kvxform.ir.scoring import Scoring, attend

QUERY_CHUNK = 256  # queries whose probabilities exist at the same time


class Watcher(fx.Interpreter, ABC):
    """Interprets a program without a cache; values are freed as soon as nothing reads them."""

    def show(self, token_ids: Tensor) -> Any:
        """Run one window of tokens, int64 `[S]`; returns what the graph returns."""
        row = token_ids[None]
        return self.run(row, default_positions(row))

    @abstractmethod
    def seen(self, layer: int, stream: str, x: Tensor) -> None:
        """Take one operand.

        Args:
            layer: Layer of the attention.
            stream: `q_pre`, `k_pre`, `q_post`, `k_post` or `v`; the first two only where the whole
                operand comes out of RoPE.
            x: Its values `[1, heads, S, D]`.
        """

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, after its operands were shown."""
        if n.target is kvx.ROPE:
            for user in n.users:
                self._show_rope(n, user)
        if n.target is kvx.ATTENTION:
            for stream, operand in zip(("q_post", "k_post", "v"), n.args, strict=False):
                assert isinstance(operand, fx.Node), "operands of attention are nodes"
                self.seen(_layer(n), stream, self.env[operand])
        return super().run_node(n)

    def _show_rope(self, rope: fx.Node, user: fx.Node) -> None:
        if user.target is not kvx.ATTENTION:
            return
        source = rope.args[0]
        assert isinstance(source, fx.Node), "RoPE turns a node"
        for stream, operand in zip(("q_pre", "k_pre"), user.args, strict=False):
            if operand is rope:
                self.seen(_layer(user), stream, self.env[source])


def _layer(node: fx.Node) -> int:
    layer = node.kwargs["layer"]
    assert isinstance(layer, int), "a layer is a number"
    return layer


def column_weights(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    *,
    layer: int,
    bias: Tensor | None = None,
    softmax_dtype: torch.dtype | None = None,
    **options: Any,
) -> Tensor:
    """Return how much each key is looked at: its probability, averaged over queries.

    The gradient of summed outputs with respect to values that are all one is the sum of each
    column of probabilities, whatever the attention does with its scores.

    Args:
        q: `[1, H, S, D]`.
        k: `[1, Hk, S, D]`.
        positions: `[1, S]`.
        layer: As for `kvx::attention`, like the rest.
        bias: Likewise.
        softmax_dtype: Likewise.
        **options: Those of `Scoring`.

    Returns:
        float32 `[Hk, S]`, the mean over the query heads that read a KV head.
    """
    scoring, tokens, q, k = Scoring(**options), q.shape[2], q.float(), k.float()
    weights = torch.zeros(k.shape[1], tokens, device=k.device)
    for start in range(0, tokens, QUERY_CHUNK):
        chunk = slice(start, start + QUERY_CHUNK)
        by_distance = scoring.bias(positions[:, chunk], positions)
        added = bias
        if bias is not None and bias.shape[-2] > 1:
            added = bias[..., chunk, :]
        if by_distance is not None:
            added = by_distance if added is None else added + by_distance
        mask = scoring.span.sees(positions[:, chunk], positions)
        with torch.enable_grad():
            ones = torch.ones_like(k[..., :1]).requires_grad_()
            out = attend(q[:, :, chunk], k, ones, mask, scoring, bias=added)
            weights += torch.autograd.grad(out.sum(), ones)[0][0, ..., 0]
    return weights / (tokens * q.shape[1] // k.shape[1])
