"""Healing: what is trained and what is not, resumed runs, refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from healed import disturbed, text_ids
from programs import apply, fired, gpt2_program, llama_program, run, token_ids

from kvxform.calibrate import make_calibration
from kvxform.codecs.base import make_codec
from kvxform.errors import ArtifactError, KvxformError
from kvxform.healing.blocks import find_blocks
from kvxform.healing.healer import heal_program
from kvxform.healing.options import HealOptions
from kvxform.healing.parameters import Parameters
from kvxform.healing.running import Differentiable
from kvxform.healing.tasks import LocalTask, LogitsTask
from kvxform.healing.training import rate_factor
from kvxform.ir.plan import Regions
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.rotation.fuse_norms import FuseNorms
from kvxform.passes.rotation.rotate_qk import RotateQk
from kvxform.passes.rotation.rotate_residual import RotateResidual
from kvxform.passes.rotation.rotate_v import RotateV
from kvxform.passes.structure.cache_latent import CacheLatent
from kvxform.passes.structure.loop_layers import LoopLayers
from kvxform.passes.structure.merge_kv_heads import MergeKvHeads
from kvxform.passes.structure.share_kv_layers import ShareKvLayers
from kvxform.passes.structure.to_latent import ToLatent
from kvxform.runtime.model import OptimizedModel

KEYS = [f"layers.{layer}.attn.{name}.weight" for layer in range(2) for name in "kv"]
SHORT = HealOptions(steps_local=6, steps=6, window=16, batch_size=2, learning_rate=1e-2, every=4)


def single(**options):
    return llama_program(dtype=torch.float32, heads=2, kv_heads=1, **options)


def cached(program):
    for graph_pass in (FuseNorms(), RotateV(), InsertCache(), RotateQk()):
        program, _ = apply(graph_pass, program)
    return program


@pytest.mark.parametrize("rank", [None, 12])
def test_only_what_was_touched_is_trained_and_the_model_comes_closer(rank):
    source = single()
    program = cached(disturbed(source, KEYS))
    options = dataclasses.replace(SHORT, steps_local=30, steps=30, batch_size=4, rank=rank)
    healed, record = heal_program(program, source, text_ids(20, 16), options)
    changed = {n for n, w in program.weights.items() if not torch.equal(w, healed.weights[n])}
    assert changed == set(KEYS)
    assert record.after.kl < 0.7 * record.before.kl
    assert [layer.layer for layer in record.layers] == [0, 1]
    assert all(layer.after < 0.9 * layer.before for layer in record.layers)
    expected = sum((32 + 16) * 12 if rank else 32 * 16 for _ in KEYS)
    assert (record.weights, record.parameters) == (4, expected)
    assert record.held_out_windows == 2
    assert healed.touched == program.touched, "it may be healed again"
    assert {str(healed.graph), str(program.graph)} == {str(program.graph)}


def test_training_that_does_harm_is_not_kept():
    source = single()
    program = disturbed(source, KEYS)
    options = dataclasses.replace(SHORT, learning_rate=1.0, rank=2)
    healed, record = heal_program(program, source, text_ids(8, 16), options)
    assert record.after == record.before
    assert "weights are as they were" in record.notes[-1]
    assert all(healed.weights[n] is weight for n, weight in program.weights.items())


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path):
    source = single()
    program, ids = disturbed(source, KEYS), text_ids(8, 16)
    whole, record = heal_program(program, source, ids, SHORT)

    class InterruptedRunError(Exception):
        pass

    for stop in ("heal: attentions 6/6", "heal: logits 5/6"):
        path = tmp_path / "run"

        def talk(line, stop=stop):
            if line.startswith(stop):
                raise InterruptedRunError

        with pytest.raises(InterruptedRunError):
            heal_program(program, source, ids, SHORT, checkpoint=path, talk=talk)
        assert path.exists()
        lines = []
        again, other = heal_program(
            program, source, ids, SHORT, checkpoint=path, resume=True, talk=lines.append
        )
        assert "heal: attentions 1/6" not in "".join(lines), "it did not start anew"
        assert other == record
        assert not path.exists()
        for name, weight in whole.weights.items():
            assert torch.equal(again.weights[name], weight), name


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    source, path = single(), tmp_path / "run"
    program, ids = disturbed(source, KEYS), text_ids(8, 16)

    def talk(line):
        if line.startswith("heal: logits"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        heal_program(program, source, ids, SHORT, checkpoint=path, talk=talk)
    other = dataclasses.replace(SHORT, seed=1)
    with pytest.raises(ArtifactError, match="KVX607"):
        heal_program(program, source, ids, other, checkpoint=path, resume=True)
    path.write_bytes(b"nothing of ours")
    with pytest.raises(ArtifactError, match="KVX607"):
        heal_program(program, source, ids, SHORT, checkpoint=path, resume=True)


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


def test_where_the_residual_stream_is_rotated_only_logits_are_trained():
    source = single()
    program = disturbed(source, KEYS)
    for graph_pass in (FuseNorms(), RotateResidual()):
        program, _ = apply(graph_pass, program)
    _, record = heal_program(program, source, text_ids(8, 16), SHORT)
    assert record.steps_local == 0
    assert record.layers == ()
    assert "another basis" in record.notes[0]


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


def test_fused_projections_of_gpt2_are_trained():
    source = gpt2_program(dtype=torch.float32)
    program = cached(disturbed(source, ["h.1.attn.c_attn.weight"]))
    options = dataclasses.replace(SHORT, steps_local=20, steps=0, batch_size=4)
    healed, record = heal_program(program, source, text_ids(20, 16), options)
    assert [layer.layer for layer in record.layers] == [1]
    assert record.layers[0].after < 0.8 * record.layers[0].before
    assert record.after.kl < record.before.kl
    assert healed.weights["h.1.attn.c_attn.weight"].shape == (32, 96)


def test_a_head_that_is_the_embedding_is_trained_at_both_ends():
    source = single(tied=True)
    program = disturbed(source, ["embed.weight"])
    options = dataclasses.replace(SHORT, steps=4)
    healed, record = heal_program(program, source, text_ids(8, 16), options)
    assert record.weights == 1
    assert record.after.kl < record.before.kl
    assert "no attention" in record.notes[0]
    assert not torch.equal(healed.weights["embed.weight"], program.weights["embed.weight"])


def test_frequencies_and_bases_are_no_weights_to_train():
    program = single()
    program.touched.update(dict.fromkeys(["inv_freq", KEYS[0]], "test"))
    assert Parameters(program, None, 0).names == (KEYS[0],)


def test_bfloat16_is_trained_in_float32_and_stays_bfloat16():
    source = llama_program(dtype=torch.bfloat16, heads=2, kv_heads=1)
    program = disturbed(source, KEYS)
    assert {x.dtype for x in Parameters(program, None, 0).tensors.values()} == {torch.float32}
    healed, record = heal_program(program, source, text_ids(20, 16), SHORT)
    assert record.after.kl < record.before.kl
    assert {weight.dtype for weight in healed.weights.values()} == {torch.bfloat16}


def test_refusals():
    source = single()
    program, ids = disturbed(source, KEYS), text_ids(8, 16)
    plain = dataclasses.replace(apply(InsertCache(), source)[0], passes=("insert-cache",))
    with pytest.raises(ArtifactError, match=r"KVX605.*insert-cache"):
        heal_program(plain, source, ids, SHORT)
    with pytest.raises(ArtifactError, match=r"KVX606.*none that is equal"):
        heal_program(program, single(seed=1), ids, SHORT)
    info = dataclasses.replace(source.info, vocab_size=50)
    with pytest.raises(ArtifactError, match=r"KVX606.*vocab size 48"):
        heal_program(program, dataclasses.replace(source, info=info), ids, SHORT)
    with pytest.raises(ArtifactError, match=r"KVX606.*layers.1.attn"):
        heal_program(program, single(layers=1), ids, SHORT)
    with pytest.raises(ArtifactError, match=r"KVX606.*attn.o.weight"):
        heal_program(program, single(head_dim=8), ids, SHORT)
    with pytest.raises(KvxformError, match=r"KVX704.*two windows"):
        heal_program(program, source, ids[:20], SHORT)
    with pytest.raises(KvxformError, match=r"KVX704.*between 0 and 47"):
        heal_program(program, source, ids + 47, SHORT)
    for wrong in ({"rank": 0}, {"steps": -1}, {"learning_rate": 0.0}, {"batch_size": 0}):
        with pytest.raises(KvxformError, match="KVX704"):
            dataclasses.replace(SHORT, **wrong)


def test_rates_grow_and_then_follow_a_cosine():
    rates = [rate_factor(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert rates[55] == pytest.approx(0.5)
    assert sorted(rates[10:], reverse=True) == rates[10:]
    assert rate_factor(0, 0) == 1


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
