"""What a report says at its top, in words: size, answers, what they rest on, what is open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvxform.formats import format_number, format_percent, format_ratio
from kvxform.report import Report
from kvxform.report_records import PassRecord, PlanSummary

Tone = Literal["good", "warn", "bad"]
_EQUAL = 0.005  # sizes that differ by less are called the same


@dataclass(frozen=True)
class Point:
    """One thing that a reader must know."""

    label: str
    tone: Tone
    text: str


@dataclass(frozen=True)
class Verdict:
    """The top of a report: one line, and the points it rests on."""

    title: str
    tone: Tone
    points: tuple[Point, ...]


def verdict(report: Report) -> Verdict:
    """Return what a report says, most important first; only what it knows."""
    points = [_answers(report), _proof(report)]
    if report.healing is not None:
        points.append(_healing(report))
    if report.bounds:
        points.append(_limits(report))
    points += _open(report)
    tones = [point.tone for point in points]
    tone: Tone = "bad" if "bad" in tones else "warn" if "warn" in tones else "good"
    return Verdict(_title(report), tone, tuple(points))


def lossy_passes(report: Report) -> list[PassRecord]:
    """Return the passes that lose information."""
    return [p for p in report.passes if not p.is_exact]


def _title(report: Report) -> str:
    lossy = lossy_passes(report)
    if report.verify == "none":
        answers = "nothing was measured"
    elif not lossy:
        answers = "the model computes what it did before"
    elif report.final is not None:
        answers = f"{format_percent(report.final.top1)} of next tokens stay the same"
    else:
        answers = "its answers were not measured"
    size = f"{size_words(report.plan)}; {answers}" if report.plan else answers
    return f"{size[:1].upper()}{size[1:]}"


def size_words(plan: PlanSummary) -> str:
    """Return how much smaller or larger the cache is than one of 16 bit."""
    factor = plan.kv_bytes_per_token_before / plan.kv_bytes_per_token
    if abs(factor - 1) < _EQUAL:
        return "the cache is as large as before"
    ratio, word = (factor, "smaller") if factor > 1 else (1 / factor, "larger")
    return f"the cache is {format_ratio(ratio)}× {word}"  # noqa: RUF001


def _answers(report: Report) -> Point:
    lossy = [p.name for p in lossy_passes(report)]
    final = report.final
    if final is None:
        return Point("Answers", "warn", "No output was compared with that of the source model.")
    if not lossy:
        return Point(
            "Answers",
            "good",
            "The model computes what it computed before, up to rounding: the largest difference"
            f" of a logit is {format_number(final.max_abs)}.",
        )
    return Point(
        "Answers",
        "warn",
        f"{_join(lossy)} change{'s' if len(set(lossy)) == 1 else ''} them: a divergence of"
        f" {format_number(final.kl)} nats per token from the source model, and"
        f" {format_percent(final.top1)} of next tokens unchanged, on probe inputs.",
    )


def _proof(report: Report) -> Point:
    exact, total = sum(p.is_exact for p in report.passes), len(report.passes)
    if report.verify == "none":
        text = "Nothing was measured: all figures are arithmetic on the plan of the cache."
        return Point("Trust", "warn", text)
    kept = "by algebra, and as measured."
    if exact == total:
        steps = "The only step changes" if total == 1 else f"All {total} steps change"
        return Point("Trust", "good", f"{steps} nothing but rounding, {kept}")
    return Point(
        "Trust",
        "good",
        f"{exact} of {total} steps change nothing but rounding, {kept}"
        " What the others cost is only measured.",
    )


def _healing(report: Report) -> Point:
    healing = report.healing
    assert healing is not None, "asked for healed models only"
    return Point(
        "Healing",
        "good" if healing.after.kl <= healing.before.kl else "warn",
        f"Training took the divergence on held-out text from {format_number(healing.before.kl)}"
        f" to {format_number(healing.after.kl)} nats per token.",
    )


def _limits(report: Report) -> Point:
    over = [b.name for b in report.bounds if b.is_kept is False]
    unknown = [b.name for b in report.bounds if b.is_kept is None]
    if over:
        return Point("Limits", "bad", f"Exceeded: {', '.join(over)}.")
    if unknown:
        return Point("Limits", "warn", f"Not measured: {', '.join(unknown)}.")
    count = len(report.bounds)
    limits = {1: "The limit", 2: "Both limits"}.get(count, f"All {count} limits")
    return Point("Limits", "good", f"{limits} of the recipe {'is' if count == 1 else 'are'} kept.")


def _open(report: Report) -> list[Point]:
    points = []
    if report.needs_training:
        points.append(Point("To do", "warn", f"Needs training: {report.training_hint()}."))
    rejected = len(report.source.sites_rejected)
    if rejected:
        were = "was" if rejected == 1 else "were"
        what = f"{rejected} of {rejected + report.source.sites_raised} attentions"
        points.append(Point("Left alone", "warn", f"{what} {were} not recognised and not changed."))
    return points


def _join(names: list[str]) -> str:
    *first, last = dict.fromkeys(names)
    return f"{', '.join(first)} and {last}" if first else last
