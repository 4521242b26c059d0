"""What happens to attention scores before the softmax, measured on chosen scores."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kvxform.capture.masks import MASKED
from kvxform.capture.probing import Prober, Setting, is_close
from kvxform.capture.refusal import NotRaisedError
from kvxform.capture.structure import ancestors, literals, shape_of


@dataclass(frozen=True)
class ScoreFunction:
    """What happens to scores between the product of q and k and the softmax."""

    prober: Prober
    product: fx.Node
    scores: fx.Node

    def _apply(
        self, fill: float | Tensor, setting: Setting, numbers: dict[int, int] | None = None
    ) -> Tensor:
        sizes = {"B": setting.batch, "S": setting.length}
        shape = [int(eval_size(n, sizes)) for n in shape_of(self.product)]
        dtype = self.product.meta["type"].dtype
        value = torch.as_tensor(fill, dtype=dtype).expand(shape)
        (out,) = self.prober.run([self.scores], setting, {self.product: value}, numbers)
        assert isinstance(out, Tensor)
        return out.double()

    def bias(self, setting: Setting, numbers: dict[int, int]) -> Tensor:
        """Return what scores of zero become: the additive mask."""
        return self._apply(0.0, setting, numbers)

    def measure(self) -> tuple[float, float | None]:
        """Return scale and softcap.

        Raises:
            NotRaisedError: If scores are changed in another way.
        """
        setting = Setting.first(4)
        zero = self._apply(0.0, setting)
        seen = zero > MASKED
        noise = self.prober.random(setting.length, setting.length, dtype=torch.float64)
        seen_noise = noise.expand(zero.shape)[seen]
        one = (self._apply(1.0, setting) - zero)[seen]
        got = (self._apply(noise, setting) - zero)[seen]
        dtype = self.product.meta["type"].dtype
        scale = self._exact(float(one[0]))
        if is_close(got, seen_noise * scale, dtype):
            return scale, None
        cap = self._exact(float((self._apply(1e6, setting) - zero)[seen][0]))
        scale = self._exact(cap * math.atanh(float(one[0]) / cap))
        if is_close(got, cap * torch.tanh(seen_noise * scale / cap), dtype):
            return scale, cap
        raise NotRaisedError("scores are changed by more than a scale, a softcap and a mask")

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
