"""Report records made from programs, plans, passes and measurements."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from kvxform.ir.plan import BASELINE_BITS, CachePlan, SitePlan
from kvxform.ir.program import Program
from kvxform.ir.stream_plan import KeyView, StreamPlan
from kvxform.ir.targets import target_name
from kvxform.order import PlannedPass
from kvxform.pass_base import Match, NoMatch
from kvxform.report import (
    CacheMeasured,
    LayerRecord,
    Measured,
    PassCost,
    PassRecord,
    PlanSummary,
    SourceSummary,
)
from kvxform.verify.cache_state import LayerError, StateCheck
from kvxform.verify.probe import Difference

EXAMPLE_BATCH, EXAMPLE_TOKENS = 8, 8192  # the batch and length that a plan is illustrated with


def source_summary(program: Program) -> SourceSummary:
    """Return the record of a captured program."""
    site = program.sites[0]
    sizes = {s.layer: s.num_kv_heads * (s.head_dim + s.v_head_dim) for s in program.sites}
    owned = [size for layer, size in sizes.items() if program.site(layer).owner == layer]
    return SourceSummary(
        name=program.info.name,
        family=program.info.family,
        dtype=program.info.dtype,
        sites_raised=len(program.sites),
        sites_rejected=_places(program, "attention"),
        num_q_heads=site.num_q_heads,
        num_kv_heads=site.num_kv_heads,
        head_dim=site.head_dim,
        mixers=_places(program, "mixer"),
        cached_values=sum(owned),
        read_values=sum(sizes.values()),
    )


def _places(program: Program, kind: str) -> tuple[tuple[str, str], ...]:
    """Return module and reason of what was left alone and is of one kind."""
    return tuple((r.module, r.reason) for r in program.rejected if r.kind == kind)


def pass_record(
    planned: PlannedPass, found: Sequence[Match | NoMatch], before: Program, after: Program
) -> PassRecord:
    """Return the record of a pass that has not been measured.

    Args:
        planned: The pass.
        found: What it found in `before`.
        before: The program it was given.
        after: The program it made.
    """
    cls = type(planned.graph_pass)
    misses = [f for f in found if isinstance(f, NoMatch)]
    matches = [f for f in found if isinstance(f, Match)]
    reasons = Counter(f.reason for f in misses if not f.done)
    notes = Counter(match.note for match in matches if match.note)
    return PassRecord(
        name=planned.name,
        options=dict(planned.step.options),
        about=first_sentence(cls.__doc__),
        source=cls.source,
        exactness=cls.numerics.exactness.value,
        matched=len(matches),
        done_before=sum(f.done for f in misses),
        skipped=tuple(reasons.items()),
        losses=tuple(loss for match in matches for loss in match.losses),
        notes=tuple(notes.items()),
        cost=pass_cost(before, after),
    )


def pass_cost(before: Program, after: Program) -> PassCost:
    """Return what a pass that made `after` of `before` changed of the size of things."""
    old, new = _operations(before), _operations(after)
    plan = after.plan
    return PassCost(
        operations=tuple(
            (name, new[name] - old[name]) for name in sorted(old | new) if new[name] != old[name]
        ),
        parameters=_parameters(after) - _parameters(before),
        kv_bytes_per_token=plan.bytes_per_token if plan else None,
        extra_flops_per_token=plan.extra_flops_per_token() if plan else 0,
    )


def _operations(program: Program) -> Counter[str]:
    nodes = program.graph.nodes
    return Counter(str(target_name(node.target)) for node in nodes if node.op == "call_function")


def _parameters(program: Program) -> int:
    return sum(weight.numel() for weight in program.weights.values())


def first_sentence(docstring: str | None) -> str:
    """Return the first paragraph of a docstring in one line."""
    return " ".join((docstring or "").strip().split("\n\n")[0].split())


def measured(difference: Difference) -> Measured:
    """Return the record of a difference of logits."""
    return Measured(difference.max_abs, difference.relative, difference.kl, difference.top1)


def cache_measured(checks: Sequence[StateCheck]) -> CacheMeasured:
    """Return the record of schedules that have passed."""
    return CacheMeasured(
        schedules=tuple(check.schedule for check in checks),
        input_error=max(check.input_error for check in checks),
        state_error=max(check.state_error for check in checks),
        read_error=max(check.read_error for check in checks),
    )


def plan_summary(plan: CachePlan, source: SourceSummary) -> PlanSummary:
    """Return what `plan` costs, beside a 16-bit cache of K and V of the source."""
    before = source.cached_values * BASELINE_BITS / 8
    read = source.read_values * BASELINE_BITS / 8 * EXAMPLE_TOKENS
    lengths = [EXAMPLE_TOKENS] * EXAMPLE_BATCH
    return PlanSummary(
        layout=str(plan.layout),
        kv_bytes_per_token_before=before,
        kv_bytes_per_token=plan.bytes_per_token,
        bits_per_value=plan.bits_per_value,
        batch_size=EXAMPLE_BATCH,
        cached_tokens=EXAMPLE_TOKENS,
        total_bytes_before=round(before * EXAMPLE_TOKENS * EXAMPLE_BATCH),
        total_bytes=plan.bytes_at(lengths, EXAMPLE_TOKENS),
        read_bytes_before=read,
        read_bytes=plan.read_bytes_per_step(1, EXAMPLE_TOKENS),
        extra_flops_per_token=plan.extra_flops_per_token(),
    )


def layer_records(plan: CachePlan, errors: Sequence[LayerError]) -> tuple[LayerRecord, ...]:
    """Return one record a layer that owns a cache; `errors` may be empty."""
    by_layer = {error.layer: error for error in errors}
    records = []
    for site in plan.owners:
        error = by_layer.get(site.layer)
        heads, values = site.num_kv_heads, site.streams.get("value")
        records.append(
            LayerRecord(
                layer=site.layer,
                key_codec=describe_stream(site.key),
                value_codec=_describe_value(site),
                key_bytes=site.key.body_bytes_per_token(heads),
                value_bytes=values.body_bytes_per_token(heads) if values else 0,
                baseline_bytes=site.values_per_token * BASELINE_BITS / 8,
                key_error=error.key if error else None,
                value_error=error.value if error else None,
            )
        )
    return tuple(records)


def _describe_value(site: SitePlan) -> str:
    if site.payload == "pair":
        return "with the keys, and those of the next layer"
    if isinstance(site.value, KeyView):
        return f"first {site.value.head_dim} channels of the key"
    return describe_stream(site.value)


def describe_stream(stream: StreamPlan) -> str:
    """Return the codec, basis and regions of a stream in words: `int4 per token, hadamard(64)`."""
    words = [describe_codec(stream.codec)]
    if stream.basis.kind != "identity":
        words.append(str(stream.basis))
    if stream.regions.sink:
        words.append(f"first {stream.regions.sink} exact")
    if stream.regions.recent:
        words.append(f"last {stream.regions.recent} exact")
    return ", ".join(words)


def describe_codec(codec: Mapping[str, Any]) -> str:
    """Return a codec in words; what a codec wraps comes first."""
    name = codec["codec"]
    if name == "truncate":
        channels = codec["heads"] * codec["head_dim"]
        return f"{describe_codec(codec['inner'])}, {codec['rank']} of {channels} channels"
    if "inner" in codec:
        return f"{describe_codec(codec['inner'])}, {name}"
    if name == "none":
        return str(codec.get("dtype", "as is"))
    if "axis" not in codec:  # no integers in groups: what its numbers are called says it best
        numbers = {key: value for key, value in codec.items() if type(value) is int}
        return ", ".join([name, *(f"{key} {value}" for key, value in numbers.items())])
    words = f"{name}{codec.get('bits', '')} per {codec['axis']}"
    return f"{words}, groups of {codec['group']}" if codec.get("group") else words
