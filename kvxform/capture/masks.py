"""Recognise attention masks by their values.

A mask, however it is built, is evaluated at several lengths and must come out as causal or as a
sliding window. Sizes that a short probe cannot reach, such as a window of 4096, are numbers in the
graph: each is replaced by small ones, and the mask must follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kvxform.capture.probing import Prober, Setting
from kvxform.capture.structure import ancestors, literals
from kvxform.ir.scoring import Span

MASKED = -1e4  # scores this low or lower are masked; GPT-2 used -1e4, others the smallest float
_LENGTHS = (9, 5)
_LARGEST_TABLE = 4096
_LARGEST_NUMBER = 1 << 31


@dataclass(frozen=True)
class MaskKind:
    """What a query may see: `causal`, and `window` tokens back or None."""

    causal: bool
    window: int | None = None


Evaluate = Callable[[Setting, dict[int, int]], Tensor]


def classify(prober: Prober, evaluate: Evaluate, sources: Sequence[fx.Node]) -> MaskKind | str:
    """Return the kind of a mask, or why it has none.

    Args:
        prober: For the weights.
        evaluate: Returns the additive mask, broadcastable to `[B, H, S, S]`, in a setting; numbers
            in the graph that are keys of its second argument are replaced.
        sources: Nodes that the mask is computed from.
    """
    nodes = ancestors(sources)
    kind = _kind_at(evaluate, Setting.first(_LENGTHS[0], batch=2), {})
    if isinstance(kind, str):
        return kind
    for length in (*_LENGTHS[1:], *_table_lengths(prober, nodes)):
        other = _kind_at(evaluate, Setting.first(length), {})
        if isinstance(other, str):
            return f"{other} (at length {length})"
        if length > _LENGTHS[0] and other.window is not None:
            kind = other if kind.window is None else kind
        if other.causal != kind.causal or not _same_window(kind, other, length):
            return f"the mask is {kind} at length {_LENGTHS[0]} and {other} at {length}"
    return _follow_numbers(evaluate, nodes, kind)


def _same_window(kind: MaskKind, other: MaskKind, length: int) -> bool:
    if kind.window is None or kind.window >= length:
        return other.window is None
    return other.window == kind.window


def _table_lengths(prober: Prober, nodes: Sequence[fx.Node]) -> list[int]:
    """Return the lengths of constant square tables, the longest that a mask can be asked for."""
    shapes = [prober.weights[str(n.target)].shape for n in nodes if n.op == "get_attr"]
    sizes = {s[-1] for s in shapes if len(s) >= 2 and s[-1] == s[-2] and s[-1] > _LENGTHS[0]}
    return sorted(min(size, _LARGEST_TABLE) for size in sizes)


def _follow_numbers(evaluate: Evaluate, nodes: Sequence[fx.Node], kind: MaskKind) -> MaskKind | str:
    """Replace every large number by small ones; the mask must stay or become a window of it."""
    setting = Setting.first(_LENGTHS[0])
    numbers = {n for _, n in literals(nodes, int) if _LENGTHS[0] <= n < _LARGEST_NUMBER}
    for number in sorted(numbers):
        try:
            found = [_kind_at(evaluate, setting, {number: small}) for small in (3, 5)]
        except RuntimeError:
            continue  # the number is the size of something
        if all(f == kind for f in found):
            continue
        windows = [f.window for f in found if isinstance(f, MaskKind) and f.causal == kind.causal]
        if len(windows) != 2 or None in windows or kind.window is not None:
            return f"the mask changes with the number {number} in a way that is not a window"
        offset = int(windows[0] or 0) - 3
        if windows[1] != 5 + offset:
            return f"the mask does not follow the number {number} as a window does"
        kind = MaskKind(kind.causal, number + offset)
    return kind


def _kind_at(evaluate: Evaluate, setting: Setting, numbers: dict[int, int]) -> MaskKind | str:
    mask = evaluate(setting, numbers)
    length = setting.length
    if mask.shape[-2:] != (length, length):
        return f"the mask has shape {tuple(mask.shape)} at length {length}"
    planes = mask.reshape(-1, length, length)
    seen = planes > MASKED
    if bool(planes[seen].any()):
        return "scores get a bias besides the mask"
    if not torch.equal(seen, seen[:1].expand_as(seen)):
        return "the mask differs between heads"
    return describe(seen[0])


def describe(seen: Tensor) -> MaskKind | str:
    """Return the kind of a mask `[S, S]`, True where a query (row) may see a key (column)."""
    length = seen.shape[0]
    if bool(seen.all()):
        return MaskKind(causal=False)
    window = int(seen[-1].sum())
    positions = torch.arange(length)[None]
    if torch.equal(seen, Span(window=window).sees(positions, positions)[0]):
        return MaskKind(causal=True, window=window if window < length else None)
    return "the mask is neither causal nor a sliding window"
