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
    "different": ("differs", "differ"),
    "updated": ("was updated", "were updated"),
    "same": ("is the same", "are the same"),
}
_RULER = "=" * 80
_ADVICE = "If this is what you wanted, run `kvxform check --update` on these locks and commit them."


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
        word = answer(check)
        if check.result is None:
            blocks.append(f"{word:11}{check.path}\n  {check.error}")
        elif check.result.is_same:
            blocks.append(f"{word:11}{check.path}")
        else:
            head = f"{_RULER}\n{word:11}{check.path}\n{_RULER}" if len(checks) > 1 else ""
            blocks += [part for part in (head, render_text(check.result)) if part]
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
            "diff": None if check.result is None else json.loads(render_json(check.result)),
        }
        for check in checks
    ]
    return json.dumps({"locks": data}, indent=1, ensure_ascii=False)


def _markdown(checks: Sequence[Checked]) -> str:
    other = [check for check in checks if answer(check) != "same"]
    if len(checks) == 1 and checks[0].result is not None:
        return render_markdown(checks[0].result)
    icon = "❌" if any(check.result is None for check in other) else "⚠️" if other else "✅"
    blocks = [f"### {icon} kvxform check: {_count(checks)}"]
    if other:
        heads = ["lock", "answer", *(FIGURES[name] for name in _SHOWN), "what changed"]
        rows = [heads, ["---", "---", "---:", "---:", "---"], *map(_row, other)]
        blocks.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    if any(answer(check) == "different" for check in other):
        blocks.append(_ADVICE)
    for check in other:
        if check.result is not None:
            body = _folded(check.path, check.result)
            fits = sum(map(len, [*blocks, body])) < _MOST_CHARACTERS
            blocks.append(body if fits else f"`{check.path}`: too long for a comment.")
    return "\n\n".join(blocks)


def _row(check: Checked) -> list[str]:
    """Return the cells of one lock; what only a build tells is empty without one."""
    cells = [f"`{check.path}`", answer(check)]
    if check.result is None:
        return [*cells, "", "", _cell(check.error)]
    found = {metric.name: metric for metric in check.result.metrics}
    for name in _SHOWN:
        metric = found.get(name)
        if metric is None or (metric.before is None and metric.after is None):
            cells.append("")
            continue
        before, after = (format_metric(name, x) for x in (metric.before, metric.after))
        cells.append(before if before == after else f"{before} → **{after}**")
    return [*cells, _cell(verdict(check.result).sentence)]


def _cell(text: str) -> str:
    return re.sub(r"([|<>*_`@\[\]])", r"\\\1", " ".join(text.split()))


def _folded(path: str, result: DiffResult) -> str:
    body = render_markdown(result)
    return f"<details><summary><code>{path}</code></summary>\n\n{body}\n\n</details>"


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
    if len(checks) == 1 and checks[0].result is not None:
        return render_html(checks[0].result)
    rule = "an HTML page is of one lock that can be built"
    raise KvxformError("KVX801", rule, where="check", got=_count(checks))


def answer(check: Checked) -> str:
    """Return `same`, `different`, `updated` or `error`."""
    if check.result is None:
        return "error"
    if check.updated:
        return "updated"
    return "same" if check.result.is_same else "different"


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
