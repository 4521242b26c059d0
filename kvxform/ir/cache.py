"""The bridge between cached dialect ops and whatever holds the cache at run time.

`kvx::cache_append` and `kvx::cached_attention` carry a handle: an int64 scalar tensor. The graph
stays short and the same for every layout and codec; the object behind the handle does the work.
Handles hold no reference, so a cache is freed with its owner.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor

from kvxform.errors import KvxformError
from kvxform.ir.scoring import Scoring


class CacheState(Protocol):
    """What the cached ops need from a live cache."""

    def append(self, layer: int, k: Tensor, v: Tensor | None) -> None:
        """Store the new tokens of one layer; k and v are `[B, Hk, S, D]`.

        `v` is None if values are a view of the keys.
        """

    def attend(self, layer: int, q: Tensor, positions: Tensor, scoring: Scoring) -> Tensor:
        """Attend from q `[B, H, S, D]` at `positions` `[B, S]` to the cache; `[B, H, S, Dv]`."""


CacheWatch = Callable[[CacheState], CacheState]
_WATCH: ContextVar[CacheWatch | None] = ContextVar("kvxform_cache_watch", default=None)
_COUNTER = itertools.count(1)
_LIVE: weakref.WeakValueDictionary[int, CacheState] = weakref.WeakValueDictionary()


def make_handle(state: CacheState) -> Tensor:
    """Return a handle, int64 scalar on the CPU, that resolves to `state` while it lives."""
    number = next(_COUNTER)
    _LIVE[number] = state
    return torch.tensor(number, dtype=torch.int64)


def resolve_handle(handle: Tensor) -> CacheState:
    """Return the live cache behind `handle`.

    Raises:
        KvxformError: KVX701 if the cache no longer exists.
    """
    state = _LIVE.get(int(handle))
    if state is None:
        raise KvxformError(
            "KVX701", "a cache handle must belong to a live session", got=int(handle)
        )
    return watched(state)


def watched(state: CacheState) -> CacheState:
    """Return what cached ops have to talk to: `state`, or what watches it (see `watch_caches`)."""
    watch = _WATCH.get()
    return state if watch is None else watch(state)


def is_watched() -> bool:
    """Whether this context watches caches; see `watch_caches`."""
    return _WATCH.get() is not None


@contextlib.contextmanager
def watch_caches(watch: CacheWatch) -> Iterator[None]:
    """Let lowerings of this context talk to `watch(state)` instead of `state`.

    Verification stands in between this way and sees what goes into a cache and what comes out.
    """
    token = _WATCH.set(watch)
    try:
        yield
    finally:
        _WATCH.reset(token)
