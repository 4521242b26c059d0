"""The executable: the short cut to the last logits, and plans it refuses."""

import dataclasses

import pytest
import torch
from cached import cached_program
from programs import gpt2_program, llama_program, run, token_ids

from kvxform.codegen.eager.cache import PagedCache
from kvxform.codegen.eager.lowering import EagerExecutable
from kvxform.errors import CodegenError
from kvxform.ir.program import Program, default_positions

ATEN = torch.ops.aten


def scaled(program: Program, by_tensor: bool) -> Program:
    """Scale the logits, as Gemma's softcap does."""
    output = next(n for n in program.graph.nodes if n.op == "output")
    logits = output.args[0]
    with program.graph.inserting_before(output):
        factor = logits if by_tensor else 0.5
        half = program.graph.call_function(ATEN.mul.Tensor, (logits, factor))
        capped = program.graph.call_function(ATEN.tanh.default, (half,))
    for node in (half, capped):
        node.meta = dict(logits.meta)
    output.args = (capped,)
    return program


@pytest.mark.parametrize(
    ("program", "is_cut"),
    [
        (llama_program(), True),
        (llama_program(tied=True), True),
        (gpt2_program(), True),
        (scaled(llama_program(), by_tensor=False), True),
        (scaled(llama_program(), by_tensor=True), False),
    ],
    ids=["linear", "tied", "gpt2", "pointwise tail", "tail that reads twice"],
)
def test_last_logits_equal_those_of_the_full_run(program, is_cut):
    ids = token_ids(program, 3, 9)
    executable = EagerExecutable(program)
    last = torch.tensor([8, 0, 4])
    found = executable(ids, default_positions(ids), last=last)
    assert torch.allclose(found, run(program, ids)[torch.arange(3), last], atol=1e-13)
    assert (executable._last is not None) == is_cut


def test_short_cut_leaves_the_program_alone():
    program = llama_program()
    names = [n.name for n in program.graph.nodes]
    executable = EagerExecutable(program)
    ids = token_ids(program, 1, 3)
    executable(ids, default_positions(ids), last=torch.tensor([2]))
    assert [n.name for n in program.graph.nodes] == names


def test_weights_are_shared():
    program = llama_program()
    module = EagerExecutable(program)._full
    held = {tensor.data_ptr() for tensor in module.buffers()}
    assert held == {w.data_ptr() for w in program.weights.values()}


def changed(**changes):
    program = cached_program()
    key = changes.pop("key", {})
    site = program.plan.site(1)
    changes["key"] = dataclasses.replace(site.key, **key)
    program.plan = program.plan.replace_site(1, **changes)
    return program


def without_plan():
    program = cached_program()
    program.plan = None
    return program


REFUSED = {
    "payload must be .* or pair; got ids at layer 1": lambda: changed(payload="ids"),
    "whole groups of 24 tokens; got 16 at layer 1": lambda: changed(key={"tokens_per_group": 24}),
    "a cache input if and only if it has a plan": without_plan,
}


@pytest.mark.parametrize("message", REFUSED)
def test_plans_that_cannot_run_are_refused(message):
    with pytest.raises(CodegenError, match=rf"KVX401 \[eager\] .*{message}"):
        EagerExecutable(REFUSED[message]())


def test_cached_ops_outside_a_step_are_refused():
    program = cached_program()
    cache = PagedCache(program.plan, num_pages=2, page_size=16, num_rows=1)
    ids = token_ids(program, 1, 3)
    with pytest.raises(CodegenError, match=r"KVX401 .* inside a step"):
        EagerExecutable(program)(ids, default_positions(ids), cache)
