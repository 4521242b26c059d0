"""What a report is made of: the source, passes, layers, the plan, bounds; plain frozen records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvxform.pass_base import Loss


@dataclass(frozen=True)
class SourceSummary:
    """The model that went in, and how its attentions were recognised.

    Attributes:
        name: What the user called it.
        family: Model family.
        dtype: Compute dtype by torch name.
        sites_raised: Attention sites in the dialect.
        sites_rejected: Module and reason of every attention that was left alone.
        num_q_heads: Query heads of the first site.
        num_kv_heads: KV heads of the first site.
        head_dim: Channels of one head of the first site.
        capture_error: Largest difference of a logit of the captured program and the source.
        mixers: Module and reason of everything else that mixes tokens, state-space layers for one.
        cached_values: Elements of K and V of one token, of all layers that do not share another's.
        read_values: Elements of K and V of one token that all layers read.
    """

    name: str
    family: str
    dtype: str
    sites_raised: int
    sites_rejected: tuple[tuple[str, str], ...]
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    capture_error: float | None = None
    mixers: tuple[tuple[str, str], ...] = ()
    cached_values: int = 0
    read_values: int = 0


@dataclass(frozen=True)
class Measured:
    """Logits compared with reference logits on probe inputs.

    Attributes:
        max_abs: Largest absolute difference.
        relative: The same as a share of the largest logit.
        kl: Mean KL(reference || measured) per position, in nats.
        top1: Share of positions with the same greedy token.
    """

    max_abs: float
    relative: float
    kl: float
    top1: float


@dataclass(frozen=True)
class CacheMeasured:
    """The cache of a session compared with what it must hold; lengths and bytes were equal.

    All errors are shares of the largest value, and rounding only, whatever the codec.

    Attributes:
        schedules: Names of the schedules that ran.
        input_error: K and V handed to the cache, against the source; first layer only if lossy.
        state_error: The logical cache, against the equations applied to the same K and V.
        read_error: Outputs of attention, against the equations.
    """

    schedules: tuple[str, ...]
    input_error: float
    state_error: float
    read_error: float


@dataclass(frozen=True)
class PassCost:
    """What one pass changed of the size of things; arithmetic, nothing is run.

    Attributes:
        operations: Operations more (or fewer, below zero) in the graph, by kind.
        parameters: Numbers more (or fewer) in weights and constants.
        kv_bytes_per_token: Bytes per cached token after it; None before there is a cache.
        extra_flops_per_token: Additions for online rotations after it.
    """

    operations: tuple[tuple[str, int], ...]
    parameters: int
    kv_bytes_per_token: float | None = None
    extra_flops_per_token: int = 0


@dataclass(frozen=True)
class PassRecord:
    """One pass of the recipe.

    Attributes:
        name: Recipe name.
        options: Options as given.
        about: What the pass does, in one sentence.
        source: Paper and section.
        exactness: `exact`, `approximate` or `needs training`.
        matched: Places where it was applied.
        done_before: Places where it had been applied already.
        skipped: Reason and number of the places where it does not apply.
        vs_before: Logits against the stage before; None if not measured.
        vs_source: Logits against the source model; None if not measured.
        tolerance: Largest value of the metric that the contract allows in `vs_before`, or None.
        metric: Metric of the tolerance: `relative` or `kl`.
        cache: Cache state; None before there is a cache or if not measured.
        losses: What it gives up of K and V where it was applied, on the calibration text.
        notes: What it did there, in words, and at how many places.
        cost: What it changed of the size of things.
    """

    name: str
    options: dict[str, Any]
    about: str
    source: str
    exactness: str
    matched: int
    done_before: int
    skipped: tuple[tuple[str, int], ...]
    vs_before: Measured | None = None
    vs_source: Measured | None = None
    tolerance: float | None = None
    metric: str = ""
    cache: CacheMeasured | None = None
    losses: tuple[Loss, ...] = ()
    notes: tuple[tuple[str, int], ...] = ()
    cost: PassCost | None = None

    @property
    def is_exact(self) -> bool:
        """Whether it changes nothing but rounding, by algebra."""
        return self.exactness == "exact"


@dataclass(frozen=True)
class LoweringRecord:
    """The finished program as its target runs it, compared with the eager lowering.

    Attributes:
        name: The lowering.
        vs_eager: Logits against those of the eager lowering.
        metric: Metric of the tolerance: `relative` or `kl`.
        tolerance: Largest value of the metric that is allowed.
        cache: Cache state.
    """

    name: str
    vs_eager: Measured
    metric: str
    tolerance: float
    cache: CacheMeasured


@dataclass(frozen=True)
class LayerRecord:
    """One layer: what its cache costs and how far it lies from the cache of the source.

    Attributes:
        layer: Layer index.
        key_codec: Codec of K in words.
        value_codec: Codec of V in words.
        key_bytes: Bytes of K per token, metadata included.
        value_bytes: Bytes of V per token.
        baseline_bytes: Bytes of K and V per token in a 16-bit cache.
        key_error: Root mean square error of cached K over that of K itself; None if not measured.
        value_error: The same for V.
    """

    layer: int
    key_codec: str
    value_codec: str
    key_bytes: float
    value_bytes: float
    baseline_bytes: float
    key_error: float | None = None
    value_error: float | None = None


@dataclass(frozen=True)
class PlanSummary:
    """What the cache costs, by the arithmetic of its plan.

    Attributes:
        layout: `contiguous` or `paged(n)`.
        kv_bytes_per_token_before: Bytes per token of a 16-bit cache of K and V of the source.
        kv_bytes_per_token: Bytes per token of this plan, metadata included.
        bits_per_value: True bits per cached value, metadata included.
        batch_size: Batch that the next three figures are for.
        cached_tokens: Sequence length that the next three figures are for.
        total_bytes_before: Bytes of a 16-bit cache at that batch and length.
        total_bytes: Bytes of this plan: whole pages and exact buffers.
        read_bytes_before: Bytes that one decode step of one sequence reads from a 16-bit cache.
        read_bytes: Bytes that one decode step of one sequence reads.
        extra_flops_per_token: Additions spent on online rotations.
    """

    layout: str
    kv_bytes_per_token_before: float
    kv_bytes_per_token: float
    bits_per_value: float
    batch_size: int
    cached_tokens: int
    total_bytes_before: int
    total_bytes: int
    read_bytes_before: float
    read_bytes: float
    extra_flops_per_token: int


@dataclass(frozen=True)
class BoundRecord:
    """A bound of the recipe, and what was measured (None if it was not)."""

    name: str
    limit: float
    measured: float | None

    @property
    def is_kept(self) -> bool | None:
        """Whether the bound holds; None if it was not measured."""
        if self.measured is None:
            return None
        return self.measured >= self.limit if self.is_lower else self.measured <= self.limit

    @property
    def is_lower(self) -> bool:
        """Whether the limit is the smallest allowed value."""
        return self.name.startswith("min_")
