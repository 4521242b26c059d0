"""quantize-kv: the streams of the plan, defaults of the flush rule, and every refusal."""

from __future__ import annotations

import pytest
import torch
from programs import apply, fired, llama_program, reasons

from kvxform.errors import PassError, RecipeError
from kvxform.ir.stream_plan import Regions
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.base.simplify import Simplify
from kvxform.passes.quantize.quantize_kv import QuantizeKv
from kvxform.recipe import PassStep, build_pass

INT4 = {"codec": "int", "bits": 4}
CHANNEL = {"codec": "int", "bits": 2, "axis": "channel", "zero": "float"}


def cached_program(**options):
    program, _ = apply(InsertCache(), llama_program(**options))
    return program


def test_both_streams_get_their_codec_and_planes():
    quantised, found = apply(QuantizeKv(INT4, CHANNEL), cached_program())
    assert fired(found) == 2
    for site in quantised.plan.sites:
        assert (site.key.codec["bits"], site.key.tokens_per_group) == (4, 1)
        assert (site.value.codec["bits"], site.value.tokens_per_group) == (2, 32)
        assert [p.name for p in site.key.planes] == ["codes", "scale", "zero"]
    # head_dim 16: 4 + 32 / 16 bits for keys, 2 + 32 / 32 for values
    assert quantised.plan.bits_per_value == (6 + 3) / 2
    assert quantised.facts["k.codec"] == quantised.facts["v.codec"] == "int"


def test_bits_of_the_safe_default_at_head_dim_64():
    quantised, _ = apply(QuantizeKv(INT4, INT4), cached_program(head_dim=64))
    assert quantised.plan.bits_per_value == 4.5


def test_a_stream_without_codec_stays_as_it_is():
    program = cached_program()
    quantised, found = apply(QuantizeKv(None, INT4), program)
    assert fired(found) == 2
    assert quantised.plan.site(0).key == program.plan.site(0).key
    assert quantised.facts["k.codec"] == "none"
    keys_too, found = apply(QuantizeKv(INT4, None), quantised)
    assert fired(found) == 2
    assert keys_too.plan.site(0).value == quantised.plan.site(0).value


def test_flush_is_block_for_grouped_tokens_and_sliding_for_single_ones():
    quantised, _ = apply(
        QuantizeKv(CHANNEL, INT4, regions={"sink": 4, "recent": 64}), cached_program()
    )
    site = quantised.plan.site(1)
    assert site.key.regions == Regions(4, 64, "block", "float16")
    assert site.value.regions == Regions(4, 64, "sliding", "float16")


def test_regions_of_one_stream_override_those_of_both():
    quantize = QuantizeKv(
        CHANNEL,
        INT4,
        regions={"sink": 4, "recent": 32, "dtype": "float64"},
        key_regions={"recent": 33, "flush": "sliding"},
        value_regions={"sink": 0},
    )
    quantised, _ = apply(quantize, cached_program())
    site = quantised.plan.site(0)
    assert site.key.regions == Regions(4, 33, "sliding", "float64")
    assert site.value.regions == Regions(0, 32, "sliding", "float64")


def test_exact_tokens_of_a_bfloat16_model_are_bfloat16():
    quantised, _ = apply(QuantizeKv(INT4, INT4), cached_program(dtype=torch.bfloat16))
    assert quantised.plan.site(0).key.regions.dtype == "bfloat16"


def test_quantising_again_makes_reads_unsimplified():
    assert QuantizeKv.invalidates == ("read.simplified",)
    program, _ = apply(QuantizeKv(None, INT4), cached_program())
    program, _ = apply(Simplify(), program)
    program, _ = apply(QuantizeKv(INT4, None), program)
    assert program.plan.site(0).key.read.form == "element"
    assert not program.facts["read.simplified"]


def test_a_stream_is_quantised_once():
    program, _ = apply(QuantizeKv(INT4, None), cached_program())
    _, found = apply(QuantizeKv({"codec": "int", "bits": 8}, None), program)
    assert reasons(found) == ["keys are already stored by codec int"] * 2
    assert not found[0].done


def test_a_codec_that_cannot_take_head_dim_names_the_layer():
    program = cached_program(head_dim=12, heads=2, kv_heads=1)
    with pytest.raises(
        PassError, match=r"KVX203 \[quantize-kv\].*multiple of 8; got 12 at layers.0.attn. Hint"
    ):
        QuantizeKv({"codec": "int", "bits": 3}, None).match(program)


def test_without_a_cache_there_is_nothing_to_quantise():
    assert reasons(QuantizeKv(INT4, INT4).match(llama_program())) == ["there is no cache"]
    (requirement,) = QuantizeKv.requires
    assert not requirement.is_met(llama_program().facts)


def codecs(program, stream):
    return [site.streams[stream].codec.get("bits") for site in program.plan.sites]


def test_layers_have_their_own_options():
    quantize = QuantizeKv(
        INT4,
        INT4,
        regions={"sink": 4},
        layers={
            "0-1,-1": {"key": {"codec": "int", "bits": 8}, "key_regions": {"recent": 16}},
            "1": {"value": None, "regions": {"sink": 2}},
        },
    )
    quantised, found = apply(quantize, cached_program(layers=4))
    assert fired(found) == 4
    assert codecs(quantised, "key") == [8, 8, 4, 8]
    assert codecs(quantised, "value") == [4, None, 4, 4]
    regions = [site.key.regions for site in quantised.plan.sites]
    assert [(r.sink, r.recent) for r in regions] == [(4, 16), (2, 16), (4, 0), (4, 16)]


def test_boundary_layers_can_be_left_as_they_are():
    exact = {"key": None, "value": None}
    quantised, found = apply(
        QuantizeKv(INT4, INT4, layers={"0,-1": exact}), cached_program(layers=4)
    )
    assert fired(found) == 2
    assert reasons(found) == ["the options of this layer give it no codec"] * 2
    assert codecs(quantised, "key") == codecs(quantised, "value") == [None, 4, 4, None]
    assert quantised.facts["k.codec"] == "int"


def test_a_codec_of_some_layers_only_is_a_fact():
    quantise = QuantizeKv(None, None, layers={"-2--1": {"value": INT4}})
    quantised, found = apply(quantise, cached_program(layers=3))
    assert fired(found) == 2
    assert (quantised.facts["k.codec"], quantised.facts["v.codec"]) == ("none", "int")


@pytest.mark.parametrize(
    ("key", "layers"),
    [
        (INT4, {"0-1,-2--1": {"key": None}}),
        (INT4, {"0-1,-2--1": {"key": {"codec": "none"}}}),
        ({"codec": "none"}, {"0": {"key": INT4}, "0-1": {"key": None}}),
    ],
)
def test_exceptions_at_every_layer_are_refused(key, layers):
    words = r"KVX205 \[quantize-kv\] a codec of keys must be left.*got int.*name fewer layers"
    with pytest.raises(PassError, match=words):
        QuantizeKv(key, INT4, layers=layers).match(cached_program(layers=2))
    fewer = {name.replace("0-1", "0").split(",")[0]: own for name, own in layers.items()}
    quantised, _ = apply(QuantizeKv(INT4, INT4, layers=fewer), cached_program(layers=2))
    assert codecs(quantised, "key")[1] == 4


def test_the_fact_is_that_of_the_codec_that_encodes():
    layers = {"-1": {"key": INT4, "value": {"codec": "none"}}}
    quantise = QuantizeKv({"codec": "none"}, INT4, layers=layers)
    quantised, _ = apply(quantise, cached_program(layers=2))
    assert (quantised.facts["k.codec"], quantised.facts["v.codec"]) == ("int", "int")


@pytest.mark.parametrize("name", ["4", "-5", "0-9"])
def test_a_layer_that_the_model_does_not_have_is_refused(name):
    with pytest.raises(PassError, match=r"KVX205 \[quantize-kv\].*it has 0 to 3"):
        QuantizeKv(INT4, INT4, layers={name: {}}).match(cached_program(layers=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": None, "value": None}, "KVX107.*a codec must be given"),
        ({"key": {"codec": "imt"}, "value": None}, "KVX103.*did you mean 'int'"),
        ({"key": {"codec": "int", "bit": 4}, "value": None}, "KVX102.*did you mean 'bits'"),
        ({"key": {"codec": "int", "bits": 5}, "value": None}, "KVX107.*bits must be"),
        ({"key": CHANNEL, "value": None, "regions": {"recent": 33}}, "multiple of the 32.*got 33"),
        ({"key": INT4, "value": None, "regions": {"sink": -1}}, "KVX107.*sink of key.*got -1"),
        ({"key": INT4, "value": None, "regions": {"recnt": 1}}, "KVX102.*did you mean 'recent'"),
        ({"key": INT4, "value": None, "regions": {"flush": "now"}}, "KVX107.*flush"),
        ({"key": INT4, "value": None, "regions": {"dtype": "half16"}}, "KVX105.*half16"),
        ({"key": INT4, "value": None, "layers": {"first": {}}}, "KVX107.*layers must.*'first'"),
        ({"key": INT4, "value": None, "layers": {"0": {"kay": INT4}}}, "KVX102.*mean 'key'"),
        ({"key": None, "value": None, "layers": {"0": {}}}, "KVX107.*a codec must be given"),
        (
            {"key": INT4, "value": None, "layers": {"0": {"key": {"codec": "int", "bit": 4}}}},
            "KVX102.*did you mean 'bits'",
        ),
        (
            {"key": CHANNEL, "value": None, "layers": {"0": {"key_regions": {"recent": 33}}}},
            "multiple of the 32.*got 33",
        ),
    ],
)
@pytest.mark.parametrize(
    "build",
    [lambda o: QuantizeKv(**o), lambda o: build_pass(PassStep("quantize-kv", o))],
    ids=["python", "recipe"],
)
def test_bad_options_are_refused_from_python_and_from_recipes(options, message, build):
    with pytest.raises(RecipeError, match=message):
        build(options)


def test_a_recipe_step_builds_the_pass():
    options = {"key": CHANNEL, "value": INT4, "regions": {"sink": 4, "recent": 32}}
    assert build_pass(PassStep("quantize-kv", options)) == QuantizeKv(**options)
