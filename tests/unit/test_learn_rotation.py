"""learn-rotation: what is learnt is better, orthogonal and exact; fake rounding by its codec."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from programs import apply, fired, gpt2_program, llama_program, reasons, run, token_ids

import kvxform.ir.ops as kvx
from kvxform.codecs.basis import Basis
from kvxform.codecs.integer import IntCodec
from kvxform.errors import RecipeError
from kvxform.ir.calibration import Calibration
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.rotation.learn_rotation import LearnRotation
from kvxform.passes.rotation.rotate_v import RotateV
from kvxform.rotations.fake_quant import RoundedProgram, fake_int
from kvxform.rotations.learning import Schedule, learn_bases
from kvxform.rotations.orders import hadamard_of_width


def on_tokens(program, windows=3, window=24):
    ids = token_ids(program, windows, window, seed=9)
    return dataclasses.replace(program, calibration=Calibration("toy", ids, {}))


def starts(program, streams=("value",)):
    one = hadamard_of_width(16)
    return {
        (stream, s.layer): one.expand(s.num_kv_heads, -1, -1)
        for stream in streams
        for s in program.sites
    }


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fake_rounding_is_that_of_the_codec(bits):
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(bits))
    codec = IntCodec(bits=bits)
    expected = codec.decode(codec.encode(x), torch.float32)
    difference = (fake_int(x, bits) - expected).abs()
    assert float(difference.median()) < 1e-3, "scales are not rounded to float16 here"
    constant = torch.full((3, 16), 2.5)
    torch.testing.assert_close(fake_int(constant, bits), constant)


def test_gradients_reach_the_range_of_a_vector():
    x = torch.tensor([0.0, 0.9, 2.1, 3.0], requires_grad=True)  # scale 1: codes 0, 1, 2, 3
    fake_int(x, 2).sum().backward()
    # d/dx of s * code with s = (x3 - x0) / 3: rounding errors 0.1 and -0.1 cancel in the sum
    torch.testing.assert_close(x.grad.sum(), torch.tensor(4.0))
    (gradient,) = torch.autograd.grad(fake_int(x, 2)[1], x)
    torch.testing.assert_close(gradient, torch.tensor([-0.1 / 3, 1, 0, 0.1 / 3]))


@pytest.mark.parametrize("make", [llama_program, gpt2_program])
def test_loss_falls_and_never_rises(make):
    program = make(dtype=torch.float32)
    ids = token_ids(program, 3, 24, seed=9)
    short = Schedule(bits=2, steps=12, tokens=24, learning_rate=1.5)
    learned = learn_bases(program, ids, starts(program), short)
    assert learned.loss < learned.start_loss
    rounded, single = RoundedProgram(program, 2), {}
    for place, matrices in learned.bases.items():
        eye = torch.eye(16, dtype=torch.float64).expand_as(matrices)
        torch.testing.assert_close(matrices @ matrices.mT, eye, rtol=0, atol=1e-10)
        single[place] = matrices.float()
    with torch.no_grad():
        again = sum(float(rounded.loss(row[None], single)) for row in ids) / 3
    assert abs(again - learned.loss) < 1e-6


def test_steps_that_lead_nowhere_keep_the_start():
    program = llama_program(dtype=torch.float32)
    ids = token_ids(program, 2, 8)
    wild = Schedule(bits=8, steps=1, tokens=8, learning_rate=1.5)
    start = starts(program)
    learned = learn_bases(program, ids, start, wild)
    assert learned.loss <= learned.start_loss
    if learned.loss == learned.start_loss:
        assert all(torch.equal(learned.bases[p], start[p]) for p in start)


@pytest.mark.parametrize("keys", [False, True])
def test_the_learnt_basis_is_folded_and_logits_stay(keys):
    program = on_tokens(llama_program(bias=True))
    ids = token_ids(program)
    rotated, found = apply(LearnRotation(bits=2, keys=keys, steps=4), program)
    assert fired(found) == (4 if keys else 2)
    assert len(list(rotated.calls(kvx.ROTATE))) == (4 if keys else 0)
    for site in rotated.sites:
        assert site.v_basis == Basis("matrix", weight=f"learn_rotation.v_{site.layer}")
        assert (site.k_basis == Basis()) == (not keys)
        matrices = rotated.weights[site.v_basis.weight]
        assert float((matrices - hadamard_of_width(16)).abs().max()) > 1e-3, "it has moved"
    torch.testing.assert_close(run(rotated, ids), run(program, ids), rtol=0, atol=1e-11)


def test_learning_twice_gives_the_same():
    program = on_tokens(llama_program(dtype=torch.float32))
    one, two = (apply(LearnRotation(bits=2, steps=3), program)[0] for _ in range(2))
    name = "learn_rotation.v_1"
    assert torch.equal(one.weights[name], two.weights[name])


def test_keys_that_are_rotated_already_are_rounded_where_they_are():
    program = llama_program(layers=1, dtype=torch.float32)
    ids = token_ids(program)
    rounded = RoundedProgram(program, 2)
    matrices = hadamard_of_width(16).float().expand(2, -1, -1)
    with torch.no_grad():
        plain = rounded.loss(ids, {})
        rotated = rounded.loss(ids, {("key", 0): matrices})
        both = rounded.loss(ids, {("key", 0): matrices, ("value", 0): matrices})
    assert len({round(float(x), 6) for x in (plain, rotated, both)}) == 3


def test_rotations_do_not_stack():
    once, _ = apply(RotateV(), on_tokens(llama_program(layers=1)))
    _, found = apply(LearnRotation(), once)
    assert reasons(found) == ["values are in basis hadamard(16), and rotations do not stack"]


def test_a_cache_is_refused_by_a_requirement():
    by_fact = {requirement.fact: requirement for requirement in LearnRotation.requires}
    program, _ = apply(InsertCache(), llama_program(layers=1))
    cached = program.facts.with_(cache__inserted=True)
    assert not by_fact["cache.inserted"].is_met(cached)
    assert by_fact["cache.inserted"].because == "gradients do not pass through a cache"


@pytest.mark.parametrize(
    "option", [{"bits": 5}, {"steps": 0}, {"tokens": 1}, {"learning_rate": 0.0}], ids=str
)
def test_bad_numbers_are_refused(option):
    (name,) = option
    with pytest.raises(RecipeError, match=rf"KVX107 \[learn-rotation\] {name} must be"):
        LearnRotation(**option)
