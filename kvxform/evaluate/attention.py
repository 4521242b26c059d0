"""Attention error of each layer: the output over the cache beside that over an exact cache.

The same program runs twice on the same tokens, once with all codecs replaced by `none`. In the
second run every attention is measured and then replaced by its exact output, so that each layer
sees exact inputs and its figure is the error of its own cache alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import cosine_similarity

from kvxform.codecs.exact import ExactCodec
from kvxform.ir.cache import CacheState, watch_caches
from kvxform.ir.plan import CachePlan
from kvxform.ir.scoring import Scoring
from kvxform.ir.stream_plan import ReadForm, Regions, StreamPlan
from kvxform.runtime.model import OptimizedModel

See = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class AttentionError:
    """Cosine between attention outputs over the cache and over an exact one.

    Attributes:
        by_layer: Mean over tokens and query heads, by layer.
    """

    by_layer: dict[int, float]

    @property
    def mean(self) -> float:
        """Mean over layers."""
        return sum(self.by_layer.values()) / len(self.by_layer)

    @property
    def worst(self) -> float:
        """Cosine of the worst layer."""
        return min(self.by_layer.values())

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"mean": self.mean, "worst": self.worst, "by_layer": list(self.by_layer.values())}


def measure_attention(model: OptimizedModel, input_ids: Tensor) -> AttentionError:
    """Compare attention over the cache of `model` with that over an exact cache.

    Args:
        model: A model with a cache, lowering `eager`.
        input_ids: int64 `[B, S]`.
    """
    program = model.program
    assert program.plan is not None, "asked for models with a cache"
    exact_plan = make_exact(program.plan, str(program.dtype).removeprefix("torch."))
    exact = OptimizedModel(dataclasses.replace(program, plan=exact_plan))
    outputs: dict[int, Tensor] = {}
    cosines: dict[int, float] = {}

    def keep(layer: int, out: Tensor) -> Tensor:
        outputs[layer] = out
        return out

    def compare(layer: int, out: Tensor) -> Tensor:
        wanted = outputs.pop(layer)
        cosines[layer] = float(cosine_similarity(out.double(), wanted.double(), dim=-1).mean())
        return wanted

    for one, see in ((exact, keep), (model, compare)):
        with watch_caches(lambda state, see=see: _Seen(state, see)):  # type: ignore[misc]
            one(input_ids)
    return AttentionError(dict(sorted(cosines.items())))


def make_exact(plan: CachePlan, dtype: str) -> CachePlan:
    """Return `plan` with every stream stored unencoded in `dtype`, in the same basis."""
    codec = ExactCodec(dtype)

    def exact(stream: StreamPlan) -> StreamPlan:
        return dataclasses.replace(
            stream,
            codec=codec.to_dict(),
            planes=codec.planes(stream.head_dim),
            tokens_per_group=1,
            regions=Regions(),
            read=ReadForm(),
        )

    for site in plan.sites:
        streams = {name: exact(stream) for name, stream in site.streams.items()}
        plan = plan.replace_site(site.layer, **streams)
    return plan


class _Seen:
    """A CacheState whose attention outputs pass through a function."""

    def __init__(self, state: CacheState, see: See) -> None:
        self._state, self._see = state, see

    def append(self, *args: Any, **kwargs: Any) -> None:
        self._state.append(*args, **kwargs)

    def attend(self, layer: int, q: Tensor, positions: Tensor, scoring: Scoring) -> Tensor:
        return self._see(layer, self._state.attend(layer, q, positions, scoring))
