"""Programs run node by node, and where their layers end."""

from __future__ import annotations

import pytest
import torch
from cached import cached_program
from programs import gpt2_program, latent_program, llama_program, run, token_ids

from kvxform.diffing.layer_run import LayerRun
from kvxform.diffing.walking import WalkingModel, layer_ends, walk
from kvxform.ir.program import Program, default_positions
from kvxform.runtime.model import OptimizedModel
from kvxform.verify.probe import make_probe, run_source

INT4 = {"key": {"codec": "int", "bits": 4}, "value": None, "regions": {"sink": 2}}
PROGRAMS = {
    "llama": llama_program(layers=3),
    "tied": llama_program(tied=True),
    "shared": llama_program(layers=3, shared=True),
    "gpt2": gpt2_program(),
    "latent": latent_program(),
    "cached": cached_program(INT4, layers=3),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_layer_ends_at_the_last_sum_of_the_residual_stream(name):
    program = PROGRAMS[name]
    ends = layer_ends(program)
    assert list(ends.values()) == [site.layer for site in program.sites]
    for node in ends:
        assert node.target is torch.ops.aten.add.Tensor
        assert node.meta["type"].shape == ("B", "S", 32)


@pytest.mark.parametrize("name", ["llama", "gpt2", "latent"])
def test_a_walk_stops_behind_each_layer_and_gives_the_logits(name):
    program = PROGRAMS[name]
    ids = token_ids(program)
    *layers, last = walk(program, ids, default_positions(ids))
    assert [stop.layer for stop in layers] == [site.layer for site in program.sites]
    assert last.layer is None
    torch.testing.assert_close(last.value, run(program, ids))


def test_what_a_layer_leaves_does_not_depend_on_later_layers():
    short, long = llama_program(layers=2), llama_program(layers=3)
    long.weights.update({n: w for n, w in short.weights.items() if n.startswith("layers.")})
    long.weights["embed.weight"] = short.weights["embed.weight"]
    ids = token_ids(short)
    stops = [list(walk(p, ids, default_positions(ids))) for p in (short, long)]
    for a, b in zip(stops[0][:2], stops[1][:2], strict=True):
        assert torch.equal(a.value, b.value)
    assert not torch.equal(stops[0][-1].value, stops[1][-1].value)


def test_a_session_of_a_walking_model_is_like_any_other():
    program = PROGRAMS["cached"]
    ids = token_ids(program, tokens=21)
    sessions = [
        model.new_session(max_batch_size=2, max_seq_len=24)
        for model in (OptimizedModel(program), WalkingModel(program))
    ]
    for session in sessions:
        session.prefill(ids[:, :19], chunk_size=8)
    steps = [session.decode(ids[:, 19]) for session in sessions]
    torch.testing.assert_close(steps[1], steps[0])
    caches = [session.logical_cache(1) for session in sessions]
    torch.testing.assert_close(caches[1].k, caches[0].k)


@pytest.mark.parametrize("cached", [False, True])
def test_a_layer_run_shows_keys_and_values_as_the_source_has_them(cached: bool):
    source = llama_program()
    program: Program = cached_program(None) if cached else source
    probe = make_probe(source.info.vocab_size, (9, 5))
    expected = run_source(source, probe)
    layer_run = LayerRun(program, probe)
    stops = list(layer_run.stops())
    real = probe.real
    torch.testing.assert_close(stops[-1].value[real], expected.logits[real])
    for row, (k, v) in enumerate(layer_run.logical(1)):
        length = probe.lengths[row]
        torch.testing.assert_close(k, expected.keys[1][row, :, :length])
        torch.testing.assert_close(v, expected.values[1][row, :, :length])
