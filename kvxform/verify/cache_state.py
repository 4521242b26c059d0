"""The cache-state checker: runs a schedule and compares everything that a session shows.

Most bugs of caches leave the next logits nearly right and the state wrong. So the checker looks at
five things, each against what it must be:

1. K and V handed to the cache, against the source model. With a lossy cache only the first layer
   can be compared tightly: later layers see its error.
2. What attention returns, against the equations applied to the K and V of the same run.
3. The logical cache (un-paged, decoded, un-rotated), against the same equations.
4. Lengths, against the schedule, and bytes, against the arithmetic of the plan and page sharing.
5. Logits, against the source, or for a lossy cache against the same program in one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvxform.codecs.base import dtype_from_name, make_codec
from kvxform.codecs.exact import ExactCodec
from kvxform.errors import VerifyError
from kvxform.ir.cache import watch_caches
from kvxform.ir.plan import CachePlan
from kvxform.ir.stream_plan import StreamPlan
from kvxform.verify.probe import Difference, Probe, Reference, SourceRun
from kvxform.verify.protocols import ModelLike
from kvxform.verify.replay import Replay
from kvxform.verify.schedules import Schedule
from kvxform.verify.tolerances import Tolerance


@dataclass(frozen=True)
class LayerError:
    """Relative root mean square error of the cache of one layer against that of the source."""

    layer: int
    key: float
    value: float


@dataclass
class StateCheck:
    """What one schedule showed.

    Attributes:
        schedule: Its name.
        is_lossy: Whether the plan rounds K or V to less than the dtype of the model.
        input_error: Largest error of K and V handed in, and where it was; likewise below.
        read_error: Of attention outputs.
        state_error: Of the logical cache.
        complaints: Lengths or bytes that are wrong, as sentences.
        logits: By sequence and position, the logits `[vocab]` that came out.
        layers: Error of each layer at the end against the cache of the source.
    """

    schedule: str
    is_lossy: bool
    input_error: float = 0.0
    input_at: str = ""
    read_error: float = 0.0
    read_at: str = ""
    state_error: float = 0.0
    state_at: str = ""
    complaints: list[str] = field(default_factory=list)
    logits: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    layers: tuple[LayerError, ...] = ()

    def compare(self, reference: Tensor) -> Difference:
        """Compare the logits with those of all sequences and positions, `[sequences, S, vocab]`."""
        expected = torch.stack([reference[place] for place in self.logits])
        return Reference(expected).compare(Reference(torch.stack(list(self.logits.values()))))

    def require(self, tolerance: Tolerance, where: str) -> None:
        """Raise VerifyError KVX502 if the state was not what it must be."""
        if self.complaints:
            raise VerifyError("KVX502", self.complaints[0], where=where, at=self.schedule)
        for what, error, bound, at in (
            ("K and V handed to the cache", self.input_error, tolerance.inputs, self.input_at),
            ("the logical cache", self.state_error, tolerance.state, self.state_at),
            ("attention over the cache", self.read_error, tolerance.reads, self.read_at),
        ):
            if not error <= bound:
                raise VerifyError(
                    "KVX502",
                    f"{what} must agree with the reference to {bound:.0e}",
                    where=where,
                    got=f"{error:.2e}",
                    at=f"{self.schedule}, {at}",
                )


def is_lossy(plan: CachePlan, dtype: torch.dtype) -> bool:
    """Whether `plan` stores K or V of a model of `dtype` with less precision."""
    return any(_loses(st, dtype) for site in plan.owners for st in site.streams.values())


def _loses(stream: StreamPlan, dtype: torch.dtype) -> bool:
    codec = make_codec(stream.codec)
    stored = [dtype_from_name(codec.dtype)] if isinstance(codec, ExactCodec) else []
    if stream.regions.sink or stream.recent_capacity:
        stored.append(dtype_from_name(stream.regions.dtype))
    narrow = any(torch.promote_types(d, dtype) != d for d in stored)
    return narrow or not isinstance(codec, ExactCodec)


def check_schedule(
    model: ModelLike, schedule: Schedule, sequences: Probe, source: SourceRun, dtype: torch.dtype
) -> StateCheck:
    """Run `schedule` on a new session of `model` and compare its state after every action.

    Args:
        model: The cached model.
        schedule: What to do; its sequences are rows of `sequences`.
        sequences: Token ids.
        source: The source model on `sequences`.
        dtype: Compute dtype of the model.
    """
    run = _ScheduleRun(model, schedule, sequences, source, dtype)
    with torch.inference_mode(), watch_caches(run.shadow.watch):
        for action in schedule.actions:
            run.act(action)
            run.compare()
    run.check.read_error, run.check.read_at = run.shadow.read_error, run.shadow.read_at
    run.check.layers = run.layer_errors()
    return run.check


class _ScheduleRun(Replay):
    """A replay whose session is compared with what it must be after every action."""

    def __init__(
        self,
        model: ModelLike,
        schedule: Schedule,
        sequences: Probe,
        source: SourceRun,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(model, sequences)
        self.source = source
        self.check = StateCheck(schedule.name, is_lossy(self.plan, dtype), logits=self.logits)

    def compare(self) -> None:
        lengths = [self.rows[row][1] for row in sorted(self.rows)]
        got = list(self.session.sequence_lengths())
        if got != lengths:
            self.check.complaints.append(f"sequence lengths must be {lengths}, not {got}")
            return
        expected, held = self.expected_bytes(), self.session.cache_bytes()
        is_bound = self.plan.layout.kind == "checkpoint"  # a crop may leave less in the window
        if held > expected or (held < expected and not is_bound):
            self.check.complaints.append(f"the cache must hold {expected} bytes, not {held}")
        if is_bound:
            self._compare_recomputed()
            return
        appending = [site.layer for site in self.plan.appending]
        for site in self.plan.sites:
            logical = self.session.logical_cache(site.layer)
            for entry, row in enumerate(sorted(self.rows)):
                at = f"layer {site.layer}, row {row}"
                pair = (logical.k[entry], logical.v[entry])
                self._compare_state(pair, self.shadow.held(site.layer, row), at)
                is_near = site.layer == appending[0] or not self.check.is_lossy
                if site.layer in appending and is_near:
                    self._compare_inputs(site.layer, row, at)

    def _compare_recomputed(self) -> None:
        """Compare K and V that are computed anew with those of the source; no cache is watched."""
        for site in self.plan.owners:
            logical = self.session.logical_cache(site.layer)
            for entry, row in enumerate(sorted(self.rows)):
                pairs = zip(
                    (logical.k[entry], logical.v[entry]),
                    self._source_cache(site.layer, row),
                    strict=True,
                )
                error = max(_relative_error(got, wanted) for got, wanted in pairs)
                if not error <= self.check.input_error:
                    at = f"K and V of layer {site.layer}, row {row}"
                    self.check.input_error, self.check.input_at = error, at

    def _compare_state(
        self, got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], at: str
    ) -> None:
        for name, a, b in zip("KV", got, expected, strict=True):
            error = _relative_error(a, b)
            if not error <= self.check.state_error:
                self.check.state_error, self.check.state_at = error, f"{name} of {at}"

    def _compare_inputs(self, layer: int, row: int, at: str) -> None:
        references = dict(zip(("key", "value"), self._source_cache(layer, row), strict=True))
        for name, x in self.shadow.stored(layer, row).items():
            source = self.shadow.in_source(layer, name, x)
            error = _relative_error(source, references[name])
            if not error <= self.check.input_error:
                self.check.input_error, self.check.input_at = error, f"{name[0].upper()} of {at}"

    def _source_cache(self, layer: int, row: int) -> tuple[Tensor, Tensor]:
        sequence, seen = self.rows[row]
        site = self.plan.site(layer)
        keys, values = self.source.keys[layer], self.source.values[layer]
        if site.payload == "latent":
            keys = self.source.latents[layer]
            values = keys[..., : site.value.head_dim]
        return keys[sequence, :, :seen], values[sequence, :, :seen]

    def layer_errors(self) -> tuple[LayerError, ...]:
        errors = []
        for site in self.plan.owners:
            logical = self.session.logical_cache(site.layer)
            pairs = [self._source_cache(site.layer, row) for row in sorted(self.rows)]
            key = rms_error(logical.k, [k for k, _ in pairs])
            value = rms_error(logical.v, [v for _, v in pairs])
            errors.append(LayerError(site.layer, key, value))
        return tuple(errors)


def _relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest expected value; infinite if shapes differ."""
    if got.shape != expected.shape:
        return float("inf")
    worst = (got.double() - expected.double()).abs().max()
    return float(worst / expected.double().abs().max().clamp_min(1e-30))


def rms_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the root mean square of differences over that of `expected`; shapes are equal."""
    pairs = [(a.double().cpu(), b.double().cpu()) for a, b in zip(got, expected, strict=True)]
    error = sum(float((a - b).square().sum()) for a, b in pairs)
    return float((error / max(sum(float(b.square().sum()) for _, b in pairs), 1e-30)) ** 0.5)
