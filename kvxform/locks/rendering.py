"""Checks of lock files as text, JSON, Markdown, JUnit, SARIF or HTML."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from typing import Any

from kvxform.diffing.digest import FIGURES, format_metric, verdict
from kvxform.diffing.records import DiffResult
from kvxform.diffing.render_html import render_html
from kvxform.diffing.render_json import render_json
from kvxform.diffing.render_junit import render_junit
from kvxform.diffing.render_markdown import render_markdown
from kvxform.diffing.render_sarif import render_sarif
from kvxform.diffing.render_text import render_text
from kvxform.errors import KvxformError
from kvxform.locks.runs import Checked

_MOST_CHARACTERS = 60_000  # GitHub refuses comments above 65536
_SHOWN = ("kv_bytes_per_token", "bits_per_value")
_WORDS = {  # of one lock, of several
    "error": ("cannot be built", "cannot be built"),
    "out of date": ("is out of date", "are out of date"),
    "changed": ("changed", "changed"),
    "new": ("is new", "are new"),
    "updated": ("was updated", "were updated"),
    "same": ("is the same", "are the same"),
}
_ICONS = {"error": "❌", "out of date": "❌", "same": "✅"}  # every other answer: look at it
_RULER = "=" * 80
_ABOUT = (
    "A lock says what a build was when it was committed: its graph, cache and outputs. "
    "This is what is built now."
)
_ADVICE = (
    "If the changes are wanted: run `kvxform check --update` on the locks that are out of date, "
    "and commit them."
)


def render_checks(checks: Sequence[Checked], form: str) -> str:
    """Return checks without a final line break.

    Args:
        checks: At least one.
        form: `text`, `json`, `markdown`, `junit`, `sarif` or `html`.

    Raises:
        KvxformError: KVX801 for HTML of several locks.
    """
    return _FORMS[form](checks)


def _text(checks: Sequence[Checked]) -> str:
    blocks = []
    for check in checks:
        line, shown = f"{answer(check):13}{check.path}", check.shown
        if shown is None:
            blocks.append(f"{line}\n  {check.error}")
        elif shown.is_same:
            blocks.append(line)
        else:
            blocks.append(f"{_RULER}\n{line}\n{_RULER}\n{render_text(shown)}\n")
    if len(checks) > 1:
        blocks.append(_count(checks))
    return "\n".join(blocks)


def _json(checks: Sequence[Checked]) -> str:
    data = [
        {
            "lock": check.path,
            "answer": answer(check),
            "exit_code": check.exit_code,
            "error": check.error,
            "diff": None if check.shown is None else json.loads(render_json(check.shown)),
        }
        for check in checks
    ]
    return json.dumps({"locks": data}, indent=1, ensure_ascii=False)


def _markdown(checks: Sequence[Checked]) -> str:
    other = [check for check in checks if answer(check) != "same"]
    worst = next(key for key in _WORDS if any(answer(check) == key for check in checks))
    blocks = [f"### {_ICONS.get(worst, '⚠️')} kvxform: {_count(checks)}", _ABOUT]
    if other:
        heads = ["lock", "", *(FIGURES[name] for name in _SHOWN), "what changed"]
        rows = [heads, ["---", "---", "---:", "---:", "---"], *map(_row, other)]
        blocks.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    if worst == "out of date":
        blocks.append(_ADVICE)
    for check in other:
        if check.shown is not None and not check.shown.is_same:
            body = _folded(check.path, check.shown, is_open=len(other) == 1)
            fits = sum(map(len, [*blocks, body])) < _MOST_CHARACTERS
            blocks.append(body if fits else f"`{check.path}`: too long for a comment.")
    return "\n\n".join(blocks)


def _row(check: Checked) -> list[str]:
    """Return the cells of one lock; what only a build tells is empty without one."""
    word = answer(check)
    cells = [f"`{check.path}`", f"{_ICONS.get(word, '⚠️')} {word}"]
    if check.shown is None:
        return [*cells, "", "", _cell(check.error)]
    found = {metric.name: metric for metric in check.shown.metrics}
    for name in _SHOWN:
        metric = found.get(name)
        if metric is None or (metric.before is None and metric.after is None):
            cells.append("")
            continue
        before, after = (format_metric(name, x) for x in (metric.before, metric.after))
        cells.append(before if before == after else f"{before} → **{after}**")
    return [*cells, "" if word == "new" else _cell(verdict(check.shown).sentence)]


def _cell(text: str) -> str:
    return re.sub(r"([|<>*_`@\[\]])", r"\\\1", " ".join(text.split()))


def _folded(path: str, result: DiffResult, *, is_open: bool) -> str:
    head = f"<details{' open' if is_open else ''}><summary><code>{path}</code></summary>"
    return f"{head}\n\n{render_markdown(result)}\n\n</details>"


def _junit(checks: Sequence[Checked]) -> str:
    root = ElementTree.Element("testsuites", name="kvxform check")
    for check in checks:
        if check.result is None:
            suite = ElementTree.SubElement(
                root, "testsuite", name=check.path, tests="1", failures="0", errors="1"
            )
            case = ElementTree.SubElement(suite, "testcase", classname=check.path, name="build")
            ElementTree.SubElement(case, "error", message=check.error)
            continue
        for suite in ElementTree.fromstring(render_junit(check.result)):
            suite.set("name", f"{check.path}: {suite.get('name')}")
            root.append(suite)
    for name in ("tests", "failures", "errors"):
        root.set(name, str(sum(int(suite.get(name, "0")) for suite in root)))
    ElementTree.indent(root, " ")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, "unicode")


def _sarif(checks: Sequence[Checked]) -> str:
    log: dict[str, Any] = {"version": "2.1.0"}
    runs: list[dict[str, Any]] = []
    for check in checks:
        if check.result is not None:
            log = json.loads(render_sarif(check.result))
            # one category a lock, or code scanning takes one for the other
            name = {"automationDetails": {"id": f"kvxform/{check.path}/"}}
            runs.extend({**run, **name} for run in log["runs"])
    return json.dumps({**log, "runs": runs}, indent=1, ensure_ascii=False)


def _html(checks: Sequence[Checked]) -> str:
    if len(checks) == 1 and checks[0].shown is not None:
        return render_html(checks[0].shown)
    rule = "an HTML page is of one lock that can be built"
    raise KvxformError("KVX801", rule, where="check", got=_count(checks))


def answer(check: Checked) -> str:
    """Return a key of `_WORDS`: `out of date` asks for an update, `changed` was updated."""
    if check.result is None:
        return "error"
    if check.updated:
        return "updated"
    if not check.result.is_same:
        return "out of date"
    if check.since is not None and not check.since.is_same:
        return "changed"
    return "new" if check.is_new else "same"


def _count(checks: Sequence[Checked]) -> str:
    """Return how many locks have each answer, in words."""
    found = [answer(check) for check in checks]
    total = "the lock" if len(found) == 1 else f"all {len(found)} locks"
    if len(set(found)) == 1:
        return f"{total} {_WORDS[found[0]][len(found) > 1]}"
    parts = [f"{found.count(key)} {_WORDS[key][found.count(key) > 1]}" for key in _WORDS]
    return ", ".join(part for part in parts if not part.startswith("0 "))


_FORMS: dict[str, Callable[[Sequence[Checked]], str]] = {
    "text": _text,
    "json": _json,
    "markdown": _markdown,
    "junit": _junit,
    "sarif": _sarif,
    "html": _html,
}
