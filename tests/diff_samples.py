"""Diffs for tests of renderers: each is built by hand, so that what must be said is known."""

from __future__ import annotations

import dataclasses
import math

from kvxform.diffing.records import (
    CountChange,
    DiffResult,
    Finding,
    LayerDiff,
    LogitsDiff,
    MetricChange,
    NodeChange,
    NumericDiff,
    PlanChange,
    PortChange,
    RecipeChange,
    SideSummary,
    StructureDiff,
    TextDiff,
    Violation,
    WeightChange,
)

LAYERS = 30
A = SideSummary("out/main", "artifact", "smollm2-135m", "kv4", LAYERS, 1204)
B = SideSummary("out/branch", "artifact", "smollm2-135m", "kv4", LAYERS, 1204)
SDPA = "sdpa (modeling_llama.py:271)"
EQUAL = tuple(
    MetricChange(name, value, value)
    for name, value in (("kv_bytes_per_token", 6480.0), ("bits_per_value", 4.5))
)


def same() -> DiffResult:
    """Return what two builds of one commit give: only a name differs."""
    note = Finding("renamed", "note", "1 node has another name")
    layers = tuple(LayerDiff(i, 0.0, 0.0, 0.0, 0.0) for i in range(LAYERS))
    logits = LogitsDiff(0.0, 0.0, 0.0, 1.0)
    numeric = NumericDiff("4 sequences of 48 tokens", logits, 3e-5, layers, None, ("decode",))
    structure = StructureDiff(renamed=1)
    return DiffResult(A, B, structure, metrics=EQUAL, numeric=numeric, findings=(note,))


def rope_fault() -> DiffResult:
    """Return what another RoPE theta in layer 7 gives."""
    errors = [0.0] * 7 + [0.5 / (1 + i) for i in range(LAYERS - 7)]
    layers = tuple(LayerDiff(i, e, e * 2 if i == 7 else e, e / 2, e) for i, e in enumerate(errors))
    finding = Finding(
        "rope-frequencies",
        "error",
        "RoPE frequencies differ: theta 10000 -> 500000",
        (7,),
        "cos (modeling_llama.py:118)",
    )
    return DiffResult(
        A,
        B,
        structure=StructureDiff(),
        weights=(WeightChange(7, "inv_freq", "values", 0.31, "theta 10000 -> 500000"),),
        metrics=EQUAL,
        numeric=NumericDiff(
            "4 sequences of 48 tokens",
            LogitsDiff(4.25, 0.18, 0.0713, 0.912),
            3e-5,
            layers,
            7,
            ("ragged prefill and decode", "page reuse"),
            text=TextDiff("The capital of", " France is Paris.", " France was\nbuilt", 2),
        ),
        findings=(finding,),
    )


def _recipe_nodes() -> tuple[NodeChange, ...]:
    nodes = []
    for layer in range(LAYERS):
        where = {"layer": layer, "module": f"model.layers.{layer}.self_attn", "origin": SDPA}
        line = "kvx.hadamard(%, 64)"
        nodes += [
            NodeChange("added", op="kvx.hadamard", what="", after=line, via=("rotate-qk",), **where)
        ] * 2
        if layer == 12:
            nodes.append(
                NodeChange(
                    "changed",
                    op="kvx.cached_attention",
                    what="window none -> 128",
                    before="kvx.cached_attention(%, %, %)",
                    after="kvx.cached_attention(%, %, %, window=128)",
                    **where,
                )
            )
    nodes.append(
        NodeChange("removed", None, "aten.clone", "", "aten.clone(%)", module="model.norm")
    )
    return tuple(nodes)


def recipe_change(**changes: object) -> DiffResult:
    """Return what a recipe with fewer bits and a rotation more gives, one layer apart."""
    bits = [
        PlanChange(i, s, "codec.bits", "4", "2") for i in range(LAYERS) for s in ("key", "value")
    ]
    layers = tuple(LayerDiff(i, 0.01 * (i + 1), 0.2, 0.3, None) for i in range(LAYERS))
    result = DiffResult(
        A,
        dataclasses.replace(B, recipe="kv2", nodes=1264),
        structure=StructureDiff(
            _recipe_nodes(),
            (PortChange("cache", "layer 0 key.codes", "u8[1, 3, s0, 32]", "u8[1, 3, s0, 16]"),),
            (CountChange("aten.clone", 1, 0), CountChange("kvx.hadamard", 0, 60)),
        ),
        plan=(PlanChange(None, "", "layout", "contiguous", "paged(64)"), *bits),
        metrics=(
            MetricChange("kv_bytes_per_token", 6480.0, 3600.0),
            MetricChange("bits_per_value", 4.5, 2.5),
            MetricChange("flops_per_token", None, 269000000.0),
            MetricChange("parameters", 134515008.0, 134515008.0),
        ),
        numeric=NumericDiff(
            "4 sequences of 48 tokens", LogitsDiff(9.5, 0.4, 0.213, 0.77), 3e-5, layers, 0
        ),
        findings=(
            Finding("codec", "warning", "keys and values are stored in 2 bits, not 4", range_all()),
            Finding("window", "error", "attention window none -> 128", (12,), SDPA),
            Finding("operations", "warning", "rotate-qk added 60 operations", range_all(), SDPA),
        ),
        recipe=(
            RecipeChange("added", "rotate-qk", after="block 64"),
            RecipeChange("changed", "quantize-kv", "key.bits", "4", "2"),
        ),
    )
    return dataclasses.replace(result, **changes)


def range_all() -> tuple[int, ...]:
    """Return all layers."""
    return tuple(range(LAYERS))


def over_limits() -> DiffResult:
    """Return a change of recipe that breaks one of two limits."""
    return recipe_change(
        thresholds=(("max_bits_per_value", 4.0), ("max_kl", 0.1)),
        violations=(Violation("max_kl", 0.1, 0.213),),
    )


def within_limits() -> DiffResult:
    """Return a change of recipe that keeps its limits."""
    return recipe_change(thresholds=(("max_kl", 0.5),))


def bare() -> DiffResult:
    """Return a diff of which almost nothing is known: no graph, nothing run."""
    side = SideSummary("model.onnx", "onnx")
    return DiffResult(side, dataclasses.replace(side, name="other.onnx"))


def hostile() -> DiffResult:
    """Return a diff whose every text tries to break out of its format."""
    nasty = 'x" | `y` <b>&amp;</b> ]]> \x1b[31m\x00\n# @all'
    return DiffResult(
        SideSummary(nasty, "program", nasty, nasty, 1, 1),
        SideSummary(nasty, "program", nasty, nasty, 1, 1),
        structure=StructureDiff(
            (NodeChange("changed", 0, nasty, nasty, nasty, nasty, nasty, nasty, (nasty,)),),
            (PortChange("input", nasty, nasty, nasty),),
            (CountChange(nasty, 1, 2),),
        ),
        plan=(PlanChange(0, "key", nasty, nasty, nasty),),
        weights=(WeightChange(0, nasty, "shape", math.inf, nasty),),
        metrics=(MetricChange("bits_per_value", math.inf, 1.0),),
        numeric=NumericDiff(
            nasty,
            LogitsDiff(math.inf, math.nan, math.inf, 0.0),
            1e-5,
            (LayerDiff(0, math.inf, math.nan, None, 1.0),),
            0,
            (nasty,),
            (nasty,),
            TextDiff(nasty, nasty, nasty, 0),
        ),
        findings=(Finding("nasty-rule", "error", nasty, (0,), nasty),),
        thresholds=(("max_kl", 1.0),),
        violations=(Violation("max_kl", 1.0, math.inf),),
    )


ALL = {
    make.__name__: make()
    for make in (same, rope_fault, recipe_change, over_limits, within_limits, bare, hostile)
}
