"""Thresholds: files of limits, what they measure, and that nothing passes unmeasured."""

from __future__ import annotations

import pytest

from kvxform.diffing.records import (
    DiffResult,
    Finding,
    LayerDiff,
    LogitsDiff,
    MetricChange,
    NodeChange,
    NumericDiff,
    PlanChange,
    SideSummary,
    StructureDiff,
    Violation,
    WeightChange,
)
from kvxform.diffing.thresholds import MEASURES, check_thresholds, load_thresholds
from kvxform.errors import KvxformError

SIDE = SideSummary("a", "program")
FULL = DiffResult(
    SIDE,
    SIDE,
    structure=StructureDiff(
        nodes=(NodeChange("added", 0, "x", ""), NodeChange("rewired", 1, "y", ""))
    ),
    plan=(PlanChange(0, "key", "codec.bits", "4", "3"),),
    weights=(WeightChange(0, "q", "values", 0.5),),
    metrics=(
        MetricChange("kv_bytes_per_token", 100.0, 125.0),
        MetricChange("bits_per_value", 4.25, 4.25),
        MetricChange("read_bytes", None, 8.0),
    ),
    numeric=NumericDiff(
        "16 tokens",
        LogitsDiff(max_abs=0.5, relative=0.01, kl=0.02, top1=0.9),
        1e-5,
        layers=(LayerDiff(0, hidden=0.1), LayerDiff(1, hidden=0.3, key=0.2)),
        complaints=("lengths differ",),
    ),
    findings=(Finding("x", "error", "x"), Finding("y", "warning", "y")),
)
MEASURED = {
    "max_kl": 0.02,
    "max_abs": 0.5,
    "max_relative": 0.01,
    "min_top1": 0.9,
    "max_hidden": 0.3,
    "max_key": 0.2,
    "max_complaints": 1,
    "max_nodes_changed": 2,
    "max_nodes_added": 1,
    "max_nodes_removed": 0,
    "max_plan_changes": 1,
    "max_weights_changed": 1,
    "max_errors": 1,
    "max_kv_bytes_per_token": 125,
    "max_kv_bytes_per_token_growth": 0.25,
    "max_bits_per_value_growth": 0,
    "max_read_bytes": 8,
}


def refusal(source) -> KvxformError:
    with pytest.raises(KvxformError) as caught:
        load_thresholds(source)
    return caught.value


@pytest.mark.parametrize(("name", "measured"), MEASURED.items())
def test_a_limit_holds_up_to_what_was_measured_and_not_beyond(name, measured):
    worse = 0.01 if name.startswith("min_") else -0.01
    held = check_thresholds(FULL, {name: measured})
    assert (held.violations, held.exit_code) == ((), 0)
    broken = check_thresholds(FULL, {name: measured + worse})
    assert broken.violations == (Violation(name, measured + worse, measured),)
    assert broken.exit_code == 1


@pytest.mark.parametrize("name", ["max_value", "max_codes", "max_read_bytes_growth"])
def test_what_was_not_measured_cannot_pass(name):
    with pytest.raises(KvxformError, match=r"KVX113.*must be measured"):
        check_thresholds(FULL, {name: 1})


def test_every_threshold_says_what_it_needs_when_there_is_nothing():
    always = {"max_plan_changes", "max_weights_changed", "max_errors"}
    for name in MEASURES.keys() - always:
        with pytest.raises(KvxformError, match=r"KVX113.*Hint: (run|compare)"):
            check_thresholds(DiffResult(SIDE, SIDE), {name: 1e9})
    assert not check_thresholds(DiffResult(SIDE, SIDE), dict.fromkeys(always, 0)).violations


def test_a_lock_has_no_weights_that_could_be_equal():
    lock = DiffResult(SideSummary("a", "lock"), SIDE)
    with pytest.raises(KvxformError, match="KVX113"):
        check_thresholds(lock, {"max_weights_changed": 0})


def test_a_measurement_that_is_no_number_breaks_every_limit():
    logits = LogitsDiff(*[float("nan")] * 4)
    result = DiffResult(SIDE, SIDE, numeric=NumericDiff("x", logits, 1e-5))
    assert len(check_thresholds(result, {"max_kl": 1e9, "min_top1": 0}).violations) == 2


def test_files_of_both_kinds_are_read_in_their_order(tmp_path):
    yaml, json = tmp_path / "limits.yaml", tmp_path / "limits.json"
    yaml.write_text("min_top1: 1\nmax_kl: 1e-3  # nats\n", encoding="utf-8")
    json.write_text('{"min_top1": 1, "max_kl": 0.001}', encoding="utf-8")
    assert list(load_thresholds(yaml).items()) == [("min_top1", 1.0), ("max_kl", 0.001)]
    assert load_thresholds(str(json)) == load_thresholds(yaml)
    assert load_thresholds(None) == {}


def test_an_unknown_name_is_refused_with_its_line_and_the_nearest_one(tmp_path):
    path = tmp_path / "limits.yaml"
    path.write_text("max_kl: 1\nmin_topl: 0.9\n", encoding="utf-8")
    error = refusal(path)
    assert (error.code, error.at) == ("KVX111", "limits.yaml:2")
    assert "did you mean 'min_top1'" in str(error)


@pytest.mark.parametrize("limit", ["low", True, None, float("nan"), [1]])
def test_a_limit_must_be_a_number(limit):
    assert refusal({"max_kl": limit}).code == "KVX112"


@pytest.mark.parametrize("text", ["- max_kl\n", "max_kl: [\n", "5\n"])
def test_a_file_that_is_none_is_refused(text, tmp_path):
    path = tmp_path / "limits.yaml"
    path.write_text(text, encoding="utf-8")
    assert refusal(path).code == "KVX110"
    assert refusal(tmp_path / "none.yaml").code == "KVX110"
