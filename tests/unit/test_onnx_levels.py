"""Which levels are legal for which programs, and the form that a package gets."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import get_type_hints

import onnx
import pytest
import torch
from cached import cached_program
from programs import apply

import kvxform.ir.ops as kvx
from kvxform.cli.packages import level_rows, level_table
from kvxform.codegen.onnx.capability import check_form, check_program
from kvxform.codegen.onnx.export import emit_model
from kvxform.codegen.onnx.forms import OnnxOptions, choose_form, legal_levels
from kvxform.codegen.onnx.levels import LEVELS
from kvxform.errors import CodegenError, RecipeError
from kvxform.ir.stream_plan import Regions
from kvxform.ir.types import TensorType
from kvxform.passes.structure.cache_prerope import CachePrerope
from kvxform.recipe import Target, load_recipe
from kvxform.runtime.executables import check_target

INT4 = {"key": {"codec": "int", "bits": 4}, "value": {"codec": "int", "bits": 4}}
CHANNEL = {"key": {"codec": "int", "bits": 4, "axis": "channel", "group": 8}}
CODES = {"codec": "static-int", "bits": 8, "scale": (0.02,)}
STATIC = {"key": CODES, "value": CODES}
SINK = {"key": {"codec": "none", "dtype": "float32"}, "regions": {"sink": 2}}


def toy(options=None, dtype=torch.float32, **model):
    program = cached_program(None, None, dtype=dtype, **model)
    if options is not STATIC:
        return cached_program(options, None, dtype=dtype, **model)
    for site in program.plan.sites:
        streams = {n: static(stream) for n, stream in site.streams.items()}
        program.plan = program.plan.replace_site(site.layer, **streams)
    return program


def static(stream):
    codec = {**CODES, "scale": [0.02]}
    plane = dataclasses.replace(stream.planes[0], name="codes", dtype="int8")
    return dataclasses.replace(stream, codec=codec, planes=(plane,))


def with_option(program, **options):
    for node in program.calls(kvx.CACHED_ATTENTION):
        node.kwargs = {**node.kwargs, **options}
    return program


def with_slopes(program):
    values = torch.ones(4)
    for node in program.calls(kvx.CACHED_ATTENTION):
        with program.graph.inserting_before(node):
            weight = program.graph.create_node("get_attr", "slopes")
        weight.meta = {**node.meta, "type": TensorType(values.dtype, (4,))}
        node.kwargs = {**node.kwargs, "alibi_slopes": weight}
    program.weights["slopes"] = values
    return program


def shared(program):
    first, second = (program.append_node(layer) for layer in (0, 1))
    second.replace_all_uses_with(first)
    program.graph.erase_node(second)
    program.plan = program.plan.replace_site(1, owner=0)
    return program


def with_key(program, **changes):
    key = dataclasses.replace(program.plan.site(1).key, **changes)
    program.plan = program.plan.replace_site(1, key=key)
    return program


def legal(program, **options):
    found = legal_levels(program, OnnxOptions(**options))
    return [level for level, reason in found if reason is None]


def against(level, program, **options):
    reason = dict(legal_levels(program, OnnxOptions(**options)))[level]
    assert reason is not None
    return reason


ALWAYS = ["L0", "L2", "L5"]
PROGRAMS = {  # what is legal on the CPU, and what is chosen
    "plain": (toy, ["L0", "L1", "L2", "L3", "L5"], "L1"),
    "float16": (lambda: toy(dtype=torch.float16), ["L0", "L1", "L2", "L3", "L5"], "L1"),
    "window": (lambda: with_option(toy(), window=6), ["L0", "L1", "L2", "L3", "L5"], "L1"),
    "softcap": (lambda: with_option(toy(), softcap=2.0), ["L0", "L1", "L2", "L3", "L5"], "L1"),
    "static": (lambda: toy(STATIC), ["L0", "L2", "L3", "L5"], "L3"),
    "int4": (lambda: toy(INT4), ALWAYS, "L2"),
    "channel": (lambda: toy(CHANNEL), ALWAYS, "L2"),
    "sink": (lambda: toy(SINK), ALWAYS, "L2"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_best_legal_level_is_taken(name):
    make, expected, chosen = PROGRAMS[name]
    program = make()
    assert legal(program) == expected
    assert choose_form(program, OnnxOptions()).level == chosen


MISSES = {
    "regions": (lambda: toy(SINK), "L3", "no tokens may be kept in regions (layer 0)"),
    "codec": (lambda: toy(INT4), "L3", "streams must be unquantised or static-int (layer 0)"),
    "quantised": (lambda: toy(INT4), "L1", "streams must be unquantised"),
    "shared": (lambda: shared(toy()), "L3", "a cache of its own (layer 1)"),
    "chunk": (lambda: with_option(toy(), chunk=8), "L3", "chunks"),
    "bidirectional": (lambda: with_option(toy(), causal=False), "L3", "must be causal"),
    "slopes": (lambda: with_slopes(toy()), "L3", "ALiBi"),
    "before RoPE": (lambda: apply(CachePrerope(), toy())[0], "L3", "must be cached after RoPE"),
    "one layer": (
        lambda: with_key(toy(), regions=Regions(sink=1)),
        "L1",
        "without regions (layer 1)",
    ),
    "no GPU": (toy, "L4", "runs on cuda alone"),
}


@pytest.mark.parametrize("name", MISSES)
def test_a_level_that_is_not_legal_says_why(name):
    make, level, words = MISSES[name]
    assert words in against(level, make())


def test_the_same_reason_is_in_the_error_with_what_is_legal():
    with pytest.raises(
        CodegenError, match=r"^KVX403 \[onnx\] level L3 is not legal here"
    ) as caught:
        choose_form(toy(INT4), OnnxOptions("L3"))
    assert "unquantised or static-int (layer 0)" in str(caught.value)
    assert "L0, L2, L5" in str(caught.value)


def test_the_provider_has_dtypes_of_its_own():
    assert legal(toy(), provider="cuda") == ["L0", "L1", "L2", "L5"]
    half = toy(dtype=torch.float16)
    assert legal(half, provider="cuda") == ["L0", "L1", "L2", "L3", "L4", "L5"]
    brain = toy(dtype=torch.bfloat16)
    assert legal(brain, provider="cuda") == ["L1", "L2", "L3", "L4", "L5"]
    assert "bfloat16 needs opset 22" in against("L0", brain, provider="cuda")
    assert legal(brain, provider="cuda", opset=22) == ["L0", "L5"]
    with pytest.raises(CodegenError, match=r"KVX401.*float32 or float16; got bfloat16"):
        check_form(brain, OnnxOptions())
    assert check_form(brain, OnnxOptions(provider="cuda")).provider == "cuda"


def test_old_opsets_and_runtimes_leave_less():
    assert legal(toy(), opset=18) == ["L0", "L5"]
    assert "needs opset 23" in against("L1", toy(), opset=22)
    assert "needs ONNX Runtime 1.27" in against("L3", toy(), runtime="1.26")
    assert legal(toy(dtype=torch.float16), provider="cuda", runtime="1.30") == []
    with pytest.raises(CodegenError, match=r"KVX403.*needs ONNX Runtime 1.20"):
        choose_form(toy(), OnnxOptions(runtime="1.2"))


def test_buffers_are_those_that_the_runtime_reads_rightly():
    """ONNX Runtime 1.25 to 1.27 let queries start at slot 0 if no mask says where they are."""
    new, old, oldest = (
        choose_form(toy(), OnnxOptions(opset=24, runtime=runtime))
        for runtime in ("1.30", "1.27", "1.24")
    )
    assert (new.runtime, new.cache, new.ends_itself) == ("1.28", "buffer", True)
    assert (old.runtime, old.cache, old.ends_itself) == ("1.25", "buffer", False)
    assert (oldest.runtime, oldest.cache, oldest.ends_itself) == ("1.24", "grow", False)


def test_primitives_have_no_int4_weights():
    assert "L0" not in legal(toy(), weights="int4")
    assert "L1" in legal(toy(), weights="int4")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (OnnxOptions(), ("L1", 23, "grow", 11)),
        (OnnxOptions(opset=24), ("L1", 24, "buffer", 12)),
        (OnnxOptions(opset=25), ("L1", 25, "buffer", 13)),
        (OnnxOptions(provider="cuda"), ("L1", 24, "buffer", 12)),
        (OnnxOptions(opset=20), ("L0", 20, "grow", 10)),
        (OnnxOptions("L0"), ("L0", 18, "grow", 10)),
        (OnnxOptions("L0", 24), ("L0", 24, "grow", 12)),
        (OnnxOptions("L2", 24), ("L2", 24, "buffer", 12)),
        (OnnxOptions("L3"), ("L3", 24, "buffer", 12)),
        (OnnxOptions("L3", 23), ("L3", 23, "buffer", 11)),
    ],
)
def test_the_form_of_a_plain_cache(options, expected):
    form = choose_form(toy(), options)
    assert (form.level, form.opset, form.cache, form.ir_version) == expected


@pytest.mark.parametrize("options", [SINK, CHANNEL, {**INT4, "regions": {"recent": 4}}])
def test_tokens_that_move_or_share_a_row_have_no_buffers(options):
    assert choose_form(toy(options), OnnxOptions(opset=24)).cache == "grow"
    assert choose_form(toy(INT4), OnnxOptions(opset=24)).cache == "buffer"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (OnnxOptions("L9"), "level must be one of L0, L1, L2, L3, L4, L5; got L9"),
        (OnnxOptions(opset=17), "opset must be 18 to 25; got 17"),
        (OnnxOptions(provider="rocm"), "provider must be one of cpu, cuda"),
        (OnnxOptions(logits="none"), "logits must be one of all, last"),
        (OnnxOptions(weights="int3"), "weights must be one of source, int4"),
        (OnnxOptions(runtime="new"), "runtime must be a version such as 1.31; got 'new'"),
    ],
)
def test_words_without_meaning_are_refused(options, words):
    with pytest.raises(CodegenError, match="KVX403") as caught:
        check_form(toy(), options)
    assert words in str(caught.value)


def test_options_that_are_given_replace_others():
    asked = OnnxOptions(level="L2", logits="last")
    assert asked.changed(level=None, opset=24) == OnnxOptions("L2", 24, logits="last")


def test_a_target_has_every_option():
    names = {field.name for field in dataclasses.fields(OnnxOptions)}
    assert names < Target.model_fields.keys()
    assert Target(lowering="onnx").onnx_options == OnnxOptions()
    for name, hint in get_type_hints(OnnxOptions).items():
        assert Target.model_fields[name].annotation == hint


def test_a_recipe_asks_for_a_form():
    target = {"lowering": "onnx", "level": "L3", "logits": "last", "weights": "int4"}
    recipe = load_recipe({"version": 1, "name": "x", "passes": ["insert-cache"], "target": target})
    assert recipe.target.onnx_options == OnnxOptions("L3", logits="last", weights="int4")
    assert recipe.to_data()["target"] == target
    check_target(toy(), recipe.target)
    with pytest.raises(CodegenError, match="KVX403"):
        check_target(toy(INT4), recipe.target)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"lowering": "eager", "level": "L3"}, "level belongs to lowering: onnx"),
        ({"lowering": "triton", "opset": 24}, "opset belongs to lowering: onnx"),
        ({"lowering": "onnx", "opset": 17}, "18"),
        ({"lowering": "onnx", "level": "L9"}, "L9"),
        ({"lowering": "onnx", "runtime": "new"}, "runtime"),
    ],
)
def test_a_recipe_with_an_option_out_of_place_is_refused(target, words):
    data = {"version": 1, "name": "x", "passes": ["insert-cache"], "target": target}
    with pytest.raises(RecipeError, match="KVX107") as caught:
        load_recipe(data)
    assert words in str(caught.value)


def op_types(program, options):
    form, fallback = check_program(program, options)
    model = emit_model(program, fallback, form)
    return form, {node.op_type for node in model.graph}


@pytest.mark.parametrize("options", [None, INT4, {**CHANNEL, "regions": {"recent": 16}}])
def test_primitives_are_those_of_opset_18(options):
    form, found = op_types(toy(options), OnnxOptions("L0"))
    assert {"MatMul", "Softmax", "Sqrt"} <= found
    for name in sorted(found):
        assert onnx.defs.get_schema(name, form.opset).since_version <= 18
    assert not found & {"Attention", "RMSNormalization", "RotaryEmbedding"}
    assert "TensorScatter" not in found


def test_buffers_are_written_in_place():
    _, grown = op_types(toy(), OnnxOptions())
    _, written = op_types(toy(), OnnxOptions(opset=24))
    assert "TensorScatter" in written - grown
    assert "Attention" in written & grown


def test_the_page_has_every_level_as_it_is():
    """Its first table: opset, runtime and providers of each level."""
    text = (Path(__file__).parents[2] / "docs" / "onnx-levels.md").read_text(encoding="utf-8")
    words = {"cpu": "CPU", "cuda": "CUDA"}
    rows = re.findall(
        r"^\| (L\d) \| .* \| (\d+) and up \| ([\d.]+) \| (.*) \|$", text, re.MULTILINE
    )
    assert rows == [
        (
            level,
            str(rules.first_opset),
            next(iter(rules.runtime.values())),
            ", ".join(words[provider] for provider in rules.dtypes),
        )
        for level, rules in LEVELS.items()
    ]


def test_the_page_shows_what_the_command_prints():
    text = (Path(__file__).parents[2] / "docs" / "onnx-levels.md").read_text(encoding="utf-8")
    program = toy({**CHANNEL, "value": INT4["value"], "regions": {"recent": 16, "flush": "block"}})
    table = level_rows(level_table(program, OnnxOptions()))
    shown = [re.split(r"  +", line) for line in text.splitlines() if re.match(r"L\d  ", line)]
    assert shown == [list(row) for row in table]
