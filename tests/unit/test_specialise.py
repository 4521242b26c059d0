"""Direct calls equal the dialect ops they replace, and every op is replaced."""

import dataclasses

import pytest
import torch
from cached import cached_program
from programs import apply, gpt2_program, llama_program, run, token_ids

import kvxform.ir.ops as kvx
from kvxform.codecs.hadamard import hadamard_matrix
from kvxform.codegen.eager.specialise import (
    fused_rms_norm,
    rope_table,
    rotate_blocks,
    rotate_halves,
    specialise,
)
from kvxform.ir.program import default_positions
from kvxform.passes.rotation.rotate_qk import RotateQk


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rotary_dim", [8, 16])
@pytest.mark.parametrize("scaling", [1.0, 1.3])
def test_rope_from_a_table(rotary_dim, scaling):
    x, inv_freq = randn(2, 3, 5, 16), randn(rotary_dim // 2).abs()
    positions = torch.arange(10).view(2, 5) * 7
    expected = kvx.rope(x, positions, inv_freq, rotary_dim=rotary_dim, attention_scaling=scaling)
    table = rope_table(positions, inv_freq, scaling=scaling, dtype=x.dtype)
    assert (rotate_halves(x, table) - expected).abs().max() < 1e-14


def test_angles_keep_the_dtype_of_the_frequencies():
    x, inv_freq = randn(1, 1, 4, 8, dtype=torch.bfloat16), randn(4, dtype=torch.float32).abs()
    positions = torch.tensor([[0, 500, 1000, 2000]])
    table = rope_table(positions, inv_freq, scaling=1.0, dtype=x.dtype)
    expected = kvx.rope(x, positions, inv_freq, rotary_dim=8)
    assert (rotate_halves(x, table) - expected).abs().max() <= 2**-7 * expected.abs().max()


@pytest.mark.parametrize("block", [4, 16])
@pytest.mark.parametrize("signs", [None, torch.tensor([1.0, -1.0] * 8)])
def test_hadamard_with_a_ready_matrix(block, signs):
    x = randn(2, 3, 5, 16)
    found = rotate_blocks(x, hadamard_matrix(block), signs)
    assert (found - kvx.hadamard(x, block=block, signs=signs)).abs().max() < 1e-14


@pytest.mark.parametrize("weight", [None, randn(16)])
def test_rms_norm(weight):
    x = randn(2, 5, 16)
    assert (fused_rms_norm(x, weight, 1e-5) - kvx.rms_norm(x, weight, 1e-5)).abs().max() < 1e-14


def targets(program):
    graph = specialise(program.clone()).graph
    return [n.target for n in graph.nodes if n.op == "call_function"]


def test_no_dialect_op_is_left_and_one_table_serves_all_layers():
    program, _ = apply(RotateQk(block=16), cached_program())
    found = targets(program)
    assert not set(found) & set(kvx.DIALECT)
    assert found.count(rope_table) == 1
    assert found.count(rotate_halves) == found.count(rotate_blocks) == 4
    assert found.count(fused_rms_norm) == 5


@pytest.mark.parametrize(
    "program",
    [llama_program(), llama_program(weight_offset=1.0), gpt2_program()],
    ids=["llama", "gain with offset", "gpt2"],
)
def test_module_equals_the_program(program):
    ids = token_ids(program)
    module = specialise(program.clone())
    assert (module(ids, default_positions(ids)) - run(program, ids)).abs().max() < 1e-13


def test_sixteen_bit_programs_keep_the_reference_arithmetic():
    program, _ = apply(RotateQk(block=16), cached_program(dtype=torch.bfloat16))
    found = targets(program)
    assert fused_rms_norm not in found
    assert rotate_blocks not in found
    assert found.count(kvx.hadamard) == 4


def test_interleaved_rope_keeps_the_reference():
    program = llama_program()
    for node in program.calls(kvx.ROPE):
        node.kwargs = {**node.kwargs, "interleaved": True}
    assert targets(program).count(kvx.rope) == 4


def test_layers_with_other_frequencies_get_their_own_table():
    program = llama_program()
    program.weights["inv_freq_2"] = program.weights["inv_freq"] * 2
    for node in list(program.calls(kvx.ROPE))[2:]:
        node.args[2].target = "inv_freq_2"
    ids = token_ids(program)
    module = specialise(program.clone())
    assert targets(program).count(rope_table) == 2
    assert (module(ids, default_positions(ids)) - run(program, ids)).abs().max() < 1e-13


def test_source_program_is_not_touched():
    program = llama_program()
    weights, nodes = dict(program.weights), [n.name for n in program.graph.nodes]
    specialise(dataclasses.replace(program.clone()))
    assert program.weights.keys() == weights.keys()
    assert [n.name for n in program.graph.nodes] == nodes
