"""Recognise attention masks by their values.

A mask, however it is built, is evaluated at several lengths and must come out as causal, as a
sliding window or as chunks. Sizes that a short probe cannot reach, such as a window of 4096, are
numbers in the graph: each is replaced by small ones, and the mask must follow. What is added to
the scores that are seen must be a slope times the distance (ALiBi), up to a constant per row,
which a softmax does not see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from kvxform.capture.probing import Prober, Setting, is_close
from kvxform.capture.structure import ancestors, literals
from kvxform.ir.scoring import Span

MASKED = -1e4  # scores this low or lower are masked; GPT-2 used -1e4, others the smallest float
_LENGTHS = (9, 5)
_LARGEST_TABLE = 4096
_LARGEST_NUMBER = 1 << 31
_SMALL = (3, 5)  # what large numbers are replaced by


@dataclass(frozen=True)
class MaskKind:
    """What a query may see, and what is added to its scores.

    Attributes:
        causal: Whether a query sees nothing after itself.
        window: Tokens back that it sees, itself included, or None.
        chunk: Length of chunks that see only themselves, or None.
        slopes: ALiBi slopes, one per head or one for all, or None; not part of equality.
    """

    causal: bool
    window: int | None = None
    chunk: int | None = None
    slopes: Tensor | None = field(default=None, compare=False)

    @property
    def limit(self) -> tuple[str, int] | None:
        """The window or chunk with its name, or None."""
        for name in ("window", "chunk"):
            size = getattr(self, name)
            if size is not None:
                return name, size
        return None

    def __str__(self) -> str:
        """Return words: `a window of 3`."""
        plain = "causal" if self.causal else "bidirectional"
        return plain if self.limit is None else "a {} of {}".format(*self.limit)


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
        if length > _LENGTHS[0] and kind.limit is None:
            kind = replace(kind, window=other.window, chunk=other.chunk)
        if other.causal != kind.causal or not _same_limit(kind, other, length):
            return f"the mask is {kind} at length {_LENGTHS[0]} and {other} at {length}"
        if not _same_slopes(kind.slopes, other.slopes):
            return f"the bias of scores has other slopes at length {length}"
    return _follow_numbers(evaluate, nodes, kind)


def _same_limit(kind: MaskKind, other: MaskKind, length: int) -> bool:
    if kind.limit is None or kind.limit[1] >= length:
        return other.limit is None
    return other.limit == kind.limit


def _same_slopes(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return is_close(b, a)


def _table_lengths(prober: Prober, nodes: Sequence[fx.Node]) -> list[int]:
    """Return the lengths of constant square tables, the longest that a mask can be asked for."""
    shapes = [prober.weights[str(n.target)].shape for n in nodes if n.op == "get_attr"]
    sizes = {s[-1] for s in shapes if len(s) >= 2 and s[-1] == s[-2] and s[-1] > _LENGTHS[0]}
    return sorted(min(size, _LARGEST_TABLE) for size in sizes)


def _follow_numbers(evaluate: Evaluate, nodes: Sequence[fx.Node], kind: MaskKind) -> MaskKind | str:
    """Replace every large number by small ones; the mask must stay or get a limit of that size."""
    setting = Setting.first(_LENGTHS[0])
    numbers = {n for _, n in literals(nodes, int) if _LENGTHS[0] <= n < _LARGEST_NUMBER}
    for number in sorted(numbers):
        try:
            found = [_kind_at(evaluate, setting, {number: small}) for small in _SMALL]
        except RuntimeError:
            continue  # the number is the size of something
        if all(f == kind for f in found):
            continue
        limits = [
            f.limit
            for f in found
            if isinstance(f, MaskKind) and f.causal == kind.causal and f.limit is not None
        ]
        if len(limits) != len(_SMALL) or kind.limit is not None:
            return (
                f"the mask changes with the number {number} in a way that is neither a window "
                "nor chunks"
            )
        (name, size), (other, second) = limits
        offset = size - _SMALL[0]
        if other != name or second != _SMALL[1] + offset:
            return f"the mask does not follow the number {number} as a {name} does"
        kind = replace(kind, **{name: number + offset})
    return kind


def _kind_at(evaluate: Evaluate, setting: Setting, numbers: dict[int, int]) -> MaskKind | str:
    mask = evaluate(setting, numbers)
    length = setting.length
    if mask.shape[-2:] != (length, length):
        return f"the mask has shape {tuple(mask.shape)} at length {length}"
    planes = mask.reshape(-1, length, length)
    seen = planes > MASKED
    if not torch.equal(seen, seen[:1].expand_as(seen)):
        return "the mask differs between heads"
    kind = describe(seen[0])
    if isinstance(kind, str):
        return kind
    slopes = measure_slopes(planes, seen[0])
    if slopes is None or isinstance(slopes, str):
        return kind if slopes is None else slopes
    heads = _per_head(slopes, mask.shape[:-2], setting.batch)
    return "the bias differs between rows" if heads is None else replace(kind, slopes=heads)


def describe(seen: Tensor) -> MaskKind | str:
    """Return the kind of a mask `[S, S]`, True where a query (row) may see a key (column)."""
    length = seen.shape[0]
    if bool(seen.all()):
        return MaskKind(causal=False)
    positions = torch.arange(length, device=seen.device)[None]
    blind = (~seen[:, 0]).nonzero().flatten()  # queries that do not see the first key
    size = int(blind[0]) if blind.numel() else None
    for window, chunk in ((size, None), (None, size)):
        if size != 0 and torch.equal(seen, Span(True, window, chunk).sees(positions, positions)[0]):
            return MaskKind(True, window, chunk)
    return "the mask is neither causal nor a sliding window nor chunks"


def measure_slopes(planes: Tensor, seen: Tensor) -> Tensor | str | None:
    """Return the ALiBi slopes `[planes]` of masks, None if nothing is added, or why there are none.

    Source: arXiv 2108.12409; the score of key p from query t gets `slope * (p - t)`.

    Args:
        planes: Additive masks `[planes, S, S]`.
        seen: Which scores are seen, bool `[S, S]`, the diagonal among them.
    """
    added = planes - planes.diagonal(dim1=1, dim2=2)[..., None]
    where = torch.arange(seen.shape[0], device=seen.device)
    distance = where - where[:, None]  # p - t
    if not bool(added[:, seen].any()):
        return None
    farthest = int(torch.where(seen, -distance, 0).argmax())
    slopes = added.flatten(1)[:, farthest] / distance.flatten()[farthest]
    want = slopes[:, None, None] * distance
    if not bool(torch.isfinite(slopes).all()) or not is_close(added[:, seen], want[:, seen]):
        return "scores get a bias besides the mask that is not a slope times the distance"
    return slopes


def _per_head(slopes: Tensor, leading: Sequence[int], batch: int) -> Tensor | None:
    """Return slopes `[H]`, or `[1]` if all are equal; None if they differ between rows.

    Args:
        slopes: One per plane.
        leading: Axes of the planes: `[B, H]`, `[B * H]`, `[H]` or less.
        batch: B.
    """
    if torch.equal(slopes, slopes[:1].expand_as(slopes)):
        return slopes[:1]
    is_batched = leading[0] == batch if len(leading) > 1 else slopes.numel() % batch == 0
    rows = slopes.view(batch if is_batched else 1, -1)
    return rows[0] if torch.equal(rows, rows[:1].expand_as(rows)) else None
