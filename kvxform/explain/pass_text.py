"""Print what a pass promises and what it finds, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvxform.explain.pass_records import (
    REQUIRED,
    OptionRecord,
    PassFinding,
    PlaceRecord,
    RequirementRecord,
)
from kvxform.ir.folding import fold_names, fold_sentence, layer_words

_WIDTH = 11  # of the column of labels
_PROMISES = {
    "exact": "exact: logits and cache are equal to rounding",
    "needs training": "needs training",
}


def format_pass(finding: PassFinding) -> str:
    """Return a finding as lines, the contract first."""
    at = f" ({finding.at})" if finding.at else ""
    lines = [f"pass {finding.name}{at}: {_verdict(finding)}"]
    lines += [f"  {label:<{_WIDTH}} {text}".rstrip() for label, text in _contract(finding)]
    if finding.state in ("refused", "not tried"):
        lines.append(f"  {finding.state:<{_WIDTH}} {finding.why}")
    return "\n".join([*lines, *_place_lines(finding.places)])


def short_value(value: Any) -> str:
    """Return the value of an option as recipes write it."""
    if value is None:
        return "auto"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        inner = ", ".join(f"{key}: {short_value(item)}" for key, item in value.items())
        return f"{{{inner}}}"
    return str(value)


def _verdict(finding: PassFinding) -> str:
    counts = Counter(place.outcome for place in finding.places)
    parts = [f"{counts[o]} {o}" for o in ("match", "no match", "done") if counts[o]]
    words = {
        "done": "already done",
        "skipped": "applies nowhere, which the recipe allows",
        "no match": "applies nowhere",
    }
    verdict = words.get(finding.state, finding.state)
    return f"{verdict} ({', '.join(parts)})" if parts else verdict


def _contract(finding: PassFinding) -> Iterator[tuple[str, str]]:
    yield "does", finding.about
    yield "source", finding.source
    bound = "measured only" if finding.bound is None else f"at most {finding.bound:g}"
    approximate = f"{finding.exactness}: {finding.metric} to the stage before, {bound}"
    yield "contract", _PROMISES.get(finding.exactness, approximate)
    for i, option in enumerate(finding.options):
        yield "" if i else "options", _option(option)
    for i, requirement in enumerate(finding.requires):
        yield "" if i else "requires", _requirement(requirement)
    if finding.ensures:
        yield "ensures", _pairs(finding.ensures)
    if finding.invalidates:
        yield "invalidates", ", ".join(finding.invalidates)


def _option(option: OptionRecord) -> str:
    value = "not set" if option.value is None else short_value(option.value)
    if option.value == option.default:
        return f"{option.name}: {value}"
    default = "not set" if option.default is None else short_value(option.default)
    note = "required" if option.default == REQUIRED else f"default {default}"
    return f"{option.name}: {value} ({note})"


def _requirement(requirement: RequirementRecord) -> str:
    wanted = f"{requirement.fact} = {requirement.wanted}"
    if requirement.is_met is None:
        return wanted
    if requirement.is_met:
        return f"{wanted}: met"
    return (
        f"{wanted}: not met, it is {requirement.got}: {requirement.because}. "
        f"Hint: {requirement.hint}."
    )


def _pairs(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in facts.items())


def _place_lines(places: Sequence[PlaceRecord]) -> Iterator[str]:
    """Yield one line for places with the same outcome, and what can be done about it."""
    groups: dict[tuple[str, ...], list[PlaceRecord]] = {}
    for place in places:
        reason, hint = fold_sentence(place.reason), fold_sentence(place.hint)
        node = place.node if place.outcome == "no match" else ""
        groups.setdefault((place.outcome, reason, hint, node), []).append(place)
    for (outcome, reason, hint, node), group in groups.items():
        if len(group) == 1:
            reason, hint = group[0].reason, group[0].hint
        line = f"  {outcome:<{_WIDTH}} {_where(group)}"
        yield f"{line}: {reason}" if reason else line
        indent = " " * (_WIDTH + 5)
        if node:
            yield f"{indent}at {node}"
        if hint:
            yield f"{indent}to change: {hint}"


def _where(places: Sequence[PlaceRecord]) -> str:
    layers = [place.layer for place in places if place.layer is not None]
    if layers:
        return layer_words(layers)
    modules = [place.module for place in places if place.module]
    return ", ".join(fold_names(modules)) or "the whole program"
