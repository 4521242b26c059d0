"""Every claim of a report and how it is known: proved, measured, computed, or not checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from kvxform.formats import format_number, format_percent
from kvxform.report import Report
from kvxform.report_records import CacheMeasured, LoweringRecord, PassRecord

_UNITS = {"relative": "of the largest logit", "kl": "nats per token"}
Known = Literal["proved", "measured", "computed", "not checked"]


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        known: How it is known. What is proved by algebra was measured too, to find mistakes.
        what: What is claimed.
        how: What that rests on.
        found: What was measured, or empty.
        allowed: What was allowed, or empty.
        unit: Of both.
    """

    known: Known
    what: str
    how: str = ""
    found: str = ""
    allowed: str = ""
    unit: str = ""


def claims(report: Report) -> list[Claim]:
    """Return every claim of `report`, the strongest kind first."""
    found = [
        *_exact(report),
        *_capture(report),
        *(_lossy(record) for record in report.passes if not record.is_exact),
        *_cache(report),
        *_target(report.lowering),
        *_sizes(report),
        *_unchecked(report),
    ]
    order = ("proved", "measured", "computed", "not checked")
    return sorted(found, key=lambda claim: order.index(claim.known))


def _capture(report: Report) -> Iterator[Claim]:
    error = report.source.capture_error
    if error is not None:
        yield Claim(
            "measured",
            "the captured program is the source model",
            "largest difference of a logit",
            format_number(error),
        )


def _exact(report: Report) -> Iterator[Claim]:
    """Yield one claim for all exact passes that were measured the same way."""
    groups: dict[str, list[PassRecord]] = {}
    for record in report.passes:
        if record.is_exact:
            groups.setdefault(record.metric if record.vs_before else "", []).append(record)
    for metric, records in groups.items():
        names = list(dict.fromkeys(record.name for record in records))
        what = f"{', '.join(names)}: {len(records)} steps change nothing"
        if len(records) == 1:
            what = f"{names[0]} changes nothing"
        how = "identities of algebra; what is measured is rounding"
        if metric == "kl":
            how = "after a lossy step; what is measured is rounding, as lossy codes show it"
        yield _measured("proved", what, how if metric else "not measured", records)


def _lossy(record: PassRecord) -> Claim:
    measured = record.vs_before
    if measured is None:
        return Claim("not checked", f"what {record.name} costs", f"{record.exactness}, not run")
    how = (
        f"against the step before, on probe inputs: {format_percent(measured.top1)} of next tokens"
        f" unchanged, largest logit difference {format_number(measured.max_abs)}"
    )
    return _measured("measured", f"what {record.name} costs", how, [record])


def _measured(known: Known, what: str, how: str, records: Sequence[PassRecord]) -> Claim:
    """Return a claim about passes with one metric, with the worst that was measured."""
    metric, limit = records[0].metric, records[0].tolerance
    values = [getattr(r.vs_before, metric) for r in records if r.vs_before is not None]
    if not values:
        return Claim(known, what, how)
    return Claim(
        known,
        what,
        how,
        format_number(max(values)),
        "no bound of its own" if limit is None else format_number(limit),
        _UNITS[metric],
    )


def _cache(report: Report) -> Iterator[Claim]:
    if report.cache is None:
        return
    ran = ", ".join(report.cache.schedules)
    first = " in the first layer; later ones see its codes"
    is_exact = all(p.is_exact for p in report.passes)
    yield Claim("measured", "lengths and bytes of the cache are those of the plan", ran, "equal")
    yield Claim(
        "measured",
        "K and V handed to the cache are those of the source model",
        f"largest relative error{'' if is_exact else first}",
        format_number(report.cache.input_error),
    )
    yield from _state(report.cache, "")


def _state(cache: CacheMeasured, where: str) -> Iterator[Claim]:
    how = "largest relative error against the equations of the codec"
    holds, reads = format_number(cache.state_error), format_number(cache.read_error)
    yield Claim("measured", f"the cache holds what it must{where}", how, holds)
    yield Claim("measured", f"attention reads what the cache holds{where}", how, reads)


def _target(lowering: LoweringRecord | None) -> Iterator[Claim]:
    if lowering is None:
        return
    yield Claim(
        "measured",
        f"target {lowering.name} computes what the eager lowering does",
        "logits of the same program, both ways",
        format_number(getattr(lowering.vs_eager, lowering.metric)),
        format_number(lowering.tolerance),
        _UNITS[lowering.metric],
    )
    yield from _state(lowering.cache, f", target {lowering.name}")


def _sizes(report: Report) -> Iterator[Claim]:
    if report.plan is not None:
        how = "arithmetic on the plan, all metadata included"
        yield Claim("computed", "bytes, bits and reads of the cache", how)


def _unchecked(report: Report) -> Iterator[Claim]:
    if report.verify == "none":
        yield Claim("not checked", "answers of the model", "verification was switched off")
    elif any(not p.is_exact for p in report.passes) and report.healing is None:
        how = "probe inputs are not text; kvxform eval measures perplexity"
        yield Claim("not checked", "quality on text of people", how)
    for module, reason in report.source.sites_rejected:
        yield Claim("not checked", f"attention {module}: left as it was", reason)
