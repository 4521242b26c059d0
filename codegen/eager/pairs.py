"""Storage of two layers in one stream: what the lower layer brings waits for the upper one.

A vector is [K | V] of the lower layer, then of the upper one. The new tokens of the lower layer are
stored first beside zeros, so that it can be read; when the upper layer's come, the same tokens are
stored whole. No token is encoded in the step that brings it, for a pair keeps as many recent tokens
as a step may have. So both times the same codes are written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvxform.codegen.eager.reads import StreamRead
from kvxform.codegen.eager.site import SiteStore
from kvxform.codegen.eager.step import Step
from kvxform.codegen.eager.store import Appended
from kvxform.errors import CodegenError
from kvxform.ir.plan import SitePlan


class PairStore:
    """The stream of one pair; what `SiteStore` is for a layer.

    Args:
        store: Where the stream is.
        lower: Plan of the layer that owns it.
    """

    def __init__(self, store: SiteStore, lower: SitePlan) -> None:
        self._store, self._limit = store, lower.key.regions.recent
        self._waiting: Tensor | None = None

    def append(self, is_lower: bool, k: Tensor, v: Tensor, step: Step) -> tuple[Appended, ...]:
        """Store the new tokens of one layer, each `[B, Hk, S, D]`; the lower layer comes first."""
        if step.num_new > self._limit:
            rule = f"a step of merged layers must have at most {self._limit} tokens"
            raise CodegenError("KVX401", rule, where="eager", got=step.num_new)
        own = torch.cat([k, v], -1)
        if is_lower:
            self._waiting = own
            whole = torch.cat([own, torch.zeros_like(own)], -1)
        else:
            assert self._waiting is not None, "the lower layer comes first"
            whole = torch.cat([self._waiting, own], -1)
        return self._store.append(whole, None, step)

    def read(
        self, plan: SitePlan, step: Step, appended: tuple[Appended, ...], dtype: torch.dtype
    ) -> tuple[StreamRead, StreamRead]:
        """Return K and V of the layer of `plan` as the queries of `step` see them."""
        whole, _ = self._store.read(step, appended, dtype)
        key, value = plan.pair_channels
        return whole.channels(key), whole.channels(value)
