"""Programs as healing runs and cuts them: the same values as a session, and right gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from healed import KEYS, cached, disturbed, single, text_ids
from programs import apply, fired, gpt2_program, llama_program, run, token_ids

from kvxform.calibrate import make_calibration
from kvxform.codecs.base import make_codec
from kvxform.healing.blocks import find_blocks
from kvxform.healing.parameters import Parameters
from kvxform.healing.running import Differentiable
from kvxform.healing.tasks import LocalTask, LogitsTask
from kvxform.ir.stream_plan import Regions
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.structure.cache_latent import CacheLatent
from kvxform.passes.structure.loop_layers import LoopLayers
from kvxform.passes.structure.merge_kv_heads import MergeKvHeads
from kvxform.passes.structure.share_kv_layers import ShareKvLayers
from kvxform.passes.structure.to_latent import ToLatent
from kvxform.runtime.model import OptimizedModel


def test_the_differentiable_program_computes_what_the_program_computes():
    for program in (cached(llama_program(bias=True)), cached(gpt2_program())):
        ids = token_ids(program)
        found = Differentiable(program)(program.weights, ids)
        torch.testing.assert_close(found, run(program, ids), rtol=0, atol=1e-10)


STRUCTURES = {
    "shared": (ShareKvLayers(),),
    "merged": (MergeKvHeads(heads=1),),
    "merged after RoPE": (MergeKvHeads(heads=1, rope="post"),),
    "looped": (LoopLayers(layers="0-0"),),
    "latent": (ToLatent(rank=12), CacheLatent()),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_programs_of_structure_passes_run_as_their_sessions_do(name):
    source = llama_program(heads=4, kv_heads=2)
    ids = text_ids(4, 16).view(4, 16)
    calibration = make_calibration(source, ids, tokens=64, window=16, seed=0)
    program = dataclasses.replace(source, calibration=calibration)
    for graph_pass in (*STRUCTURES[name], InsertCache()):
        program, found = apply(graph_pass, program)
        assert fired(found), graph_pass
    result = Differentiable(program)(program.weights, ids)
    torch.testing.assert_close(result, OptimizedModel(program)(ids), rtol=0, atol=1e-9)
    assert not torch.allclose(result, run(source, ids), atol=1e-3)
    if program.touched:
        task = LocalTask(program, source, Parameters(program, None, 0).names)
        assert task.layers == (0, 1)
        assert max(task.errors(program.weights, ids)) > 0.01


def test_gradients_are_those_of_finite_differences():
    source = llama_program(layers=1)
    program = cached(disturbed(source, KEYS[:1]))
    ids, name = token_ids(program), KEYS[0]
    parameters = Parameters(program, None, 0)
    losses = (
        LocalTask(program, source, parameters.names).loss,
        LogitsTask(program, source).loss,
    )
    for loss in losses:
        (gradient,) = torch.autograd.grad(
            loss(parameters.weights(), ids), list(parameters.tensors.values())
        )
        step = torch.zeros_like(gradient)
        place = divmod(int(gradient.abs().argmax()), gradient.shape[1])
        step[place] = 1e-2
        ends = [
            loss({**program.weights, name: program.weights[name] + s}, ids) for s in (step, -step)
        ]
        slope = float(ends[0] - ends[1]) / 2e-2
        assert slope == pytest.approx(float(gradient[place]), rel=2e-2)


def test_blocks_reach_from_residual_stream_to_output():
    source, program = single(), cached(single())
    for found in (find_blocks(source), find_blocks(program)):
        assert list(found) == ["layers.0.attn", "layers.1.attn"]
    assert list(find_blocks(gpt2_program())) == ["h.0.attn", "h.1.attn"]
    task = LocalTask(program, source, tuple(KEYS))
    errors = task.errors(program.weights, text_ids(2, 16).view(2, 16))
    assert max(errors) < 1e-5, "exact passes change nothing"
    assert LocalTask(program, source, (KEYS[2],)).layers == (1,)


def test_names_of_one_tensor_stay_one_if_all_are_touched():
    tied = single(tied=False)
    tied.weights[KEYS[2]] = tied.weights[KEYS[0]]
    both = dataclasses.replace(tied, touched={KEYS[0]: "a", KEYS[2]: "a"})
    weights = Parameters(both, None, 0).merged()
    assert weights[KEYS[0]] is not weights["layers.0.attn.o.weight"]
    assert weights[KEYS[0]].data_ptr() == weights[KEYS[2]].data_ptr()
    one = Parameters(dataclasses.replace(tied, touched={KEYS[0]: "a"}), None, 0)
    assert one.names == (KEYS[0],)
    assert one.merged()[KEYS[2]] is tied.weights[KEYS[2]]


def test_a_weight_that_is_read_twice_gets_both_gradients():
    source = llama_program(layers=1)
    looped, _ = apply(LoopLayers(layers="0-0"), source)
    looped.touched[KEYS[0]] = "test"
    ids, task = text_ids(2, 16).view(2, 16), LogitsTask(looped, source)
    once = Parameters(looped, None, 0)
    (gradient,) = torch.autograd.grad(task.loss(once.weights(), ids), once.tensors[KEYS[0]])
    apart = looped.clone()
    (shared,) = [node for node in apart.graph.nodes if node.target == KEYS[0]]
    _, second = shared.users
    with apart.graph.inserting_before(second):
        second.replace_input_with(shared, apart.graph.create_node("get_attr", "own"))
    weights = {**looped.weights, "own": looped.weights[KEYS[0]].clone().requires_grad_()}
    weights[KEYS[0]] = weights["own"].detach().clone().requires_grad_()
    loss = LogitsTask(apart, source).loss(weights, ids)
    parts = torch.autograd.grad(loss, [weights[KEYS[0]], weights["own"]])
    assert all(float(part.abs().max()) > 0 for part in parts)
    torch.testing.assert_close(sum(parts), gradient, rtol=1e-6, atol=1e-9)


def test_frequencies_and_bases_are_no_weights_to_train():
    program = single()
    program.touched.update(dict.fromkeys(["inv_freq", KEYS[0]], "test"))
    assert Parameters(program, None, 0).names == (KEYS[0],)


def test_channels_that_are_left_out_are_left_out_in_training_too():
    program, _ = apply(InsertCache(), single())
    codec = {"codec": "truncate", "rank": 10, "head_dim": 16, "heads": 1}
    codec["inner"] = {"codec": "none", "dtype": "float32"}
    codec["fill"] = [[0.1, -0.2, 0.3, -0.1, 0.0, 0.2]]
    planes = make_codec(codec).planes(16)
    ids = text_ids(2, 16).view(2, 16)
    plain = Differentiable(program)(program.weights, ids)
    for key, value in (
        (Regions(), Regions()),
        (Regions(2, 4, dtype="float32"), Regions(2, 4, dtype="float32")),
        (Regions(0, 4, dtype="float32"), Regions(1, 0, dtype="float32")),
    ):
        plan = program.plan
        for site in plan.sites:
            streams = {
                name: dataclasses.replace(stream, codec=codec, planes=planes, regions=regions)
                for (name, stream), regions in zip(site.streams.items(), (key, value), strict=True)
            }
            plan = plan.replace_site(site.layer, **streams)
        short = dataclasses.replace(program, plan=plan)
        found = Differentiable(short)(short.weights, ids)
        torch.testing.assert_close(found, OptimizedModel(short)(ids), rtol=0, atol=1e-5)
        assert not torch.allclose(found, plain, atol=1e-3)
