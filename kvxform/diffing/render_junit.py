"""A diff as JUnit XML: what CI servers show as a list of tests.

Three suites: the limits that were given, the findings, and one case a layer. A case fails if and
only if it is why the exit code is 1: with limits, those exceeded; without, every finding that is
more than a note.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

from kvxform.diffing.digest import (
    LayerCell,
    layer_cells,
    layer_count,
    layer_words,
    limit_sentence,
    ranked,
    verdict,
)
from kvxform.diffing.records import DiffResult, Finding
from kvxform.formats import plain_line, plain_number

_SUITE = "kvxform diff"


def render_junit(result: DiffResult) -> str:
    """Return a diff as one JUnit XML document."""
    root = ElementTree.Element("testsuites", name=_SUITE)
    _add_suite(root, "limits", _limits(result))
    _add_suite(root, "findings", _findings(result))
    _add_suite(root, "layers", [_layer(result, cell) for cell in layer_cells(result)])
    for name in ("tests", "failures"):
        root.set(name, str(sum(int(suite.get(name, "0")) for suite in root)))
    ElementTree.indent(root, " ")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, "unicode")


def _add_suite(root: ElementTree.Element, name: str, cases: Sequence[ElementTree.Element]) -> None:
    if not cases:
        return
    failures = sum(case.find("failure") is not None for case in cases)
    suite = ElementTree.SubElement(
        root,
        "testsuite",
        {"name": name, "tests": str(len(cases)), "failures": str(failures), "errors": "0"},
    )
    suite.extend(cases)


def _case(
    group: str, name: str, *, failure: str = "", kind: str = "", said: str = ""
) -> ElementTree.Element:
    case = ElementTree.Element(
        "testcase", {"classname": f"{_SUITE}.{group}", "name": plain_line(name)}
    )
    if failure:
        found = ElementTree.SubElement(
            case, "failure", {"message": plain_line(failure), "type": kind}
        )
        found.text = plain_line(failure)
    if said:
        ElementTree.SubElement(case, "system-out").text = plain_line(said)
    return case


def _limits(result: DiffResult) -> list[ElementTree.Element]:
    over = {v.name: v for v in result.violations}
    cases = []
    for name, limit in result.thresholds:
        failure = limit_sentence(over[name]) if name in over else ""
        cases.append(
            _case("limits", f"{name} {plain_number(limit)}", failure=failure, kind="limit")
        )
    return cases


def _findings(result: DiffResult) -> list[ElementTree.Element]:
    if not result.findings:
        return [_case("findings", "sides are the same", said=verdict(result).sentence)]
    count = layer_count(result)
    return [_finding(result, finding, count) for finding in ranked(result.findings)]


def _finding(result: DiffResult, finding: Finding, count: int) -> ElementTree.Element:
    where = layer_words(finding.layers, count) if finding.layers else "model"
    origin = f", at {finding.origin}" if finding.origin else ""
    message = f"{finding.message}{origin}"
    fails = finding.severity != "note" and not result.thresholds
    return _case(
        "findings",
        f"{finding.rule}, {where}",
        failure=f"{where}: {message}" if fails else "",
        kind=finding.severity,
        said="" if fails else f"{finding.severity}: {message}",
    )


def _layer(result: DiffResult, cell: LayerCell) -> ElementTree.Element:
    words = "; ".join(finding.message for finding in cell.findings)
    fails = bool(words) and not result.thresholds
    counts = {"operations": cell.operations, "fields of the plan": cell.plan}
    counts["weights"] = cell.weights
    said = [f"{number} {what} differ" for what, number in counts.items() if number]
    if cell.error is not None:
        said.append(f"largest error {plain_number(cell.error)}")
    return _case(
        "layers",
        f"layer {cell.layer}",
        failure=words if fails else "",
        kind=cell.findings[0].severity if cell.findings else "",
        said=", ".join(said),
    )
