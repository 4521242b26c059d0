"""A diff as Markdown for a pull request: the answer, a table of causes, details folded away."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kvxform.diffing.blocks import blocks_of, fold_ports, group_findings
from kvxform.diffing.digest import (
    figure_rows,
    layer_count,
    layer_words,
    ranked,
    side_words,
    verdict,
)
from kvxform.diffing.folding import Change, fold_changes
from kvxform.diffing.recipes import recipe_lines
from kvxform.diffing.records import DiffResult, SideSummary, TextDiff
from kvxform.diffing.render_text import block_lines, map_lines
from kvxform.formats import plain_line, plain_number, plain_percent

_ICONS = {"good": "✅", "warn": "⚠️", "bad": "❌"}
_SEVERITIES = {"error": "❌ error", "warning": "⚠️ changed", "note": "note"}
_SPECIAL = re.compile(r"[\\`*<&|~#@]|(?<!\w)_|_(?!\w)|\](?=[(\[:])|^>")  # no more than must be
_MOST_CHANGES = 200  # lines of one folded section
_MOST_CHARACTERS = 60_000  # GitHub refuses comments above 65536
_HINT = (
    "Layers from left to right. `+` added, `-` removed, `~` changed; bars are errors, a power of"
    " ten a step."
)


def render_markdown(result: DiffResult) -> str:
    """Return a diff as GitHub Markdown without a final line break."""
    answer = verdict(result)
    blocks = [
        f"### {_ICONS[answer.tone]} kvxform diff: {answer.word}",
        f"{_text(answer.sentence[:1].upper() + answer.sentence[1:])}.",
        _sides(result.a, result.b),
        _findings(result),
        _recipe(result),
        _limits(result),
        _figures(result),
        _numbers(result),
        _map(result),
        _generated(result.numeric.text if result.numeric else None),
    ]
    details = [
        _details("Operations that differ", _nodes(result)),
        _details("Plan of the cache", _code(_lines(result.plan, result))),
        _details("Weights that differ", _weights(result)),
    ]
    for body in details:
        fits = sum(map(len, [*blocks, body])) < _MOST_CHARACTERS
        blocks.append(
            body if fits else "Too long for a comment: see the text or HTML of this diff."
        )
    return "\n\n".join(block for block in blocks if block)


def _text(text: str) -> str:
    """Escape text for Markdown and tables; `@` is broken so that it calls nobody."""
    return _SPECIAL.sub(lambda found: _ESCAPES.get(found[0], f"\\{found[0]}"), plain_line(text))


_ESCAPES = {"<": "&lt;", "&": "&amp;", "@": "@\N{ZERO WIDTH NON-JOINER}"}


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    rule = ("---:" if i in right else "---" for i in range(len(heads)))
    lines = [heads, list(rule), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(lines: Sequence[str], language: str = "text") -> str:
    """Return lines as a code block, or nothing; no line of it can end the block."""
    if not lines:
        return ""
    shown = [*lines[:_MOST_CHANGES]]
    if len(lines) > _MOST_CHANGES:
        shown.append(f"... and {len(lines) - _MOST_CHANGES} lines more")
    longest = max((len(run) for line in shown for run in re.findall("`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([f"{fence}{language}", *shown, fence])


def _details(title: str, body: str) -> str:
    if not body:
        return ""
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def _sides(a: SideSummary, b: SideSummary) -> str:
    rows = [(name, _text(s.name), _text(side_words(s))) for name, s in (("A", a), ("B", b))]
    return _table(("", "side", "what it is"), rows)


def _findings(result: DiffResult) -> str:
    if not result.findings:
        return ""
    count = layer_count(result)
    rows = []
    for finding in group_findings(ranked(result.findings)):
        where = layer_words(finding.layers, count) if finding.layers else "model"
        origin = f"<br><sub>{_text(finding.origin)}</sub>" if finding.origin else ""
        messages = "<br>".join(map(_text, finding.shown))
        rows.append((_SEVERITIES[finding.severity], where, messages + origin))
    return _table(("", "where", "what"), rows)


def _recipe(result: DiffResult) -> str:
    if not result.recipe:
        return ""
    return f"Recipe:\n\n{_code(recipe_lines(result.recipe), 'diff')}"


def _limits(result: DiffResult) -> str:
    if not result.thresholds:
        return ""
    over = {v.name: v.measured for v in result.violations}
    rows = [
        (
            "❌ over" if name in over else "✅ kept",
            f"`{name}`",
            plain_number(limit),
            plain_number(over[name]) if name in over else "",
        )
        for name, limit in result.thresholds
    ]
    return _table(("", "limit", "value", "measured"), rows, (2, 3))


def _figures(result: DiffResult) -> str:
    rows = [(r.label, r.before, r.after, r.change) for r in figure_rows(result)]
    return _table(("figure", "A", "B", ""), rows, (1, 2)) if rows else ""


def _numbers(result: DiffResult) -> str:
    numeric = result.numeric
    if numeric is None:
        return "" if result.structure is None else "Not run: only graphs and plans were compared."
    lines = []
    if numeric.logits is not None:
        got = numeric.logits
        lines.append(
            f"Both sides on the same inputs ({_text(numeric.inputs)}): logits differ by at most"
            f" **{plain_number(got.max_abs)}** ({plain_number(got.relative)} of the largest;"
            f" rounding is below {plain_number(numeric.tolerance)}), KL"
            f" **{plain_number(got.kl)}** nats, the same next token at"
            f" **{plain_percent(got.top1)}** of positions."
        )
    if numeric.first_layer is not None and not result.is_same:
        lines.append(f"They part first in **layer {numeric.first_layer}**.")
    if numeric.schedules:
        ran = ", ".join(map(_text, numeric.schedules))
        lines.append(f"Caches were compared after: {ran}.")
    complaints = "\n".join(f"- {_text(complaint)}" for complaint in numeric.complaints)
    return "\n\n".join(filter(None, [" ".join(lines), complaints]))


def _map(result: DiffResult) -> str:
    lines = map_lines(result)
    return f"{_code(lines)}\n<sub>{_HINT}</sub>" if lines else ""


def _generated(text: TextDiff | None) -> str:
    if text is None:
        return ""
    if text.parted_at is None:
        return "Both sides write the same text."
    rows = [(side, _text(repr(said))) for side, said in (("A", text.before), ("B", text.after))]
    after = f"{text.parted_at} token{'' if text.parted_at == 1 else 's'}"
    said = f"Generated text parts after {after}, prompt {_text(repr(text.prompt))}:"
    return f"{said}\n\n{_table(('', 'text'), rows)}"


def _nodes(result: DiffResult) -> str:
    structure = result.structure
    if structure is None:
        return ""
    count = layer_count(result)
    ports = [
        (p.kind, layer_words(p.layers, count), _text(p.name), _text(p.before), _text(p.after))
        for p in fold_ports(structure.ports)
    ]
    counts = [(_text(h.op), str(h.before), str(h.after)) for h in structure.histogram]
    parts = [
        _code(_lines(structure.nodes, result)),
        _table(("port", "where", "name", "A", "B"), ports) if ports else "",
        _table(("operation", "A", "B"), counts, (1, 2)) if counts else "",
    ]
    return "\n\n".join(filter(None, parts))


def _lines(changes: Sequence[Change], result: DiffResult) -> list[str]:
    count = layer_count(result)
    return [line for block in blocks_of(changes) for line in block_lines(block, count)]


def _weights(result: DiffResult) -> str:
    if not result.weights:
        return ""
    count = layer_count(result)
    rows = [
        (
            layer_words(g.layers, count),
            _text(g.change.role),
            g.change.cause,
            plain_number(g.change.relative),
            _text(g.change.detail),
        )
        for g in fold_changes(result.weights)
    ]
    return _table(("where", "weight", "cause", "relative", ""), rows, (3,))
