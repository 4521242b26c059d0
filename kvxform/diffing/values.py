"""What became of the values of one weight: permuted, scaled, negated, turned, or otherwise other.

Large weights are looked at in pieces of some rows, so that nothing wider than a piece is made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvxform.ir.text import format_ranges

PIECE = 1 << 20  # elements that are widened to float64 at a time
EXACT = 1e-6  # relative error up to which a factor or a length is met
NARROW = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
FEW = 8  # rows that are named one by one


@dataclass(frozen=True)
class ValueChange:
    """How the values of B differ from those of A; see `records.WeightChange`."""

    cause: str
    relative: float
    detail: str = ""


def compare_values(a: Tensor, b: Tensor) -> ValueChange | None:
    """Return what differs between two weights, or None if nothing does."""
    if a.shape != b.shape:
        return ValueChange("shape", math.inf, f"{list(a.shape)} -> {list(b.shape)}")
    if a.dtype == b.dtype and torch.equal(_bits(a), _bits(b)):
        return None
    x, y = _matrix(a), _matrix(b)
    sums = _Sums.of(x, y)
    if a.dtype != b.dtype:
        names = f"{_name(a)} -> {_name(b)}"
        eps = max(_eps(a), _eps(b))
        is_rounded = sums.relative <= eps
        return ValueChange("dtype" if is_rounded else "values", sums.relative, names)
    found = (
        _as_factor(sums, _eps(a))
        or _as_rounded(x, y, sums.relative)
        or _as_permutation(x, y, sums.relative)
    )
    return found or ValueChange("values", sums.relative, _describe(sums, x.shape))


def theta_of(inv_freq: Tensor) -> float | None:
    """Return the base of rotary frequencies `theta ** (-2 i / d)`, or None if they are others."""
    logs = inv_freq.double().log()
    if len(logs) < 2 or not bool(logs.isfinite().all()):
        return None
    step = (logs[-1] - logs[0]) / (len(logs) - 1)
    line = logs[0] + step * torch.arange(len(logs))
    if float(logs[0].abs()) > 1e-6 or float((logs - line).abs().max()) > 1e-4:
        return None
    return math.exp(-float(step) * len(logs))


@dataclass(frozen=True)
class _Sums:
    """Sums over two matrices x and y: of squares by row and by column, and of products."""

    x_rows: Tensor
    y_rows: Tensor
    products: Tensor
    gaps: Tensor  # squares of y - x by row
    column_products: Tensor
    x_columns: Tensor
    y_columns: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> _Sums:
        rows: list[list[Tensor]] = [[], [], [], []]
        columns = torch.zeros(3, x.shape[1], dtype=torch.float64)
        for piece in _pieces(x):
            p, q = x[piece].double(), y[piece].double()
            columns += torch.stack([(p * q).sum(0), p.square().sum(0), q.square().sum(0)])
            parts = (p.square(), q.square(), p * q, (q - p).square())
            for kept, part in zip(rows, parts, strict=True):
                kept.append(part.sum(1))
        joined = (torch.cat(part) if part else torch.zeros(0) for part in rows)
        return cls(*joined, *columns)

    @property
    def relative(self) -> float:
        """Root mean square of the difference over that of x; infinite where x is zero."""
        gap, size = float(self.gaps.sum()), float(self.x_rows.sum())
        if math.isnan(gap):
            return math.inf
        return math.sqrt(gap / size) if size else math.inf


def _as_factor(sums: _Sums, eps: float) -> ValueChange | None:
    """Return the change if y is x times one factor."""
    size, product, other = (float(s.sum()) for s in (sums.x_rows, sums.products, sums.y_rows))
    if not size or not other:
        return None
    factor = product / size
    rest = max(0.0, other - factor * product) / other
    if not rest <= max(EXACT, 4 * eps) ** 2 or abs(factor - 1.0) <= 4 * eps:
        return None
    if abs(factor + 1.0) <= 4 * eps:
        return ValueChange("negated", sums.relative)
    return ValueChange("scaled", sums.relative, f"by {factor:.6g}")


def _as_rounded(x: Tensor, y: Tensor, relative: float) -> ValueChange | None:
    """Return the change if y has the values of x, rounded to a narrower dtype."""
    for dtype in NARROW:
        pairs = ((x[piece].to(dtype).to(x.dtype), y[piece]) for piece in _pieces(x))
        if all(torch.equal(p, q) for p, q in pairs):
            name = str(dtype).removeprefix("torch.")
            return ValueChange("dtype", relative, f"values rounded to {name}")
    return None


def _as_permutation(x: Tensor, y: Tensor, relative: float) -> ValueChange | None:
    """Return the change if y has the rows or the columns of x in another order."""
    for cause, p, q in (("rows permuted", x, y), ("columns permuted", x.T, y.T)):
        if len(p) < 2:
            continue
        sources = _sources(p, q)
        if sources is not None:
            moved = [i for i, source in enumerate(sources) if i != source]
            return ValueChange(cause, relative, _moves(moved, sources))
    return None


def _sources(x: Tensor, y: Tensor) -> list[int] | None:
    """Return for each row of y which row of x it is, or None if it is none.

    Rows are found by a sum with fixed random weights, and then compared.
    """
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(x.shape[1], generator=generator, dtype=torch.float64) + 0.5
    keys = [
        torch.cat([(m[piece].double() * weights).sum(1) for piece in _pieces(m)]) for m in (x, y)
    ]
    orders = [torch.sort(key, stable=True) for key in keys]
    if not torch.allclose(orders[0].values, orders[1].values, rtol=1e-9):  # rounding of sums
        return None
    sources = torch.empty(len(x), dtype=torch.int64)
    sources[orders[1].indices] = orders[0].indices
    if any(not torch.equal(x[sources[piece]], y[piece]) for piece in _pieces(y)):
        return None
    found: list[int] = sources.tolist()
    return found


def _moves(moved: list[int], sources: list[int]) -> str:
    """Return which rows have moved: `3 and 7 exchanged`, `all of 64`."""
    if all(sources[sources[i]] == i for i in moved):
        lower = [i for i in moved if i < sources[i]]
        upper = [sources[i] for i in lower]
        if _is_run(lower) and _is_run(upper):
            return f"{format_ranges(lower)} and {format_ranges(upper)} exchanged"
    if len(moved) == len(sources):
        return f"all of {len(sources)}"
    return f"{format_ranges(moved) if len(moved) <= FEW else len(moved)} of {len(sources)}"


def _is_run(numbers: list[int]) -> bool:
    return all(b == a + 1 for a, b in itertools.pairwise(numbers))


def _describe(sums: _Sums, shape: torch.Size) -> str:
    """Return what can be said of values that are neither scaled nor permuted as a whole."""
    changed = (~(sums.gaps == 0)).nonzero().flatten().tolist()
    if len(changed) < shape[0]:
        listed = format_ranges(changed)
        if listed.count(",") >= FEW:
            return f"{len(changed)} rows of {shape[0]}"
        return f"row{'s' if len(changed) > 1 else ''} {listed} of {shape[0]}"
    if shape[1] > 1 and _is_factor(sums.products, sums.x_rows, sums.y_rows):
        return "each row by its own factor"
    if shape[0] > 1 and _is_factor(sums.column_products, sums.x_columns, sums.y_columns):
        return "each column by its own factor"
    if shape[1] > 1 and torch.allclose(sums.x_rows, sums.y_rows, rtol=1e-4):
        return "rows turned, their lengths kept"
    if shape[0] > 1 and torch.allclose(sums.x_columns, sums.y_columns, rtol=1e-4):
        return "columns turned, their lengths kept"
    return ""


def _is_factor(products: Tensor, x: Tensor, y: Tensor) -> bool:
    """Whether every vector of y is one of x times a number, by Cauchy and Schwarz."""
    return torch.allclose(products.square(), x * y, rtol=1e-5, atol=0.0)


def _matrix(x: Tensor) -> Tensor:
    """Return `[rows, columns]`: the last axis is the columns of all but vectors."""
    return x.reshape(-1, x.shape[-1]) if x.dim() > 1 else x.reshape(-1, 1)


def _pieces(x: Tensor) -> Iterator[slice]:
    step = max(1, PIECE // max(1, x.shape[1]))
    for start in range(0, len(x), step):
        yield slice(start, start + step)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _eps(x: Tensor) -> float:
    return torch.finfo(x.dtype).eps if x.dtype.is_floating_point else 0.0
