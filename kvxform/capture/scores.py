"""What happens to attention scores before the softmax, measured on chosen scores.

A softmax does not see what is added to a whole row. So every row is read relative to its diagonal,
the score of a token with itself, and the chosen scores are zero there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kvxform.capture.masks import MASKED
from kvxform.capture.probing import Prober, Setting, is_close
from kvxform.capture.refusal import NotRaisedError
from kvxform.capture.structure import ancestors, literals, shape_of
from kvxform.capture.weights import add_weight
from kvxform.ir.rounding import coarsest

_SETTING = Setting.first(4, batch=2)
LARGE = 100.0  # of scaled scores; a softcap hardly changes those of random numbers


@dataclass(frozen=True)
class Measured:
    """What happens to scores, besides the mask.

    Attributes:
        scale: Factor of the scores.
        softcap: Softcap, or None.
        sink_logits: Key of the sink logits `[H]` in the weights, or None.
    """

    scale: float
    softcap: float | None = None
    sink_logits: str | None = None


@dataclass(frozen=True)
class ScoreFunction:
    """What happens to scores between the product of q and k and the softmax."""

    prober: Prober
    product: fx.Node
    scores: fx.Node

    def _apply(
        self, fill: float | Tensor, setting: Setting, numbers: dict[int, int] | None = None
    ) -> Tensor:
        """Return what the softmax gets, `[..., S, S]` or with one more column, a sink."""
        sizes = {"B": setting.batch, "S": setting.length}
        shape = [int(eval_size(n, sizes)) for n in shape_of(self.product)]
        dtype = self.product.meta["type"].dtype
        value = torch.as_tensor(fill, dtype=dtype, device=self.prober.device).expand(shape)
        (out,) = self.prober.run([self.scores], setting, {self.product: value}, numbers)
        assert isinstance(out, Tensor)
        return out.double()

    def bias(self, setting: Setting, numbers: dict[int, int]) -> Tensor:
        """Return what scores of zero become: the additive mask."""
        return self._apply(0.0, setting, numbers)[..., : setting.length].to(self._narrowest())

    def _narrowest(self) -> torch.dtype:
        """Return the dtype that limits how exact scores are, before or after a cast."""
        return coarsest(self.product.meta["type"].dtype, self.scores.meta["type"].dtype)

    def measure(self) -> Measured:
        """Return scale, softcap and sinks.

        Raises:
            NotRaisedError: If scores are changed in another way.
        """
        zero = self._relative(0.0)
        noise = self.prober.random(_SETTING.length, _SETTING.length, dtype=torch.float64)
        noise.fill_diagonal_(0.0)
        # If the diagonal is masked, what is seen is as far above it as a mask is below.
        seen = (zero[..., : _SETTING.length].abs() < -MASKED) & (noise != 0)
        if not bool(seen.any()):
            raise NotRaisedError(
                "the mask is neither causal nor a sliding window nor chunks: "
                "a token does not see itself and those before it",
                node=self.scores,
            )
        sink = self._find_sink(zero, self._relative(noise))
        scale, softcap = self._scale_and_cap(zero, noise, seen)
        return Measured(scale, softcap, sink)

    def _scale_and_cap(
        self, zero: Tensor, noise: Tensor, seen: Tensor
    ) -> tuple[float, float | None]:
        """Return scale and softcap, from scores `zero` and `noise`, where they are `seen`."""
        ones = 1.0 - torch.eye(_SETTING.length, dtype=torch.float64, device=noise.device)

        def added(value: Tensor) -> Tensor:
            return (self._relative(value) - zero)[..., : _SETTING.length][seen]

        one, dtype = added(ones)[0], self._narrowest()
        scale = self._exact(float(one))
        steep = noise * (LARGE / (abs(scale) or 1.0))
        given = [x.expand_as(seen)[seen] for x in (noise, steep)]
        got = [added(x) for x in (noise, steep)]
        if all(is_close(y, x * scale, dtype) for x, y in zip(given, got, strict=True)):
            return scale, None
        cap = self._exact(float(added(1e6 * ones)[0]))
        if cap > abs(float(one)):
            scale = self._exact(cap * math.atanh(float(one) / cap))
            capped = [cap * torch.tanh(x * scale / cap) for x in given]
            if all(is_close(y, x, dtype) for x, y in zip(capped, got, strict=True)):
                return scale, cap
        raise NotRaisedError(
            "scores are changed by more than a scale, a softcap and a mask", node=self.scores
        )

    def _relative(self, fill: float | Tensor) -> Tensor:
        """Return the scores that the softmax gets, relative to the diagonal."""
        if isinstance(fill, Tensor):
            fill = fill.to(self.product.meta["type"].dtype)
        out = self._apply(fill, _SETTING)
        return out - out.diagonal(dim1=-2, dim2=-1)[..., None]

    def _find_sink(self, zero: Tensor, noise: Tensor) -> str | None:
        """Return the key of sink logits that are one more column of the scores, or None.

        Raises:
            NotRaisedError: If more columns than one are added, or one that is not constant.
        """
        extra = zero.shape[-1] - _SETTING.length
        if extra == 0:
            return None
        column = zero[..., -1].unflatten(0, (_SETTING.batch, -1))  # [B, ..., S]
        column = column.flatten(1, -2)
        sinks = column[0, :, 0]
        dtype = self._narrowest()  # a model may take the largest score off all columns
        same = is_close(column, sinks[:, None].expand_as(column), dtype)
        if extra != 1 or not same or not is_close(noise[..., -1], zero[..., -1], dtype):
            raise NotRaisedError(
                f"the softmax has {extra} more columns, and not one constant per head",
                node=self.scores,
            )
        for node in ancestors([self.scores], {self.product}):
            held = self.prober.weights.get(str(node.target)) if node.op == "get_attr" else None
            if held is None or held.shape != sinks.shape:
                continue
            if is_close(held.double(), sinks, dtype):
                return str(node.target)
        stored = self.scores.meta["type"].dtype
        return add_weight(self.prober.weights, "sink_logits", sinks.to(stored))

    def _exact(self, value: float) -> float:
        """Return the number in the graph, or one over it, that `value` was measured from."""
        nodes = ancestors([self.scores], {self.product})
        numbers = [float(n) for _, n in literals(nodes, (int, float)) if n]
        known = [1.0, *numbers, *(1 / n for n in numbers)]
        nearest = min(known, key=lambda n: abs(n - value))
        return nearest if abs(nearest - value) < 1e-5 * abs(value) else value


def eval_size(size: int | str, sizes: dict[str, int]) -> int:
    """Return the value of a size such as `6*B`, a product of numbers and symbols."""
    factors = str(size).split("*")
    return math.prod(sizes[f] if f in sizes else int(f) for f in factors)
