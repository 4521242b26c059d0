"""Healing: what is trained and what is not, resumed runs, refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from healed import KEYS, cached, disturbed, single, text_ids
from programs import apply, gpt2_program, llama_program

from kvxform.errors import ArtifactError, KvxformError
from kvxform.healing.healer import heal_program
from kvxform.healing.options import HealOptions
from kvxform.healing.parameters import Parameters
from kvxform.healing.training import rate_factor
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.rotation.fuse_norms import FuseNorms
from kvxform.passes.rotation.rotate_residual import RotateResidual

SHORT = HealOptions(steps_local=6, steps=6, window=16, batch_size=2, learning_rate=1e-2, every=4)


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


def test_where_the_residual_stream_is_rotated_only_logits_are_trained():
    source = single()
    program = disturbed(source, KEYS)
    for graph_pass in (FuseNorms(), RotateResidual()):
        program, _ = apply(graph_pass, program)
    _, record = heal_program(program, source, text_ids(8, 16), SHORT)
    assert record.steps_local == 0
    assert record.layers == ()
    assert "another basis" in record.notes[0]


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
