"""A diff for a terminal: the answer first, then all layers in one line each, then the details."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence

from kvxform.diffing.blocks import Block, blocks_of, fold_ports, group_findings, often, plan_lines
from kvxform.diffing.digest import (
    figure_rows,
    layer_cells,
    layer_count,
    layer_words,
    ranked,
    side_words,
    sign_of,
    verdict,
)
from kvxform.diffing.folding import Change
from kvxform.diffing.recipes import recipe_lines
from kvxform.diffing.records import (
    DiffResult,
    LayerDiff,
    NodeChange,
    StructureDiff,
    WeightChange,
)
from kvxform.formats import plain_line, plain_number, plain_percent

Mark = Callable[[str, str], str]  # a text and a tone -> the text, coloured or not
_COLOURS = {"good": "32", "warn": "33", "bad": "31", "bold": "1"}
_SEVERITIES = {"error": ("ERROR", "bad"), "warning": ("WARN", "warn"), "note": ("note", "good")}
_STEPS = "▁▂▃▄▅▆▇█"  # errors from 1e-8 and less to 1 and more, one step a power of ten
_SAME = "·"
_WIDTH = 100  # of findings
_PER_LINE = 64  # layers in one line of the map
_MOST_LINES = 40  # of one block of changes


def render_text(result: DiffResult, *, colour: bool = False) -> str:
    """Return a diff as text without a final line break.

    Args:
        result: The diff.
        colour: Mark the answer and severities with colours of a terminal.
    """
    mark: Mark = _coloured if colour else lambda text, _: text
    blocks = [
        _answer(result, mark),
        _findings(result, mark),
        _recipe(result),
        _limits(result, mark),
        _figures(result),
        map_lines(result),
        *_numbers(result),
        *_structure(result.structure, layer_count(result)),
        _changes("plan of the cache", result.plan, layer_count(result)),
        _changes("weights", result.weights, layer_count(result)),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _coloured(text: str, tone: str) -> str:
    return f"\x1b[{_COLOURS[tone]}m{text}\x1b[0m"


def _answer(result: DiffResult, mark: Mark) -> list[str]:
    answer = verdict(result)
    names = [plain_line(side.name) for side in (result.a, result.b)]
    width = max(map(len, names))
    return [
        f"{mark(answer.word.upper(), answer.tone)}: {plain_line(answer.sentence)}",
        f"  A  {names[0]:<{width}}  {plain_line(side_words(result.a))}",
        f"  B  {names[1]:<{width}}  {plain_line(side_words(result.b))}",
    ]


def _findings(result: DiffResult, mark: Mark) -> list[str]:
    if not result.findings:
        return []
    count, findings = layer_count(result), group_findings(ranked(result.findings))
    where = [layer_words(f.layers, count) if f.layers else "model" for f in findings]
    width = max(map(len, where))
    lines = ["what changed"]
    for finding, place in zip(findings, where, strict=True):
        word, tone = _SEVERITIES[finding.severity]
        origin = f" at {plain_line(finding.origin)}" if finding.origin else ""
        text = f"{plain_line('; '.join(finding.shown))} [{finding.rule}]{origin}"
        first, *rest = textwrap.wrap(text, max(_WIDTH - width - 11, 40), break_on_hyphens=False)
        lines.append(f"  {mark(f'{word:<5}', tone)}  {place:<{width}}  {first}")
        lines += [f"{'':{width + 11}}{line}" for line in rest]
    return lines


def _recipe(result: DiffResult) -> list[str]:
    lines = recipe_lines(result.recipe)
    return ["recipe", *(f"  {line}" for line in lines)] if lines else []


def _limits(result: DiffResult, mark: Mark) -> list[str]:
    if not result.thresholds:
        return []
    over = {v.name: v.measured for v in result.violations}
    lines = ["limits"]
    for name, limit in result.thresholds:
        word = mark("over", "bad") if name in over else mark("kept", "good")
        got = f", got {plain_number(over[name])}" if name in over else ""
        lines.append(f"  {word}  {name} {plain_number(limit)}{got}")
    return lines


def _figures(result: DiffResult) -> list[str]:
    rows = figure_rows(result)
    if not rows:
        return []
    cells = [("figures", "A", "B", "")] + [(r.label, r.before, r.after, r.change) for r in rows]
    wide = [max(len(row[i]) for row in cells) for i in range(3)]
    lines = []
    for i, (label, before, after, change) in enumerate(cells):
        indent = "" if i == 0 else "  "
        line = (
            f"{indent}{label:<{wide[0] + 2 - len(indent)}}  {before:>{wide[1]}}  {after:>{wide[2]}}"
        )
        lines.append(f"{line}  {change}".rstrip())
    return lines


def map_lines(result: DiffResult) -> list[str]:
    """Return the layers at a glance: one character each for graph, plan, weights and errors."""
    cells = layer_cells(result)
    errors = [c.numbers or LayerDiff(c.layer) for c in cells]
    rows = {
        "graph": "".join(c.graph or _SAME for c in cells),
        "plan": "".join("~" if c.plan else _SAME for c in cells),
        "weights": "".join("~" if c.weights else _SAME for c in cells),
        "hidden state": _steps([e.hidden for e in errors]),
        "cached keys": _steps([e.key for e in errors]),
        "cached values": _steps([e.value for e in errors]),
        "stored codes": _steps([e.codes for e in errors]),
    }
    rows = {label: row for label, row in rows.items() if row.strip(_SAME + " ")}
    if not rows or not cells:
        return []
    tips = _tips(errors)
    lines = []
    for start in range(0, len(cells), _PER_LINE):
        stop = min(start + _PER_LINE, len(cells))
        lines.append(f"{'layers' if start == 0 else '':<15}  {_ruler(start, stop)}")
        for label, row in rows.items():
            tip = f"  {tips[label]}" if label in tips and stop == len(cells) else ""
            lines.append(f"  {label:<13}  {row[start:stop]}{tip}")
    return lines


def _ruler(start: int, stop: int) -> str:
    marks = "".join(f"{layer:<10}" for layer in range(start, stop, 10))
    return marks[: stop - start + 2].rstrip()


def _steps(errors: Sequence[float | None]) -> str:
    return "".join(_step(error) for error in errors)


def _step(error: float | None) -> str:
    if error is None:
        return " "
    if error == 0:
        return _SAME
    if not math.isfinite(error):
        return "!"
    power = math.floor(math.log10(error)) + len(_STEPS)
    return _STEPS[min(max(power, 0), len(_STEPS) - 1)]


def _tips(errors: Sequence[LayerDiff]) -> dict[str, str]:
    """Return the largest error of every row of the map, in words."""
    labels = {
        "hidden state": "hidden",
        "cached keys": "key",
        "cached values": "value",
        "stored codes": "codes",
    }
    tips = {}
    for label, name in labels.items():
        found = [(getattr(e, name), -e.layer) for e in errors if getattr(e, name) is not None]
        if found:
            worst, layer = max(found)
            tips[label] = f"up to {plain_number(worst)}, layer {-layer}"
    return tips


def _numbers(result: DiffResult) -> Iterator[list[str]]:
    numeric = result.numeric
    if numeric is None:
        return
    lines = [f"both run on {plain_line(numeric.inputs)}"]
    if numeric.logits is not None:
        got = numeric.logits
        lines.append(
            f"  logits   largest difference {plain_number(got.max_abs)}"
            f" ({plain_number(got.relative)} of the largest logit;"
            f" rounding is below {plain_number(numeric.tolerance)})"
        )
        lines.append(
            f"  tokens   KL {plain_number(got.kl)} nats,"
            f" same next token at {plain_percent(got.top1)} of positions"
        )
    if numeric.first_layer is not None and not result.is_same:
        lines.append(f"  parting  first in layer {numeric.first_layer}")
    if numeric.schedules:
        lines.append(f"  caches   {', '.join(map(plain_line, numeric.schedules))}")
    lines += [f"           {plain_line(complaint)}" for complaint in numeric.complaints]
    if numeric.text is not None:
        at = numeric.text.parted_at
        after = "the same" if at is None else f"parts after {at} token{'' if at == 1 else 's'}"
        lines.append(f"  text     {after}, prompt {plain_line(repr(numeric.text.prompt))}")
        lines.append(f"           A {plain_line(repr(numeric.text.before))}")
        if at is not None:
            lines.append(f"           B {plain_line(repr(numeric.text.after))}")
    yield lines


def _structure(structure: StructureDiff | None, count: int) -> Iterator[list[str]]:
    if structure is None:
        return
    yield _changes("graph", structure.nodes, count)
    if structure.ports:
        lines = ["inputs, outputs and planes of the cache"]
        for port in fold_ports(structure.ports):
            where = f"{layer_words(port.layers, count)}  " if port.layers else ""
            change = _arrow(port.before, port.after)
            lines.append(f"  {port.kind:<6}  {where}{plain_line(port.name)}  {change}")
        yield lines
    if structure.histogram:
        counts = (f"{plain_line(h.op)} {h.before} -> {h.after}" for h in structure.histogram)
        yield ["operations by kind", *(f"  {text}" for text in counts)]


def _changes(title: str, changes: Sequence[Change], count: int) -> list[str]:
    if not changes:
        return []
    layers = {change.layer for change in changes} - {None}
    what = "differs" if len(changes) == 1 else "differ"
    lines = [f"{title}: {len(changes)} {what}, in {len(layers)} of {count} layers"]
    for block in blocks_of(changes):
        lines += block_lines(block, count)
    return lines


def block_lines(block: Block[Change], count: int) -> Iterator[str]:
    """Yield the changes of a block under the layers that have them; `count` is that of all."""
    yield f"  {layer_words(block.layers, count)}"
    lines = list(_lines(block))
    yield from lines[:_MOST_LINES]
    if len(lines) > _MOST_LINES:
        yield f"    ... and {len(lines) - _MOST_LINES} lines more"


def _lines(block: Block[Change]) -> Iterator[str]:
    for folded in block.changes:
        change, times = folded.change, f"  {often(folded)}".rstrip()
        if isinstance(change, NodeChange):
            yield from _node(change, times)
        elif isinstance(change, WeightChange):
            detail = f"  {plain_line(change.detail)}" if change.detail else ""
            by = f"by {'up to ' if folded.count > 1 else ''}{plain_number(change.relative)}"
            yield f"    {plain_line(change.role)}: {change.cause}, {by}{detail}{times}"
    for line in plan_lines(block):
        words = f"{plain_line(line.field)}  {_arrow(line.before, line.after)}  {line.times}"
        yield f"    {words}".rstrip()


def _node(change: NodeChange, times: str) -> Iterator[str]:
    by = "in A from" if change.kind == "removed" else "by"
    via = f"  {by} {', '.join(map(plain_line, change.via))}" if change.via else ""
    if change.calls:
        via = f"  for {', '.join(map(plain_line, change.calls))}{via}"
    if change.kind in ("added", "removed"):
        yield f"    {sign_of([change])} {plain_line(change.after or change.before)}{times}{via}"
        return
    what = f"  {plain_line(change.what)}" if change.what else ""
    yield f"    ~ {plain_line(change.op)}{what}{times}{via}"
    sides = [("A", change.before), ("B", change.after)]
    for side, line in sides if change.before != change.after else [("A and B", change.before)]:
        if line:
            yield f"        {side} {plain_line(line)}"


def _arrow(before: str, after: str) -> str:
    return f"{plain_line(before) or 'none'} -> {plain_line(after) or 'none'}"
