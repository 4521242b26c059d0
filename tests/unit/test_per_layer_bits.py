import itertools

import pytest
import torch
from programs import apply, latent_program, llama_program

from kvxform.calibrate import collect
from kvxform.codecs.base import make_codec
from kvxform.errors import PassError, RecipeError
from kvxform.ir.fitting import codec_samples
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.memory.page_cache import PageCache
from kvxform.passes.quantize.per_layer_bits import PerLayerBits
from kvxform.passes.quantize.quantize_kv import QuantizeKv
from kvxform.passes.structure.cache_latent import CacheLatent
from kvxform.recipe import load_recipe
from kvxform.runtime.model import OptimizedModel
from kvxform.sensitivity.formats import changed_options, stream_formats
from kvxform.sensitivity.measuring import Bench

INT4 = {"codec": "int", "bits": 4, "axis": "token"}
IDS = torch.randint(0, 48, (2, 24), generator=torch.Generator().manual_seed(0))
SMALL = {"tokens": 48, "window": 24}


def quantised(program, key=INT4, value=INT4, **options):
    calibration = collect(program, IDS, name="text")
    for graph_pass in (InsertCache(), PageCache(page_size=16), QuantizeKv(key, value, **options)):
        program, _ = apply(graph_pass, program)
    program.calibration = calibration
    return program


def uneven(layers=3):
    """A model whose layers differ: the values of layer 1 count a hundred times as much."""
    program = llama_program(layers=layers)
    program.weights["layers.1.attn.o.weight"] = program.weights["layers.1.attn.o.weight"] * 100
    return program


def bits(program):
    return [
        tuple(stream.codec["bits"] for stream in site.streams.values())
        for site in program.plan.sites
    ]


def divergence(program, exact):
    found = OptimizedModel(program)(IDS).double().log_softmax(-1)
    return float((exact.exp() * (exact - found)).sum(-1).mean())


@pytest.mark.parametrize(
    ("method", "budget"),
    [
        ("exact", 5.0),
        pytest.param("exact", 7.0, marks=pytest.mark.slow),
        pytest.param("kvtuner", 7.0, marks=pytest.mark.slow),
    ],
)
def test_no_uniform_choice_within_the_budget_is_better(method, budget):
    source = uneven()
    exact = OptimizedModel(apply(InsertCache(), source)[0])(IDS).double().log_softmax(-1)
    program = quantised(source)
    tuned, found = apply(PerLayerBits(budget, method=method, trials=30, **SMALL), program)
    assert len(found) == 3
    assert tuned.plan.bits_per_value <= budget
    assert len(set(bits(tuned))) > 1, "layers differ, so their formats must"
    assert tuned.facts["codecs.per_layer"]
    cost = divergence(tuned, exact)
    for key, value in itertools.product((8, 4, 2), repeat=2):
        alike = quantised(source, {**INT4, "bits": key}, {**INT4, "bits": value})
        if alike.plan.bits_per_value <= budget:
            assert cost <= divergence(alike, exact) * (1 + 1e-6)


def test_the_exact_choice_has_the_least_sum_of_divergences():
    program = quantised(uneven(layers=2))
    tuned, _ = apply(PerLayerBits(2 * 2 * 2 * 16 * 7 / 8, "bytes_per_token", **SMALL), program)
    bench = Bench(program, IDS)
    pass_ = PerLayerBits(7.0, **SMALL)
    formats = pass_._formats(program)
    costs = {
        stream: [bench.divergence({stream: f.codec}) for f in row]
        for stream, row in formats.items()
    }
    best = min(
        (
            picked
            for picked in itertools.product(range(3), repeat=4)
            if sum((8, 4, 2)[i] + 2 for i in picked) <= 4 * 7
        ),
        key=lambda picked: sum(row[i] for row, i in zip(costs.values(), picked, strict=True)),
    )
    assert bits(tuned) == [tuple((8, 4, 2)[i] for i in best[start : start + 2]) for start in (0, 2)]


def test_one_format_leaves_the_base_codec_bit_for_bit():
    program = quantised(llama_program())
    same, found = apply(PerLayerBits(6.0, key=[{"bits": 4}], value=[{}], **SMALL), program)
    assert len(found) == 2
    assert same.plan == program.plan
    assert torch.equal(OptimizedModel(same)(IDS), OptimizedModel(program)(IDS))


def test_twice_changes_nothing_and_equal_runs_agree():
    program = quantised(uneven())
    graph_pass = PerLayerBits(7.0, method="kvtuner", objective="error", **SMALL)
    tuned, _ = apply(graph_pass, program)
    assert tuned.plan == apply(graph_pass, program)[0].plan
    again, found = apply(graph_pass, tuned)
    assert [miss.done for miss in found] == [True]
    assert again.plan == tuned.plan


def test_a_dry_run_takes_the_largest_uniform_choice():
    program = quantised(llama_program())
    program.calibration = None
    tuned, _ = apply(PerLayerBits(7.5), program)
    assert bits(tuned) == [(8, 2), (8, 2)]
    assert tuned.plan.bits_per_value == 7.0


def test_streams_without_a_codec_are_left_alone_and_their_bytes_count():
    program = quantised(uneven(), layers={"0": {"key": None}})
    tuned, _ = apply(PerLayerBits(15.0, **SMALL), program)
    assert tuned.plan.site(0).key == program.plan.site(0).key
    assert tuned.plan.bits_per_value <= 15.0
    plain, _ = apply(InsertCache(), llama_program())
    _, found = apply(PerLayerBits(9.0), plain)
    assert [miss.hint for miss in found] == ["put quantize-kv before it"]


def test_a_cached_latent_has_one_stream():
    source = latent_program()
    calibration = collect(source, IDS, name="text")
    for graph_pass in (CacheLatent(), InsertCache(), QuantizeKv(INT4, None)):
        source, _ = apply(graph_pass, source)
    source.calibration = calibration
    tuned, found = apply(PerLayerBits(6.0, method="kvtuner", trials=8, **SMALL), source)
    assert len(found) == 2
    assert tuned.plan.bits_per_value <= 6.0


@pytest.mark.parametrize(
    ("options", "code", "rule"),
    [
        ({"budget": 4.0, "key": []}, "KVX107", "list formats"),
        ({"budget": 4.0, "trials": 0}, "KVX107", "trials"),
        ({"budget": 3.0}, "KVX205", "the smallest formats, 4.000 bits"),
        ({"budget": 6.0, "key": [{"bites": 4}]}, "KVX102", "bits"),
        ({"budget": 6.0, "key": [{"bits": 5}]}, "KVX107", "bits"),
        ({"budget": 6.0, "key": [{"axis": "channel"}]}, "KVX205", "1 tokens together"),
    ],
)
def test_refusals(options, code, rule):
    with pytest.raises((PassError, RecipeError), match=rule) as caught:
        apply(PerLayerBits(**options), quantised(llama_program()))
    assert caught.value.code == code


def test_options_reach_wrapped_codecs_and_constants_are_dropped():
    wrapped = {"codec": "token-norm", "shared": True, "inner": {**INT4, "levels": [0.5]}}
    assert changed_options(wrapped, {"bits": 2, "shared": False}) == {
        "codec": "token-norm",
        "shared": False,
        "inner": {**INT4, "bits": 2},
    }
    assert changed_options(wrapped, INT4) == INT4


def test_codecs_with_constants_are_fitted_for_every_format():
    nuq = {"codec": "nuq", "bits": 4, "axis": "channel", "group": 8}
    calibration = collect(llama_program(), IDS, name="the text")
    program, _ = apply(InsertCache(), llama_program())
    program.calibration = calibration
    program, _ = apply(QuantizeKv(nuq, INT4), program)
    site = program.plan.site(0)
    fitted = make_codec(site.key.codec)
    four, three = stream_formats(program, site, "key", [{}, {"bits": 3}], "test")
    assert four.codec == fitted, "the base codec, as quantize-kv has fitted it"
    assert (len(four.codec.table), len(three.codec.table)) == (16, 8)
    assert three.codec == make_codec({**nuq, "bits": 3}).fit(
        codec_samples(program, 0, "key", site.key)
    )
    assert three.size < four.size
    assert three.stream.calibration == "the text"


def test_the_recipe_names_the_method():
    step = next(s for s in load_recipe("kvtuner").passes if s.name == "per-layer-bits")
    assert step.options["method"] == "kvtuner"
