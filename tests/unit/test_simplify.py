"""simplify: which rotations cancel, which streams are read folded."""

from __future__ import annotations

import pytest
import torch
from programs import apply, fired, llama_program, reasons, run, token_ids

import kvxform.ir.ops as kvx
from kvxform.ir.types import TensorType
from kvxform.pass_base import Rewriter
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.base.simplify import Simplify
from kvxform.passes.quantize.quantize_kv import QuantizeKv

INT4 = {"codec": "int", "bits": 4}


def with_rotations(*rotations: tuple[int, bool]):
    """Return a program whose q passes through Hadamards of (block, with signs)."""
    program = llama_program(layers=1)
    rewriter = Rewriter(program, "test")
    attention = program.attention_node(0)
    value = attention.args[0]
    program.weights["signs"] = torch.tensor([1.0, -1.0] * 8, dtype=torch.float64)
    for block, with_signs in rotations:
        options = {"block": block}
        if with_signs:
            type_ = TensorType(torch.float64, (16,))
            options["signs"] = rewriter.get_weight_node("signs", attention, type_)
        value = rewriter.call_before(
            attention, kvx.HADAMARD, (value,), options, type_=value.meta["type"]
        )
    attention.args = (value, *attention.args[1:])
    return program


@pytest.mark.parametrize(
    ("rotations", "matches", "left"),
    [
        ([(16, False)], 0, 1),
        ([(16, False), (16, False)], 1, 0),
        ([(8, True), (8, False)], 1, 0),  # leaves a product with the signs
        ([(8, False), (8, False), (8, False)], 1, 1),
        ([(4, False), (4, False), (4, True), (4, False)], 2, 0),
    ],
)
def test_equal_rotations_cancel(rotations, matches, left):
    program = with_rotations(*rotations)
    simple, found = apply(Simplify(), program)
    assert fired(found) == matches
    assert len(list(simple.calls(kvx.HADAMARD))) == left
    ids = token_ids(program)
    torch.testing.assert_close(run(simple, ids), run(program, ids), rtol=0, atol=1e-12)
    assert fired(Simplify().match(simple)) == 0


@pytest.mark.parametrize(
    ("rotations", "reason"),
    [
        ([(16, False), (4, False)], "blocks of the two rotations differ"),
        ([(16, False), (16, True)], "signs stand between the two rotations"),
    ],
)
def test_unequal_rotations_stay(rotations, reason):
    simple, found = apply(Simplify(), with_rotations(*rotations))
    assert reasons(found) == [reason]
    assert len(list(simple.calls(kvx.HADAMARD))) == 2


def test_a_rotation_that_something_else_reads_stays_for_it():
    program = with_rotations((16, False), (16, False))
    inner, outer = program.calls(kvx.HADAMARD)
    attention = program.attention_node(0)
    attention.args = (outer, inner, *attention.args[2:])
    program.sites = ()  # the keys are nonsense here; only the graph is of interest
    Rewriter(program, "test")
    found = Simplify().match(program)
    rewriter = Rewriter(program, "simplify")
    Simplify().rewrite(program, found[0], rewriter)
    rewriter.finish()
    assert list(program.calls(kvx.HADAMARD)) == [inner]


def test_affine_streams_are_read_folded():
    program, _ = apply(InsertCache(), llama_program())
    program, _ = apply(QuantizeKv(INT4, None), program)
    simple, found = apply(Simplify(), program)
    assert fired(found) == 2
    assert [site.key.read.form for site in simple.plan.sites] == ["folded", "folded"]
    assert [site.value.read.form for site in simple.plan.sites] == ["element", "element"]
    assert simple.facts["read.simplified"]


def test_streams_stored_as_they_are_have_nothing_to_fold():
    program, _ = apply(InsertCache(), llama_program())
    _, found = apply(Simplify(), program)
    assert reasons(found) == ["no scale is applied per cached element"] * 2
    assert all(match.done for match in found)
