"""Causes in words: what is said of what differs, and what is left out because it follows."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from kvxform.diffing.diagnose import diagnose
from kvxform.diffing.records import (
    Finding,
    LogitsDiff,
    MetricChange,
    NodeChange,
    NumericDiff,
    PlanChange,
    StructureDiff,
    WeightChange,
)
from kvxform.diffing.rules import RULES
from kvxform.diffing.symptoms import Symptom

SAME = LogitsDiff(0.0, 0.0, 0.0, 1.0)
FAR = LogitsDiff(0.5, 0.1, 0.01, 0.75)
WINDOW = NodeChange("changed", 3, "kvx.cached_attention", "window 24 -> 23", origin="sdpa (a.py:1)")


def numbers(logits: LogitsDiff = FAR, *symptoms: Symptom, **options) -> NumericDiff:
    return NumericDiff("text", logits, 1e-4, first_layer=3, symptoms=symptoms, **options)


def rules(findings: tuple[Finding, ...]) -> list[str]:
    return [finding.rule for finding in findings]


def test_every_rule_is_documented():
    page = Path(__file__).parents[2] / "docs" / "findings.md"
    named = set(re.findall(r"`([a-z-]+)`", page.read_text("utf-8")))
    assert set(RULES) <= named


def test_nothing_is_said_of_nothing():
    assert diagnose(None, (), (), (), None) == ()
    assert diagnose(StructureDiff(), (), (), (), numbers(SAME)) == ()


def test_equal_causes_of_many_layers_are_one_finding():
    nodes = tuple(dataclasses.replace(WINDOW, layer=layer) for layer in (4, 2, 3))
    other = dataclasses.replace(WINDOW, layer=7, what="window 24 -> 12")
    found = diagnose(StructureDiff((*nodes, other)), (), (), (), None)
    assert [f.layers for f in found] == [(2, 3, 4), (7,)]
    assert found[0] == Finding(
        "window", "warning", "attention: window 24 -> 23", (2, 3, 4), "sdpa (a.py:1)"
    )


def test_faults_come_first_then_changes_and_what_is_no_change_last():
    structure = StructureDiff((WINDOW,), renamed=2, moved=1)
    weights = (WeightChange(5, "q", "rows permuted", 0.3, "3 and 7 exchanged"),)
    metrics = (MetricChange("bits_per_value", 4.5, 3.25),)
    found = diagnose(structure, (), weights, metrics, numbers())
    assert rules(found) == ["weight-permuted", "window", "results", "cost", "renamed", "moved"]
    assert [f.severity for f in found] == ["error", *["warning"] * 3, "note", "note"]
    assert found[0].message == "rows permuted in q: 3 and 7 exchanged"
    assert "first in layer 3" in found[2].message
    assert found[3].message == "true bits a cached value 4.5 -> 3.25"


def test_causes_of_plans_and_weights_have_rules_of_their_own():
    plan = [
        PlanChange(1, "", "owner", "0", "1"),
        PlanChange(1, "key", "regions.sink", "2", "0"),
        PlanChange(1, "key", "regions.recent", "8", "0"),
        PlanChange(1, "value", "regions.dtype", "float32", "float16"),
        PlanChange(1, "value", "codec.bits", "4", "2"),
        PlanChange(None, "", "layout.page_size", "16", "64"),
        PlanChange(2, "", "payload", "kv", "k"),
    ]
    weights = [
        WeightChange(1, "inv_freq", "values", 0.2, "theta 10000 -> 500000"),
        WeightChange(1, "mlp.up", "dtype", 1e-4, "float32 -> float16"),
        WeightChange(1, "mlp.up", "scaled", 0.02, "by 1.02"),
        WeightChange(1, "mlp.up", "values", 0.02),
    ]
    found = diagnose(None, plan, weights, (), None)
    assert rules(found) == [
        "layer-owner",
        "sink",
        "recent",
        "dtype",
        "codec",
        "rope-frequencies",
        "dtype",
        "weight-scaled",
        "weight-values",
        "layout",
        "plan",
    ]
    assert found[1].message == "keys: regions.sink 2 -> 0"
    assert found[5].message == "other frequencies of RoPE: theta 10000 -> 500000"


def test_another_codec_explains_the_dtype_of_what_it_leaves():
    dtype = PlanChange(1, "key", "regions.dtype", "float32", "float16")
    codec = PlanChange(1, "key", "codec", "none(dtype=float32)", "int(bits=4)")
    assert rules(diagnose(None, [codec, dtype], (), (), None)) == ["codec"]
    other = dataclasses.replace(dtype, stream="value")
    assert rules(diagnose(None, [codec, other], (), (), None)) == ["codec", "dtype"]


def test_fields_of_a_stream_with_one_rule_are_one_cause():
    plan = [
        PlanChange(1, "key", "codec.bits", "4", "2"),
        PlanChange(1, "key", "codec.group", "", "32"),
        PlanChange(1, "value", "codec.bits", "4", "2"),
    ]
    found = diagnose(None, plan, (), (), None)
    assert [f.message for f in found] == [
        "keys: codec.bits 4 -> 2, codec.group none -> 32",
        "values: codec.bits 4 -> 2",
    ]


def test_another_owner_is_told_once():
    read = NodeChange("rewired", 1, "kvx.cached_attention", "cache cache_append -> cache_append")
    owner = PlanChange(1, "", "owner", "layer 1", "layer 0")
    shared = PlanChange(1, "", "shared_with", "", "layer 0")
    found = diagnose(StructureDiff((read,)), [shared, owner], (), (), None)
    assert [(f.rule, f.message) for f in found] == [("layer-owner", "owner layer 1 -> layer 0")]
    assert rules(diagnose(StructureDiff((read,)), (), (), (), None)) == ["layer-owner"]


def test_structure_has_causes_for_each_kind_of_change():
    nodes = [
        NodeChange("added", 0, "kvx.hadamard", "", via=("rotate-qk",)),
        NodeChange("retyped", 0, "aten.linear", "f32[B, S, 8] -> f16[B, S, 8]"),
        NodeChange("retyped", 0, "aten.linear", "f32[B, S, 8] -> f32[B, S, 9]"),
        NodeChange("rewired", 0, "aten.add.Tensor", "other linear -> embedding"),
        NodeChange("changed", 0, "kvx.attention", "scale 0.25 -> 1.0"),
        NodeChange("changed", 0, "kvx.rope", "interleaved False -> True"),
    ]
    found = diagnose(StructureDiff(tuple(nodes)), (), (), (), None)
    assert rules(found) == [
        "dtype",
        "attention-scale",
        "rope",
        "operations",
        "operations",
        "operands",
    ]
    assert found[3].message == "kvx.hadamard added by rotate-qk"


def test_symptoms_of_caches_are_faults():
    symptoms = [
        Symptom("page-order", 1, what="page 0 of row 0 holds page 1 of row 0"),
        Symptom("rewritten", 2, "key", what="codes changed after being stored", side="b"),
        Symptom("positions", 3, what="positions are off by +4", rows=(1,), padded_only=True),
        Symptom("plane-scaled", 4, "value", "scale", "every value is 1"),
        Symptom("plane-shifted", 5, "key", "zero", "shifted by 1", 1.0),
        Symptom("owner", 6, "key", what="holds what layer 0 should hold"),
    ]
    found = diagnose(StructureDiff(), (), (), (), numbers(FAR, *symptoms))
    assert rules(found) == [
        "page-order",
        "encoded-again",
        "positions",
        "scale",
        "zero-point",
        "layer-owner",
        "results",
    ]
    assert all(f.severity == "error" for f in found[:-1])
    assert found[1].message.endswith("in B")
    assert "padded rows alone" in found[2].message
    assert found[3].message == "dropped scales of values: every value is 1"


def test_what_follows_from_a_known_cause_is_left_out():
    follows = [
        Symptom("scoring", 3, what="window 24 -> 23"),
        Symptom("reads", 3, what="from position 23 on"),
        Symptom("inputs", 5, "key"),
    ]
    structure = StructureDiff((WINDOW,))
    found = diagnose(structure, (), (), (), numbers(FAR, *follows))
    assert rules(found) == ["window", "results"]
    earlier = Symptom("inputs", 2, "key")  # before the layer of the window
    found = diagnose(structure, (), (), (), numbers(FAR, *follows, earlier))
    assert rules(found) == ["inputs", "window", "results"]
    plan = (PlanChange(3, "key", "regions.sink", "2", "0"),)
    found = diagnose(None, plan, (), (), numbers(FAR, Symptom("sink", 3), Symptom("sink", 4)))
    assert [(f.rule, f.severity, f.layers) for f in found[:2]] == [
        ("sink", "error", (4,)),
        ("sink", "warning", (3,)),
    ]


def test_results_without_a_cause_are_a_fault():
    found = diagnose(StructureDiff(), (), (), (), numbers())
    assert rules(found) == ["unexplained"]
    assert found[0].severity == "error"


def test_rounding_is_no_change():
    small = LogitsDiff(1e-6, 1e-6, 0.0, 1.0)
    found = diagnose(StructureDiff(), (), (), (), numbers(small))
    assert rules(found) == ["rounding"]
    assert found[0].severity == "note"
    codes = LogitsDiff(0.1, 1e-2, 1e-3, 0.99)  # a code moved by rounding
    assert rules(diagnose(None, (), (), (), numbers(codes, kl_tolerance=2e-2))) == ["rounding"]
    assert rules(diagnose(None, (), (), (), numbers(codes))) == ["unexplained"]
    weight = (WeightChange(5, "q", "values", 0.3),)
    found = diagnose(None, (), weight, (), numbers(codes, kl_tolerance=2e-2))
    assert rules(found) == ["weight-values", "results"]


def test_complaints_are_faults():
    found = diagnose(None, (), (), (), numbers(SAME, complaints=("B: one byte is missing",)))
    assert [(f.rule, f.severity) for f in found] == [("account", "error")]
