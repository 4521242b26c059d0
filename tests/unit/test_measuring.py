import dataclasses

import pytest
import torch
from programs import apply, gpt2_program, llama_program

from kvxform.codecs.base import make_codec
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.memory.page_cache import PageCache
from kvxform.passes.quantize.quantize_kv import QuantizeKv
from kvxform.runtime.model import OptimizedModel
from kvxform.sensitivity.measuring import Bench

IDS = torch.randint(0, 48, (2, 24), generator=torch.Generator().manual_seed(0))
INT2 = {"codec": "int", "bits": 2, "axis": "token"}
KIVI = {"codec": "int", "bits": 2, "axis": "channel", "group": 8}


def cached(program):
    for graph_pass in (InsertCache(), PageCache(page_size=16)):
        program, _ = apply(graph_pass, program)
    return program


def divergence(program, places, codec):
    """KL of a model that stores streams `places` through a codec, by running that model."""
    layers = {}
    for layer, name in places:
        layers.setdefault(str(layer), {})[name] = codec
    lossy, _ = apply(QuantizeKv(None, None, layers=layers), program)
    exact, found = (OptimizedModel(p)(IDS).double().log_softmax(-1) for p in (program, lossy))
    return float((exact.exp() * (exact - found)).sum(-1).mean())


@pytest.mark.parametrize("make", [llama_program, gpt2_program])
def test_divergences_are_those_of_the_optimised_model(make):
    program = cached(make(dtype=torch.float64))
    bench = Bench(program, IDS)
    for places in ([(0, "key")], [(1, "value")], [(0, "value"), (1, "key")]):
        expected = divergence(program, places, INT2)
        found = bench.divergence(dict.fromkeys(places, make_codec(INT2)))
        assert expected > 1e-6
        assert found == pytest.approx(expected, rel=1e-3)
    assert bench.divergence({}) == 0.0


def test_trials_leave_no_trace():
    bench = Bench(cached(llama_program()), IDS)
    codec = make_codec(INT2)
    last = bench.divergence({(1, "key"): codec})
    error = bench.attention_error(1, {(1, "key"): codec})
    bench.divergence({(0, "key"): codec, (0, "value"): codec})
    assert bench.divergence({(1, "key"): codec}) == last
    assert bench.attention_error(1, {(1, "key"): codec}) == error


def test_whole_groups_behind_the_sink_are_coded():
    program = cached(llama_program())
    sites = tuple(
        dataclasses.replace(
            site,
            key=dataclasses.replace(
                site.key, regions=dataclasses.replace(site.key.regions, sink=5)
            ),
        )
        for site in program.plan.sites
    )
    with_sink = dataclasses.replace(program, plan=dataclasses.replace(program.plan, sites=sites))
    codec = make_codec(KIVI)
    place = {(1, "key"): codec}
    bench, sunk = Bench(program, IDS), Bench(with_sink, IDS)
    # 24 tokens: three groups of 8, or 5 exact tokens, two groups and 3 exact tokens
    assert bench.divergence(place) != pytest.approx(sunk.divergence(place), rel=1e-2)
    first = bench.divergence({(1, "value"): codec})
    assert first == pytest.approx(sunk.divergence({(1, "value"): codec}), rel=1e-9)


def test_attention_errors_are_relative_and_grow_with_fewer_bits():
    bench = Bench(cached(llama_program()), IDS)
    for layer in (0, 1):
        errors = [
            bench.attention_error(layer, {(layer, "value"): make_codec({**INT2, "bits": bits})})
            for bits in (8, 4, 2)
        ]
        assert 0 < errors[0] < 0.02
        assert errors == sorted(errors)
    assert bench.attention_error(0, {}) == 0.0
