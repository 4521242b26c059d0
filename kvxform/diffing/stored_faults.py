"""How what one layer holds differs from what it should hold: whole tokens, pages, or planes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvxform.diffing.symptoms import Symptom, SymptomKind
from kvxform.ir.plan import CachePlan
from kvxform.ir.stream_plan import StreamPlan
from kvxform.verify.replay import Replay

Planes = Mapping[str, Mapping[str, Tensor]]
STREAMS = ("key", "value")
MOST_PAGES = 4  # that are named
CONSTANT = 0.05  # spread of a shift or a factor, as a share of it, that still counts as constant


@dataclass(frozen=True, eq=False)
class Holding:
    """What one layer of a session holds.

    Attributes:
        decoded: K and V of each live row by stream, `[Hk, T, D]`, as the source would hold them.
        planes: Encoded tokens of each live row, by stream and plane, `[heads, rows, width]`.
    """

    decoded: Mapping[int, Mapping[str, Tensor]]
    planes: Mapping[int, Planes]

    @classmethod
    def of(cls, replay: Replay, layer: int) -> Holding:
        """Read a layer of a session."""
        rows, logical = sorted(replay.rows), replay.session.logical_cache(layer)
        if len(logical.k) != len(rows):
            return cls({}, {})  # lengths are told elsewhere
        pairs = zip(logical.k, logical.v, strict=True)
        decoded = {
            row: dict(zip(STREAMS, pair, strict=True))
            for row, pair in zip(rows, pairs, strict=True)
        }
        planes = dict(zip(rows, replay.session.stored_planes(layer), strict=True))
        return cls(decoded, planes)


def find_stored(
    layer: int, got: Holding, expected: Mapping[int, Holding], plan: CachePlan, tolerance: float
) -> list[Symptom]:
    """Return symptoms of what a layer of B holds.

    Args:
        layer: Layer of A that it should be like.
        got: What it holds.
        expected: What every layer of A holds.
        plan: Plan of A.
        tolerance: Largest difference of a value, as a share of the largest value, that is rounding.
    """
    wanted, site, found = expected[layer], plan.site(layer), []
    for stream in STREAMS:
        pairs = {
            row: (got.decoded[row][stream], wanted.decoded[row][stream])
            for row in wanted.decoded
            if row in got.decoded
        }
        if any(x.shape != y.shape for x, y in pairs.values()):
            continue  # lengths and heads are told elsewhere
        wrong = {
            row: tokens
            for row, (x, y) in pairs.items()
            if len(tokens := _wrong_tokens(x, y, tolerance))
        }
        if not wrong:
            continue
        owner = _owner(layer, stream, got, expected, tolerance)
        if owner is not None:
            what = f"holds what layer {owner} should hold"
            found.append(Symptom("owner", layer, stream, "", what, float(owner)))
            continue
        rule = site.streams.get(stream, site.key)
        size = plan.layout.page_size if plan.layout.kind == "paged" else 0
        found += _Stream(layer, stream, rule, size, pairs, wrong, tolerance).symptoms(got, wanted)
    return found


def _owner(
    layer: int, stream: str, got: Holding, expected: Mapping[int, Holding], tolerance: float
) -> int | None:
    """Return the other layer of A whose tokens these are."""
    for other, holding in expected.items():
        pairs = [
            (got.decoded[row][stream], holding.decoded[row][stream])
            for row in holding.decoded
            if row in got.decoded
        ]
        if other != layer and all(
            x.shape == y.shape and not len(_wrong_tokens(x, y, tolerance)) for x, y in pairs
        ):
            return other
    return None


@dataclass(frozen=True, eq=False)
class _Stream:
    """One stream of one layer whose tokens are not what they should be."""

    layer: int
    stream: str
    rule: StreamPlan
    page_size: int
    pairs: Mapping[int, tuple[Tensor, Tensor]]
    wrong: Mapping[int, Tensor]
    tolerance: float

    def symptoms(self, got: Holding, wanted: Holding) -> list[Symptom]:
        """Return what is the matter with it; most telling first."""
        pages = self._pages()
        if pages:
            return [self._symptom("page-order", pages)]
        order = self._order()
        if order:
            return [self._symptom("token-order", order)]
        region = self._region()
        if region is not None:
            return [region]
        planes = [
            symptom
            for name in self._plane_names(got, wanted)
            for symptom in self._plane(name, got, wanted)
        ]
        if planes:
            return planes
        row, tokens = next(iter(self.wrong.items()))
        is_equal = self._plane_names(got, wanted) != []
        what = f"{len(tokens)} tokens of row {row}, the first at {int(tokens[0])}"
        return [self._symptom("decoded" if is_equal else "state", what)]

    def _symptom(
        self, kind: SymptomKind, what: str, plane: str = "", value: float = 0.0
    ) -> Symptom:
        rows = tuple(self.wrong) if len(self.wrong) < len(self.pairs) else ()
        return Symptom(kind, self.layer, self.stream, plane, what, value, rows)

    def _pages(self) -> str:
        """Say which full pages have changed places, within a row or between rows."""
        if not self.page_size:
            return ""
        first = self.rule.regions.sink
        expected, changed = {}, {}
        for row, (x, y) in self.pairs.items():
            body = self.rule.body_tokens(x.shape[1])
            for page in range(body // self.page_size):
                run = slice(first + page * self.page_size, first + (page + 1) * self.page_size)
                expected[row, page] = y[:, run]
                if len(_wrong_tokens(x[:, run], y[:, run], self.tolerance)):
                    changed[row, page] = x[:, run]
        places = []
        for place, x in changed.items():
            source = next(
                (
                    p
                    for p, y in expected.items()
                    if p != place and not len(_wrong_tokens(x, y, self.tolerance))
                ),
                None,
            )
            if source is not None:
                places.append(
                    f"page {place[1]} of row {place[0]} holds page {source[1]} of row {source[0]}"
                )
        more = [f"{len(places) - MOST_PAGES} more"] if len(places) > MOST_PAGES else []
        return "; ".join(places[:MOST_PAGES] + more)

    def _order(self) -> str:
        """Say by how many places tokens have moved, if that explains all that are wrong."""
        shifts = set()
        for row, tokens in self.wrong.items():
            x, y = self.pairs[row]
            places = []
            for token in tokens.tolist():
                same = ~_token_errors(x[:, token : token + 1], y, self.tolerance)
                if not bool(same.any()):
                    return ""
                places.append(int(same.nonzero()[0, 0]) - token)
            shifts |= set(places)
        if len(shifts) == 1:
            return f"tokens come from {shifts.pop():+d} places away"
        return f"{sum(map(len, self.wrong.values()))} tokens have changed places"

    def _region(self) -> Symptom | None:
        """Say if only tokens of one exact region are wrong."""
        sink = self.rule.regions.sink
        if sink and all(int(tokens.max()) < sink for tokens in self.wrong.values()):
            return self._symptom("sink", f"only the first {sink} tokens, which were to stay exact")
        ends = {
            row: sink + self.rule.body_tokens(self.pairs[row][0].shape[1]) for row in self.wrong
        }
        if all(int(tokens.min()) >= ends[row] for row, tokens in self.wrong.items()):
            return self._symptom("recent", "only the last tokens, which are not encoded yet")
        return None

    def _plane_names(self, got: Holding, wanted: Holding) -> list[str]:
        """Return planes that both sides have with equal shapes in all rows."""
        rows = [row for row in self.wrong if row in got.planes and row in wanted.planes]
        if not rows:
            return []
        mine = [got.planes[row].get(self.stream, {}) for row in rows]
        theirs = [wanted.planes[row].get(self.stream, {}) for row in rows]
        return [
            name
            for name in theirs[0]
            if all(
                name in x and name in y and x[name].shape == y[name].shape
                for x, y in zip(mine, theirs, strict=True)
            )
        ]

    def _plane(self, name: str, got: Holding, wanted: Holding) -> list[Symptom]:
        pairs = [
            (got.planes[row][self.stream][name], wanted.planes[row][self.stream][name])
            for row in self.wrong
        ]
        x = torch.cat([a.double().flatten(1).cpu() for a, _ in pairs], 1)  # [heads, values]
        y = torch.cat([b.double().flatten(1).cpu() for _, b in pairs], 1)
        wrong = x != y
        if not bool(wrong.any()):
            return []
        heads = wrong.any(1).nonzero()[:, 0].tolist()
        where = "" if len(heads) == x.shape[0] else f" in head {', '.join(map(str, heads))}"
        if name == "codes":
            share = float(wrong.double().mean())
            return [self._symptom("codes", f"{share:.0%} of codes differ{where}", name, share)]
        kind, what, value = _change_of(x[wrong], y[wrong])
        return [self._symptom(kind, what + where, name, value)]


def _change_of(x: Tensor, y: Tensor) -> tuple[SymptomKind, str, float]:
    """Return how the values `x` of a plane came from `y`, in words and as a number."""
    if len(x.unique()) == 1 and len(y.unique()) > 1:
        return "plane-scaled", f"every value is {float(x[0]):g}", 0.0
    shift = x - y
    mean = float(shift.mean())
    if float((shift - mean).abs().max()) <= CONSTANT * abs(mean):
        return "plane-shifted", f"shifted by {mean:g}", mean
    ratio = (x / y)[y != 0]
    factor = float(ratio.median()) if len(ratio) else 0.0
    if len(ratio) and float((ratio - factor).abs().max()) <= CONSTANT * abs(factor):
        return "plane-scaled", f"times {factor:.3g}", factor
    return "plane", f"{len(x)} values differ", 0.0


def same_values(x: Tensor, y: Tensor) -> bool:
    """Whether two planes are the same, bit for bit; a NaN is like itself."""
    return x.shape == y.shape and torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def _wrong_tokens(x: Tensor, y: Tensor, tolerance: float) -> Tensor:
    """Return indices of tokens of `[Hk, T, D]` that differ by more than rounding."""
    return _token_errors(x, y, tolerance).nonzero()[:, 0]


def _token_errors(x: Tensor, y: Tensor, tolerance: float) -> Tensor:
    """Return which tokens of `[Hk, T, D]` differ, bool `[T]`; either may have one token alone."""
    x, y = x.double(), y.to(x.device).double()
    if not x.numel():
        return torch.zeros(y.shape[1], dtype=torch.bool)
    scale = y.abs().max().clamp_min(1e-30)
    return ~((x - y).abs().amax((0, 2)) <= tolerance * scale)
