"""Changes that many layers share, shown once: blocks of layers, ports and findings by kind."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic

from kvxform.diffing.folding import Change, FoldedChange, fold_changes
from kvxform.diffing.records import Finding, PlanChange, PortChange, Severity

_LAYER = re.compile(r"^layer (\d+) ")
_NUMBER = re.compile(r"\b(layer |layers\.)(\d+)")
_STREAM = re.compile(r"^(keys|values): (.+)$", re.DOTALL)
_TELLING = ("codec ", "codec.bits", "basis ", "owner layer")  # what says most of a plan
_MOST_MESSAGES = 3


@dataclass(frozen=True)
class Block(Generic[Change]):
    """Changes that the same layers have, in the order of the graph; no layers: outside of them."""

    layers: tuple[int, ...]
    changes: tuple[FoldedChange[Change], ...]


def blocks_of(changes: Iterable[Change]) -> list[Block[Change]]:
    """Return changes in blocks of layers that have the same ones; most layers first."""
    found: dict[tuple[int, ...], list[FoldedChange[Change]]] = {}
    for folded in fold_changes(changes):
        found.setdefault(folded.layers, []).append(folded)
    return [
        Block(layers, tuple(folded))
        for layers, folded in sorted(found.items(), key=lambda item: (-len(item[0]), item[0]))
    ]


def often(folded: FoldedChange[Change]) -> str:
    """Return how often a change is there: nothing for once a layer, `x2`, or `31 in all`."""
    places = max(1, len(folded.layers))
    times, rest = divmod(folded.count, places)
    if rest:
        return f"{folded.count} in all"
    return f"x{times}" if times > 1 else ""


@dataclass(frozen=True)
class PlanLine:
    """A field of the plan that differs, of one stream or of both."""

    field: str
    before: str
    after: str
    times: str


def plan_lines(block: Block[Change]) -> list[PlanLine]:
    """Return the fields of a plan in a block; those that differ alike in keys and values once."""
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for folded in block.changes:
        c = folded.change
        if not isinstance(c, PlanChange):
            continue
        streams = found.setdefault((c.field, c.before, c.after, often(folded)), [])
        streams += [c.stream] if c.stream else []
    return [
        PlanLine(f"{' and '.join(streams)} {field}".strip(), before, after, times)
        for (field, before, after, times), streams in found.items()
    ]


@dataclass(frozen=True)
class PortGroup:
    """Ports of several layers with the same change; no layers where it belongs to none."""

    kind: str
    name: str
    before: str
    after: str
    layers: tuple[int, ...]


def fold_ports(ports: Iterable[PortChange]) -> list[PortGroup]:
    """Group inputs, outputs and planes of many layers with the same change."""
    groups: dict[tuple[str, str, str, str], list[int]] = {}
    for port in ports:
        name = _LAYER.sub("", port.name)
        layers = groups.setdefault((port.kind, name, port.before, port.after), [])
        layers += map(int, _LAYER.findall(port.name))
    return [
        PortGroup(kind, name, before, after, tuple(sorted(layers)))
        for (kind, name, before, after), layers in groups.items()
    ]


@dataclass(frozen=True)
class FindingGroup:
    """Findings with the same rule about the same layers.

    Attributes:
        severity: Of all of them.
        rule: Of all of them.
        layers: Layers they are about; empty for the whole model.
        messages: What they say, the same words once.
        origin: Source line of the first that has one.
    """

    severity: Severity
    rule: str
    layers: tuple[int, ...]
    messages: tuple[str, ...]
    origin: str

    @property
    def shown(self) -> list[str]:
        """The first few messages, and how many more there are."""
        more = len(self.messages) - _MOST_MESSAGES
        rest = [f"and {more} more"] if more > 0 else []
        return [*self.messages[:_MOST_MESSAGES], *rest]


def group_findings(findings: Iterable[Finding]) -> list[FindingGroup]:
    """Group findings by what they say of how many layers, in order.

    A finding about one layer that says of others what another one says of its own, `owner layer 3
    -> layer 2`, is the same as that one.
    """
    alike: dict[tuple[Severity, str, str], list[Finding]] = {}
    for finding in findings:
        words = _relative(finding) if len(finding.layers) == 1 else finding.message
        alike.setdefault((finding.severity, finding.rule, words), []).append(finding)
    groups: dict[tuple[Severity, str, tuple[int, ...]], list[tuple[str, str]]] = {}
    for (severity, rule, _), found in alike.items():
        layers = tuple(sorted({layer for one in found for layer in one.layers}))
        differ = len({one.message for one in found}) > 1
        message = found[0].message + (", and likewise in the others" if differ else "")
        groups.setdefault((severity, rule, layers), []).append((message, found[0].origin))
    return [
        FindingGroup(
            severity,
            rule,
            layers,
            _messages([message for message, _ in said]),
            next((origin for _, origin in said if origin), ""),
        )
        for (severity, rule, layers), said in groups.items()
    ]


def _relative(finding: Finding) -> str:
    (layer,) = finding.layers
    return _NUMBER.sub(lambda found: f"{found[1]}{int(found[2]) - layer:+d}", finding.message)


def _messages(messages: Iterable[str]) -> tuple[str, ...]:
    """Join what is said of keys and of values in the same words; what tells most comes first."""
    streams: dict[str, list[str]] = {}
    for message in messages:
        stream, words = ("", message)
        if found := _STREAM.match(message):
            stream, words = found[1], found[2]
        streams.setdefault(words, []).append(stream)
    joined = [
        f"{' and '.join(filter(None, who))}: {words}".removeprefix(": ")
        for words, who in streams.items()
    ]
    return tuple(sorted(joined, key=lambda words: not any(field in words for field in _TELLING)))
