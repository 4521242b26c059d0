"""A diff for machines: JSON both ways, JUnit that fails when CI does, SARIF by its standard."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree

import jsonschema
import pytest
from diff_samples import ALL, LAYERS, over_limits, recipe_change, rope_fault, same, within_limits

from kvxform.diffing.records import DiffResult
from kvxform.diffing.render_json import render_json
from kvxform.diffing.render_junit import render_junit
from kvxform.diffing.render_sarif import render_sarif

# What SARIF 2.1.0 (OASIS, sections 3.13 to 3.30) demands of the parts that are written.
TEXT = {"type": "object", "required": ["text"], "properties": {"text": {"type": "string"}}}
PLACE = {
    "type": "object",
    "required": ["physicalLocation"],
    "properties": {
        "physicalLocation": {
            "required": ["artifactLocation"],
            "properties": {
                "artifactLocation": {
                    "required": ["uri"],
                    "properties": {"uri": {"type": "string", "pattern": r"^[!-~]+$"}},
                },
                "region": {"properties": {"startLine": {"type": "integer", "minimum": 1}}},
            },
        },
        "logicalLocations": {"type": "array", "uniqueItems": True, "minItems": 1},
    },
}
RESULT = {
    "required": ["message", "ruleId", "locations"],
    "properties": {
        "message": TEXT,
        "level": {"enum": ["none", "note", "warning", "error"]},
        "locations": {"type": "array", "items": PLACE, "minItems": 1},
        "partialFingerprints": {"additionalProperties": {"type": "string"}},
    },
}
RULE = {"required": ["id"], "properties": {"shortDescription": TEXT}}
DRIVER = {
    "required": ["name"],
    "properties": {"rules": {"type": "array", "items": RULE, "uniqueItems": True}},
}
RUN = {
    "required": ["tool", "results"],
    "properties": {
        "tool": {"required": ["driver"], "properties": {"driver": DRIVER}},
        "results": {"type": "array", "items": RESULT},
    },
}
SARIF = {
    "required": ["version", "runs"],
    "properties": {
        "version": {"const": "2.1.0"},
        "runs": {"type": "array", "minItems": 1, "items": RUN},
    },
}


def results(result: DiffResult) -> list[dict]:
    return json.loads(render_sarif(result))["runs"][0]["results"]


def cases(result: DiffResult, suite: str) -> dict[str, str]:
    """Return the failure of every case of a suite by name; empty where it passed."""
    root = ElementTree.fromstring(render_junit(result))
    return {
        case.attrib["name"]: case.find("failure").attrib["message"]
        if case.find("failure") is not None
        else ""
        for case in root.findall(f"testsuite[@name='{suite}']/testcase")
    }


@pytest.mark.parametrize("name", [n for n in ALL if n != "hostile"])
def test_json_comes_back(name):
    data = json.loads(render_json(ALL[name]))
    assert data.pop("exit_code") == ALL[name].exit_code
    assert data.pop("is_same") == ALL[name].is_same
    assert DiffResult.from_data(data) == DiffResult.from_data(json.loads(json.dumps(data)))
    again = DiffResult.from_data(data)
    assert (again.findings, again.plan, again.a) == (
        ALL[name].findings,
        ALL[name].plan,
        ALL[name].a,
    )


def test_json_is_strict_where_numbers_are_not_finite():
    def refuse(word: str) -> None:
        raise AssertionError(word)

    data = json.loads(render_json(ALL["hostile"]), parse_constant=refuse)
    del data["exit_code"], data["is_same"]
    again = DiffResult.from_data(data)
    assert again.weights[0].relative == math.inf
    assert math.isnan(again.numeric.logits.relative)


def test_json_keeps_counts_and_rounds_measurements():
    data = json.loads(render_json(recipe_change()))
    assert [m["after"] for m in data["metrics"]][2:] == [269000000.0, 134515008.0]
    assert len(str(data["numeric"]["layers"][2]["hidden"])) <= 8


@pytest.mark.parametrize("name", ALL)
def test_junit_fails_if_and_only_if_ci_does(name):
    root = ElementTree.fromstring(render_junit(ALL[name]))
    failures = root.findall(".//failure")
    assert bool(failures) == bool(ALL[name].exit_code)
    assert root.attrib["failures"] == str(len(failures))
    assert root.attrib["tests"] == str(len(root.findall(".//testcase")))
    assert len(root.findall(".//testcase")) >= 1


def test_junit_has_a_case_for_each_layer_and_the_faulty_one_fails():
    layers = cases(rope_fault(), "layers")
    assert len(layers) == LAYERS
    assert [name for name, failure in layers.items() if failure] == ["layer 7"]
    assert "theta 10000 -> 500000" in layers["layer 7"]
    (finding,) = cases(rope_fault(), "findings").items()
    assert finding[0] == "rope-frequencies, layer 7"
    assert "modeling_llama.py:118" in finding[1]


def test_with_limits_only_they_decide():
    assert cases(over_limits(), "limits") == {
        "max_bits_per_value 4": "",
        "max_kl 0.1": "limit max_kl 0.1 is exceeded: got 0.213",
    }
    assert not any(cases(over_limits(), "findings").values())
    assert not any(cases(within_limits(), "limits").values())


@pytest.mark.parametrize("name", ALL)
def test_sarif_is_what_the_standard_asks_for(name):
    log = json.loads(render_sarif(ALL[name]))
    jsonschema.validate(log, SARIF)
    (run,) = log["runs"]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert all(rules[entry["ruleIndex"]] == entry["ruleId"] for entry in run["results"])


def test_sarif_places_a_finding_at_its_source_line_and_layers():
    (found,) = results(rope_fault())
    (place,) = found["locations"]
    assert place["physicalLocation"]["artifactLocation"]["uri"] == "modeling_llama.py"
    assert place["physicalLocation"]["region"]["startLine"] == 118
    assert [where["name"] for where in place["logicalLocations"]] == ["layer 7"]
    assert (found["level"], found["ruleId"]) == ("error", "rope-frequencies")


def test_sarif_places_the_rest_at_the_second_side_and_limits_are_errors():
    found = {entry["ruleId"]: entry for entry in results(over_limits())}
    assert found["limit/max_kl"]["level"] == "error"
    physical = found["codec"]["locations"][0]["physicalLocation"]
    assert physical == {"artifactLocation": {"uri": "out/branch"}}


def test_a_finding_keeps_its_fingerprint_and_another_one_has_its_own():
    prints = [entry["partialFingerprints"]["finding/v1"] for entry in results(recipe_change())]
    again = [entry["partialFingerprints"]["finding/v1"] for entry in results(recipe_change())]
    assert prints == again
    assert len(set(prints)) == 3


def test_sarif_of_equal_sides_has_notes_only():
    assert [entry["level"] for entry in results(same())] == ["note"]
