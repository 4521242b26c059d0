"""Changes of many layers as one: blocks, planes of the cache, findings."""

from __future__ import annotations

from diff_samples import LAYERS, range_all, recipe_change

from kvxform.diffing.blocks import blocks_of, fold_ports, group_findings, often, plan_lines
from kvxform.diffing.records import Finding, NodeChange, PlanChange, PortChange


def test_layers_with_the_same_changes_share_a_block_and_exceptions_stand_apart():
    blocks = blocks_of(recipe_change().structure.nodes)
    assert [block.layers for block in blocks] == [range_all(), (12,), ()]
    assert [len(block.changes) for block in blocks] == [1, 1, 1]
    assert often(blocks[0].changes[0]) == "x2"
    assert often(blocks[1].changes[0]) == ""


def test_a_change_that_is_not_as_often_in_every_layer_is_counted_in_all():
    nodes = [NodeChange("added", layer, "op", "", after="op()") for layer in (0, 0, 1)]
    (block,) = blocks_of(nodes)
    assert often(block.changes[0]) == "3 in all"


def test_what_keys_and_values_have_in_common_is_one_line():
    changes = [PlanChange(0, s, "codec.bits", "4", "2") for s in ("key", "value")]
    changes += [PlanChange(0, "key", "basis", "hadamard", "identity")]
    (block,) = blocks_of([*changes, PlanChange(0, "", "owner", "0", "1")])
    assert [(line.field, line.before, line.after) for line in plan_lines(block)] == [
        ("key and value codec.bits", "4", "2"),
        ("key basis", "hadamard", "identity"),
        ("owner", "0", "1"),
    ]


def test_planes_of_many_layers_are_one_line_and_other_planes_are_not():
    ports = [PortChange("cache", f"layer {i} key.codes", "u8[8]", "u8[4]") for i in range(LAYERS)]
    ports.append(PortChange("cache", "layer 3 value.codes", "u8[8]", ""))
    ports.append(PortChange("input", "position_ids", "", "i64[B, S]"))
    found = [(group.name, group.layers) for group in fold_ports(ports)]
    assert found == [("key.codes", range_all()), ("value.codes", (3,)), ("position_ids", ())]


def test_findings_that_say_the_same_of_their_own_layer_are_one():
    findings = [
        Finding("layer-owner", "warning", f"owner layer {i} -> layer {i - 1}", (i,), "x.py:1")
        for i in (1, 3, 5)
    ]
    (group,) = group_findings(findings)
    assert group.layers == (1, 3, 5)
    assert group.shown == ["owner layer 1 -> layer 0, and likewise in the others"]
    assert group.origin == "x.py:1"


def test_findings_that_say_something_else_of_their_layer_stay_apart():
    found = [Finding("layer-owner", "error", f"owner layer {i} -> layer 0", (i,)) for i in (1, 2)]
    groups = group_findings([*found, Finding("layer-owner", "note", found[0].message, (1,))])
    assert [(g.severity, g.layers) for g in groups] == [
        ("error", (1,)),
        ("error", (2,)),
        ("note", (1,)),
    ]


def test_findings_with_one_rule_and_the_same_layers_are_one_and_what_tells_most_is_first():
    fields = ("codec.axis token -> channel", "codec.bits 4 -> 2", "a", "b", "c")
    findings = [
        Finding("codec", "warning", f"{stream}: {field}", (0, 1))
        for stream in ("keys", "values")
        for field in fields
    ]
    (group,) = group_findings(findings)
    assert group.messages[0] == "keys and values: codec.bits 4 -> 2"
    assert len(group.messages) == 5
    assert group.shown[3:] == ["and 2 more"]
