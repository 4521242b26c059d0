"""Recognise rotary embedding by what it does to chosen vectors.

A candidate region is run on single channels to see which are paired, then on `a = 1, b = 0` in
every pair, which gives cosine and sine at many positions at once. The frequencies follow: from
position 1, sharpened at powers of two (exact in floating point). `kvx::rope` with them must then
equal the region on random input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.capture.heads import HeadMap, from_rows, num_features
from kvxform.capture.probing import TOLERANCE, Prober, Setting, error, is_close
from kvxform.capture.structure import ancestors, literals, tensor_type
from kvxform.capture.weights import add_weight

_ADDED = "inv_freq"  # prefix of weights that capture adds
_FREE_POSITIONS = (0, 1, 2, 3, 4, 7, 8, 16, 64, 256, 1000, 1024, 4096)
_LIMITS = (8192, 2048, 1024, 512, 256, 128, 64, 32, 16, 9)  # tried in turn
_FAR = 1 << 20  # a position that no switch of frequencies lies beyond
_LONGEST = 512  # tokens, where positions cannot be chosen


@dataclass(frozen=True)
class Rotary:
    """A proven rotary embedding.

    Attributes:
        inv_freq: Key of the frequencies in the weights; its dtype is that of the angles.
        rotary_dim: Channels that rotate.
        interleaved: Whether neighbours are pairs, rather than halves.
        scaling: Factor of cosine and sine.
        factor: Factor of the whole operand that is left to the scale of the scores.
        compute_dtype: Dtype of the arithmetic, if it is not that of the anchor.
    """

    inv_freq: str
    rotary_dim: int
    interleaved: bool
    scaling: float
    factor: float
    compute_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Pairs:
    """Which channels turn together."""

    rotary_dim: int
    interleaved: bool

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first and second channels of all pairs."""
        turned = x[..., : self.rotary_dim]
        if self.interleaved:
            return turned[..., 0::2], turned[..., 1::2]
        first, second = turned.chunk(2, -1)
        return first, second

    def first_channels(self, head_dim: int) -> Tensor:
        """Return a vector `[head_dim]` that is 1 on the first channel of every pair."""
        x = torch.zeros(head_dim, dtype=torch.float64)
        self.split(x)[0].fill_(1.0)
        return x


class RopeProbe:
    """Runs the region between an anchor and an operand on chosen head vectors."""

    def __init__(self, prober: Prober, operand: fx.Node, heads: HeadMap) -> None:
        self.prober, self.operand, self.heads = prober, operand, heads
        type_ = tensor_type(heads.anchor)
        assert type_ is not None
        self.dtype = type_.dtype
        self.out_dtype: torch.dtype = operand.meta["type"].dtype
        self.head_dim = heads.index.shape[1]
        self.precision = max(1e-5, torch.finfo(self.dtype).eps)

    def apply(self, x: Tensor, setting: Setting) -> Tensor:
        """Return the operand `[B, H, S, D]` when every head of the anchor is `x` `[..., D]`."""
        x = x.to(self.dtype).expand(setting.batch, setting.length, self.head_dim)
        rows = torch.zeros(*x.shape[:2], num_features(self.heads.anchor), dtype=self.dtype)
        for head in self.heads.index:
            rows[..., head] = x
        bound = {self.heads.anchor: from_rows(self.heads.anchor, rows)}
        return self._run(setting, bound)

    def apply_random(self, setting: Setting) -> tuple[Tensor, Tensor]:
        """Return random head vectors `[B, H, S, D]` and the operand they give."""
        shape = (setting.batch, setting.length, num_features(self.heads.anchor))
        rows = self.prober.random(*shape, dtype=self.dtype)
        bound = {self.heads.anchor: from_rows(self.heads.anchor, rows)}
        return rows[..., self.heads.index].transpose(1, 2), self._run(setting, bound)

    def _run(self, setting: Setting, bound: dict[fx.Node, Tensor]) -> Tensor:
        (value,) = self.prober.run([self.operand], setting, bound)
        assert isinstance(value, Tensor)
        return value

    def find_setting(self) -> Setting | None:
        """Return the longest setting that works; positions are free if `position_ids` are read."""
        leaves = self.prober.leaves(self.heads.region)
        is_free = any(n.target == "position_ids" for n in ancestors(leaves))
        for limit in _LIMITS:
            chosen = tuple(p for p in _FREE_POSITIONS if p < limit)
            setting = Setting(1, chosen) if is_free else Setting.first(min(limit, _LONGEST))
            try:
                self.prober.remember(self.heads.region, setting)
                self.apply(torch.ones(self.head_dim), setting)
            except (RuntimeError, IndexError):
                continue  # longer than a table of the model
            return setting
        return None

    def depends_on_length(self) -> bool:
        """Return whether the first tokens are turned differently in a longer sequence."""
        first = Setting.first(4)
        values = []
        for setting in (first, Setting(1, (*first.positions, _FAR))):
            try:
                self.prober.remember(self.heads.region, setting)
                values.append(self.apply(torch.ones(self.head_dim), setting)[:, :, : first.length])
            except (RuntimeError, IndexError):
                return False  # longer than a table of the model, whose rows are what they are
        return not is_close(values[1], values[0])


def find_rope(probe: RopeProbe) -> Rotary | str:
    """Return the rotary embedding that the region computes, or why it is none."""
    setting = probe.find_setting()
    if setting is None:
        return "it cannot be run on nine positions"
    if probe.depends_on_length():
        return "its frequencies depend on the length of the sequence"
    pairs = find_pairs(probe, setting)
    if pairs is None:
        return "no channel turns with the position"
    y = probe.apply(pairs.first_channels(probe.head_dim), setting)[0, 0].double()  # [S, D]
    cos, sin = pairs.split(y)
    length = (cos.square() + sin.square()).sqrt()
    factor = float(probe.heads.factor[-1]) if pairs.rotary_dim < probe.head_dim else None
    total = _exact(float(length.median()), probe)
    if float((length - total).abs().max()) > 10 * probe.precision * total:
        return "cosine and sine do not lie on one circle"
    frequencies = fit_frequencies(torch.atan2(sin, cos), setting.positions)
    scaling, rest = (total, 1.0) if factor is None else (_exact(total / factor, probe), factor)
    guess = Rotary("", pairs.rotary_dim, pairs.interleaved, scaling, rest)
    return prove_rope(probe, setting, guess, frequencies)


def find_pairs(probe: RopeProbe, setting: Setting) -> Pairs | None:
    """Return which channels turn together, from what single channels turn into."""
    head_dim = probe.head_dim
    partner = _partner(probe, 0, setting)
    if partner is None:
        return None
    if partner == 1 and head_dim > 2 and _partner(probe, 2, setting) == 3:
        full = Pairs(head_dim - head_dim % 2, interleaved=True)
        y = probe.apply(full.first_channels(head_dim), setting)[0, 0]
        turning = full.split(y)[1].abs().amax(0).nonzero().flatten()
        return Pairs(2 * (int(turning[-1]) + 1), interleaved=True)
    return Pairs(2 * partner, interleaved=False) if 2 * partner <= head_dim else None


def _partner(probe: RopeProbe, channel: int, setting: Setting) -> int | None:
    x = torch.zeros(probe.head_dim, dtype=torch.float64)
    x[channel] = 1.0
    y = probe.apply(x, setting)[0, 0].abs().amax(0)
    y[channel] = 0.0
    found = y.nonzero().flatten()
    return int(found[0]) if found.numel() == 1 else None


def fit_frequencies(angles: Tensor, positions: tuple[int, ...]) -> Tensor:
    """Return the angle per position, float64 `[pairs]`.

    Args:
        angles: `[S, pairs]`, known only up to full turns.
        positions: The S positions, ascending, with 1 among them.
    """
    theta = angles[positions.index(1)].clone()
    for row, position in enumerate(positions):
        if position > 1 and position & (position - 1) == 0:
            rest = angles[row] - position * theta
            theta += torch.remainder(rest + math.pi, 2 * math.pi).sub(math.pi) / position
    return theta


def prove_rope(
    probe: RopeProbe, setting: Setting, guess: Rotary, frequencies: Tensor
) -> Rotary | str:
    """Return `guess` with frequencies for which `kvx::rope` equals the region, else why not.

    Frequencies found for another operand are taken if they fit; else those of the model or the
    measured ones, whichever have the smallest error on random input.
    """
    tolerances = [
        TOLERANCE.get(dtype, TOLERANCE[torch.float32]) for dtype in (probe.dtype, probe.out_dtype)
    ]
    best, best_error = ("", frequencies, guess), float("inf")
    for name, value in _candidates(probe, frequencies):
        for dtype in _compute_dtypes(probe):
            trial = replace(guess, compute_dtype=dtype)
            found = _error_of(probe, setting, trial, value)
            if found < best_error:
                best, best_error = (name, value, trial), found
        if best_error == 0.0 or (name.startswith(_ADDED) and best_error <= min(tolerances)):
            break
    if best_error > max(tolerances):
        return f"kvx::rope differs from it by {best_error:.1e}"
    name, value, guess = best
    name = name or add_weight(probe.prober.weights, _ADDED, value)
    return replace(guess, inv_freq=name)


def _compute_dtypes(probe: RopeProbe) -> list[torch.dtype | None]:
    """Return the dtypes that the region may compute in; None is that of its anchor."""
    types = [tensor_type(node) for node in probe.heads.region]
    inner = {t.dtype for t in types if t is not None and t.dtype.is_floating_point}
    return [None, *sorted(inner - {probe.dtype}, key=str)]


def _error_of(probe: RopeProbe, setting: Setting, guess: Rotary, inv_freq: Tensor) -> float:
    x, want = probe.apply_random(setting)
    got = kvx.rope(
        x.to(guess.compute_dtype or x.dtype),
        setting.position_ids(x.device),
        inv_freq,
        rotary_dim=guess.rotary_dim,
        attention_scaling=guess.scaling,
        interleaved=guess.interleaved,
    )
    return error((got * guess.factor).to(want.dtype), want)


def _candidates(probe: RopeProbe, frequencies: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield names and values: known constants, then those of the region, then measured ones.

    A value that is not yet a weight has an empty name.
    """
    weights = probe.prober.weights
    leaves = ancestors(probe.prober.leaves(probe.heads.region))
    own = [str(n.target) for n in leaves if n.op == "get_attr"]
    computed = [n for n in leaves if n.op == "call_function" and _is_row(n, frequencies.numel())]
    for name in [*(n for n in weights if n.startswith(_ADDED)), *own]:
        value = weights[name]
        if value.shape == frequencies.shape and value.is_floating_point():
            yield name, value
            yield "", value.float()  # many models compute angles in float32 whatever their dtype
    for node in computed:
        yield "", probe.prober.value(node, Setting.first(1)).flatten()
    yield "", frequencies.float()
    yield "", frequencies


def _is_row(node: fx.Node, size: int) -> bool:
    """Return whether a node is `size` floating-point numbers, whatever the sequence."""
    type_ = tensor_type(node)
    if type_ is None or not type_.dtype.is_floating_point:
        return False
    sizes = [n for n in type_.shape if n != 1]
    return sizes == [size]


def _exact(value: float, probe: RopeProbe) -> float:
    """Return the number in the graph that `value` was measured from, or 1, or `value`."""
    nodes = ancestors(probe.prober.leaves(probe.heads.region))
    numbers = {1.0, *(number for _, number in literals(nodes, float))}
    nearest = min(numbers, key=lambda n: abs(n - value))
    return nearest if abs(nearest - value) < probe.precision * value else value
