"""Both sides of a diff run on the same inputs: logits, and every layer, side by side.

The two runs wait for each other behind each layer, so of either no more than that layer is held.
Where two residual streams are in different bases, they are compared up to a rotation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from kvxform.diffing.caches import cache_lengths, shaped_error
from kvxform.diffing.layer_run import LayerRun
from kvxform.diffing.records import LayerDiff, LogitsDiff, NumericDiff
from kvxform.diffing.symptoms import CacheDiff
from kvxform.diffing.walking import Stop, WalkingModel
from kvxform.ir.program import Program
from kvxform.ir.rounding import rounding_dtype
from kvxform.verify.cache_state import is_lossy, rms_error
from kvxform.verify.probe import Probe, Reference, rewrite_probe
from kvxform.verify.protocols import ModelLike
from kvxform.verify.tolerances import Tolerance, tolerance_for

Runs = Callable[[Tensor], Tensor]  # ids `[B, S]` to logits `[B, S, vocab]`
Pairs = Sequence[tuple[int, int]]
PIECE = 32  # positions whose logits are compared at a time


def default_probe(a: ModelLike, b: ModelLike) -> Probe:
    """Return text that A wrote itself, as long as the caches of both need it.

    The third row is for pages that are used again, which one runtime does alike for both sides.
    """
    vocab = min(model.program.info.vocab_size for model in (a, b))
    is_same_runtime = isinstance(a, WalkingModel) and isinstance(b, WalkingModel)
    lengths = cache_lengths(a, b)[: 2 if is_same_runtime else 3]
    return rewrite_probe(WalkingModel(a.program), vocab, lengths, rewrites=1)


def compare_runs(
    a: ModelLike | Runs,
    b: ModelLike | Runs,
    probe: Probe,
    *,
    pairs: Pairs | None = None,
    caches: CacheDiff | None = None,
    words: str = "",
) -> NumericDiff:
    """Run both sides on a probe.

    Args:
        a: The first side. Something that only gives logits is compared by these alone.
        b: The second one.
        probe: What to run them on.
        pairs: Layers to compare, (layer of A, layer of B), both rising; by default those of the
            same index.
        caches: What `compare_caches` saw, if both have a cache.
        words: What the inputs are, if not a probe that A wrote.

    Returns:
        Layers are those of A.
    """
    inputs = words or f"text by A, rows of {', '.join(map(str, probe.lengths))} tokens"
    programs = [getattr(side, "program", None) for side in (a, b)]
    found = [program for program in programs if isinstance(program, Program)]
    tolerance = _tolerance(found)
    cached = CacheDiff() if caches is None else caches
    layers: tuple[LayerDiff, ...] = ()
    if len(found) == 2:
        both = _Both(found[0], found[1], probe, pairs)
        layers, logits = both.layers(cached), both.logits
    logits = [
        logits[i] if len(found) == 2 and isinstance(side, WalkingModel) else side(probe.input_ids)
        for i, side in enumerate((a, b))
    ]
    return NumericDiff(
        inputs,
        compare_logits(logits[0], logits[1], probe),
        tolerance.logits,
        layers,
        next((layer.layer for layer in layers if _parts(layer, tolerance)), None),
        cached.schedules,
        cached.complaints,
        kl_tolerance=_kl_tolerance(found, tolerance),
        symptoms=cached.symptoms,
    )


def compare_logits(a: Tensor, b: Tensor, probe: Probe) -> LogitsDiff | None:
    """Compare logits `[B, S, vocab]` over the positions that count; None for other vocabularies."""
    if a.shape != b.shape:
        return None
    real = probe.real
    pairs = list(zip(a[real].split(PIECE), b[real].split(PIECE), strict=True))
    found = [Reference(x.cpu()).compare(Reference(y.cpu())) for x, y in pairs]
    shares = [len(x) / int(real.sum()) for x, _ in pairs]
    largest = max(d.max_abs for d in found)
    return LogitsDiff(
        max_abs=largest,
        relative=largest / max(*(d.scale for d in found), 1e-30),
        kl=sum(share * d.kl for share, d in zip(shares, found, strict=True)),
        top1=sum(share * d.top1 for share, d in zip(shares, found, strict=True)),
    )


class _Both:
    """Two programs run in step.

    Attributes:
        logits: Of both, once `layers` has run.
    """

    def __init__(self, a: Program, b: Program, probe: Probe, pairs: Pairs | None) -> None:
        self._runs = LayerRun(a, probe), LayerRun(b, probe)
        self._real = probe.real
        known = [{site.layer for site in program.sites} for program in (a, b)]
        equal = [(layer, layer) for layer in sorted(known[0] & known[1])]
        self._pairs = equal if pairs is None else sorted(pairs)
        self._is_turned = a.facts["residual.basis"] != b.facts["residual.basis"]
        self._is_cached = a.plan is not None and b.plan is not None
        self.logits: list[Tensor] = []

    def layers(self, caches: CacheDiff) -> tuple[LayerDiff, ...]:
        """Run both and return the error of every layer.

        Args:
            caches: Errors of caches, used where both have one.
        """
        hidden = self._hidden()
        known = {layer.layer: layer for layer in caches.layers}
        found = []
        for layer, other in self._pairs:
            errors = known.get(layer)
            if errors is None:
                errors = self._operands(layer, other)
            found.append(
                LayerDiff(layer, hidden.get(layer), errors.key, errors.value, errors.codes)
            )
        return tuple(found)

    def _hidden(self) -> dict[int, float | None]:
        ends = [run.layers for run in self._runs]
        runs = [run.stops() for run in self._runs]
        found: dict[int, float | None] = {}
        for layer, other in self._pairs:
            if layer in ends[0] and other in ends[1]:
                x, y = (
                    next(stop for stop in stops if stop.layer == wanted).value
                    for stops, wanted in zip(runs, (layer, other), strict=True)
                )
                found[layer] = self._error(x, y)
                del x, y
        self.logits = [_last(stops) for stops in runs]
        return found

    def _error(self, x: Tensor, y: Tensor) -> float | None:
        if x.shape != y.shape:
            return None
        a, b = x[self._real].double().cpu(), y[self._real].double().cpu()
        return turned_error(a, b) if self._is_turned else rms_error([b], [a])

    def _operands(self, layer: int, other: int) -> LayerDiff:
        """Compare the K and V of this run, where one side has no cache."""
        mine, theirs = (run.logical(n) for run, n in zip(self._runs, (layer, other), strict=True))
        key, value = (
            shaped_error([pair[i] for pair in theirs], [pair[i] for pair in mine]) for i in (0, 1)
        )
        return LayerDiff(layer, None, key, value)


def turned_error(x: Tensor, y: Tensor) -> float:
    """Return how far `y` is from `x` `[n, width]`, both float64, once `x` is turned to fit best.

    With x^T = A R and y^T = B T (A, B orthonormal), and R T^T = U S V^T, the best turn takes x to
    R^T U V^T B^T, so that the triangular factors say all.

    Source: Schoenemann, A generalized solution of the orthogonal Procrustes problem, 1966.
    """
    r, t = (torch.linalg.qr(m.T, mode="r").R for m in (x, y))
    u, _, vh = torch.linalg.svd(r @ t.T)
    rest = float((r.T @ u @ vh - t.T).square().sum())
    return math.sqrt(rest / max(float(x.square().sum()), 1e-30))


def _tolerance(programs: Sequence[Program]) -> Tolerance:
    """Return the tolerance of the finer of both sides, float32 where none tells."""
    dtypes = [rounding_dtype(program) for program in programs]
    finest = min(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
    return tolerance_for(finest)


def _kl_tolerance(programs: Sequence[Program], tolerance: Tolerance) -> float:
    plans = [(p.plan, p.dtype) for p in programs]
    lossy = any(plan is not None and is_lossy(plan, dtype) for plan, dtype in plans)
    return tolerance.lossy_kl if lossy else 0.0


def _parts(layer: LayerDiff, tolerance: Tolerance) -> bool:
    """Whether a layer differs by more than rounding."""
    errors = [error for error in (layer.hidden, layer.key, layer.value) if error is not None]
    return any(not error <= tolerance.inputs for error in errors)


def _last(stops: Iterator[Stop]) -> Tensor:
    *_, last = stops
    value: Tensor = last.value
    return value
