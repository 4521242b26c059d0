"""Two sides run on the same inputs."""

from __future__ import annotations

import math

import pytest
import torch
from cached import cached_program
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import apply, llama_program

from kvxform.diffing.caches import compare_caches
from kvxform.diffing.numeric import compare_logits, compare_runs, default_probe, turned_error
from kvxform.ir.program import Program
from kvxform.passes.rotation.fuse_norms import FuseNorms
from kvxform.passes.rotation.rotate_residual import RotateResidual
from kvxform.runtime.model import OptimizedModel
from kvxform.verify.probe import Probe, make_probe

INT4 = {"codec": "int", "bits": 4}
LOSSY = {"key": INT4, "value": INT4}
PROBE = make_probe(48, (30, 9, 16))


def changed(program: Program, layer: int) -> Program:
    """Return a program whose keys of one layer are made otherwise."""
    clone = program.clone()
    name = f"layers.{layer}.attn.k.weight"
    clone.weights[name] = clone.weights[name].flip(0)
    return clone


@pytest.mark.parametrize("program", [llama_program(), cached_program(LOSSY)], ids=["plain", "int4"])
def test_equal_sides_are_equal_to_the_last_bit(program):
    model = OptimizedModel(program)
    found = compare_runs(model, OptimizedModel(program.clone()), default_probe(model, model))
    assert found.logits.max_abs == found.logits.kl == 0.0
    assert found.logits.top1 == 1.0
    assert found.first_layer is None
    assert [layer.hidden for layer in found.layers] == [0.0, 0.0]
    assert [layer.key for layer in found.layers] == [0.0, 0.0]
    assert found.is_rounding


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_first_layer_that_parts_is_named(layer):
    program = llama_program(layers=3)
    sides = [OptimizedModel(program), OptimizedModel(changed(program, layer))]
    found = compare_runs(*sides, PROBE)
    assert found.first_layer == layer
    assert not found.is_rounding
    before, at = found.layers[:layer], found.layers[layer]
    assert all(x.hidden == x.key == x.value == 0.0 for x in before)
    assert at.key > 0.1
    assert at.value == 0.0
    assert at.hidden > 1e-3


def test_errors_are_root_mean_squares_over_those_of_a():
    program = llama_program(dtype=torch.float64)
    clone = program.clone()
    clone.weights["embed.weight"] = 1.5 * clone.weights["embed.weight"]
    clone.weights["layers.0.attn.o.weight"] = 0.0 * clone.weights["layers.0.attn.o.weight"]
    plain = program.clone()
    plain.weights["layers.0.attn.o.weight"] = clone.weights["layers.0.attn.o.weight"]
    for side in (plain, clone):  # the first layer leaves the embedding alone
        side.weights["layers.0.mlp.down.weight"] = torch.zeros(32, 64, dtype=torch.float64)
    found = compare_runs(OptimizedModel(plain), OptimizedModel(clone), PROBE)
    assert found.layers[0].hidden == pytest.approx(0.5)


def test_logits_are_compared_where_positions_count():
    a = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probe = Probe(torch.zeros(2, 5, dtype=torch.int64), (5, 2))
    b = a.clone()
    b[1, 2:] = 99.0  # padding
    assert compare_logits(a, b, probe).max_abs == 0.0
    b[0, 3] += torch.linspace(0.0, 1.0, 48, dtype=torch.float64)
    found = compare_logits(a, b, probe)
    rows = torch.cat([a[0], a[1, :2]]), torch.cat([b[0], b[1, :2]])
    p, q = (x.log_softmax(-1) for x in rows)
    assert found.max_abs == pytest.approx(1.0)
    assert found.relative == pytest.approx(1.0 / float(rows[0].abs().max()))
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()))
    assert found.top1 == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert compare_logits(a, b[..., :40], probe) is None


def test_one_side_may_have_a_cache_and_the_other_none():
    plain, cached = llama_program(), cached_program(LOSSY)
    found = compare_runs(OptimizedModel(plain), OptimizedModel(cached), PROBE)
    assert found.first_layer == 0
    assert 0.03 < found.layers[0].key < 0.3
    assert 0.03 < found.layers[0].value < 0.3
    exact = compare_runs(OptimizedModel(plain), OptimizedModel(cached_program(None)), PROBE)
    assert exact.first_layer is None
    assert exact.is_rounding


def test_a_side_may_give_logits_alone():
    program = llama_program()
    model = OptimizedModel(program)
    found = compare_runs(model, lambda ids: 2.0 * model(ids), PROBE)
    assert found.layers == ()
    assert found.logits.relative == pytest.approx(1.0)
    shifted = compare_runs(model, lambda ids: model(ids) + 1.0, PROBE)
    assert shifted.logits.kl < 1e-12  # and yet the logits are others
    assert not shifted.is_rounding


def test_errors_of_caches_are_taken_over():
    program = cached_program(LOSSY)
    sides = [OptimizedModel(program), OptimizedModel(changed(program, 1))]
    caches = compare_caches(*sides, PROBE)
    found = compare_runs(*sides, PROBE, caches=caches)
    assert found.schedules == caches.schedules != ()
    assert found.symptoms == caches.symptoms
    assert [x.key for x in found.layers] == [x.key for x in caches.layers]
    assert found.layers[1].hidden > 1e-3


def test_layers_are_paired_as_asked():
    program = llama_program(layers=3)
    found = compare_runs(
        OptimizedModel(program), OptimizedModel(program), PROBE, pairs=[(0, 0), (1, 2)]
    )
    assert [x.layer for x in found.layers] == [0, 1]
    assert found.layers[0].hidden == 0.0
    assert found.layers[1].hidden > 0.0


def test_a_rotated_residual_stream_is_compared_up_to_the_rotation():
    program, _ = apply(FuseNorms(), llama_program())
    rotated, _ = apply(RotateResidual(), program)
    assert rotated.facts["residual.basis"] != "identity"
    found = compare_runs(OptimizedModel(program), OptimizedModel(rotated), PROBE)
    assert all(x.hidden < 1e-6 for x in found.layers)
    faulty = compare_runs(OptimizedModel(program), OptimizedModel(changed(rotated, 1)), PROBE)
    assert faulty.first_layer == 1


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_the_best_turn_is_found(rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    assert turned_error(x, x @ turn) < 1e-6
    u, _, vh = torch.linalg.svd(x.T @ y)
    expected = float((x @ (u @ vh) - y).norm() / x.norm())
    assert turned_error(x, y) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_what_is_no_number_is_no_rounding():
    program = llama_program()
    clone = program.clone()
    clone.weights["layers.1.attn.o.weight"] = clone.weights["layers.1.attn.o.weight"] * math.nan
    found = compare_runs(OptimizedModel(program), OptimizedModel(clone), PROBE)
    assert found.first_layer == 1
    assert not found.is_rounding
