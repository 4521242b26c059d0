"""A diff as SARIF 2.1.0: findings with their source lines, for code scanning."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any
from urllib.parse import quote

from kvxform.diffing.digest import layer_count, layer_words, limit_sentence, ranked
from kvxform.diffing.records import DiffResult, Finding, Violation
from kvxform.formats import plain_line, rounded

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_SOURCE_LINE = re.compile(r"([\w.\-/]+\.\w+):(\d+)")  # `sdpa (modeling_llama.py:271)`


def render_sarif(result: DiffResult) -> str:
    """Return a diff as a SARIF log with one run.

    A finding with a source line is placed there, every other one at the second side.
    """
    count = layer_count(result)
    results = [_violation(result, v) for v in result.violations]
    results += [_finding(result, finding, count) for finding in ranked(result.findings)]
    ids = list(dict.fromkeys(entry["ruleId"] for entry in results))
    for entry in results:
        entry["ruleIndex"] = ids.index(entry["ruleId"])
    run = {
        "tool": {"driver": {"name": "kvxform", "rules": [_rule(i) for i in ids]}},
        "results": results,
        "properties": {"is_same": result.is_same, "exit_code": result.exit_code},
    }
    log = {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}
    return json.dumps(rounded(log), indent=1, ensure_ascii=False)


def _rule(rule: str) -> dict[str, Any]:
    words = rule.replace("-", " ").replace("/", ": ").replace("_", " ")
    name = "".join(word.capitalize() for word in re.split(r"[^a-zA-Z0-9]+", rule))
    return {"id": rule, "name": name, "shortDescription": {"text": words}}


def _violation(result: DiffResult, violation: Violation) -> dict[str, Any]:
    text = limit_sentence(violation)
    return _entry(f"limit/{violation.name}", "error", text, _place(result.b.name))


def _finding(result: DiffResult, finding: Finding, count: int) -> dict[str, Any]:
    source = _SOURCE_LINE.search(finding.origin)
    place = _place(source[1], int(source[2])) if source else _place(result.b.name)
    if finding.layers:
        place["logicalLocations"] = [
            {"name": f"layer {layer}", "fullyQualifiedName": f"layers.{layer}", "kind": "module"}
            for layer in finding.layers
        ]
    where = f"{layer_words(finding.layers, count)}: " if finding.layers else ""
    return _entry(finding.rule, finding.severity, f"{where}{finding.message}", place)


def _entry(rule: str, level: str, text: str, place: dict[str, Any]) -> dict[str, Any]:
    message = plain_line(text)
    print_ = hashlib.sha256(f"{rule}\n{message}".encode()).hexdigest()
    return {
        "ruleId": rule,
        "level": level,
        "message": {"text": message},
        "locations": [place],
        "partialFingerprints": {"finding/v1": print_},
    }


def _place(path: str, line: int | None = None) -> dict[str, Any]:
    physical: dict[str, Any] = {"artifactLocation": {"uri": quote(path)}}
    if line is not None:
        physical["region"] = {"startLine": line}
    return {"physicalLocation": physical}
