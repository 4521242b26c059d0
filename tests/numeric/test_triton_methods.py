"""Recipes of methods in the Triton lowering, in its interpreter, as in the eager one."""

from __future__ import annotations

import pytest
import torch
from lowered import assert_same_cache, both, divergence, lowered_program, prompts
from programs import llama_program

from kvxform.codegen.triton import capability
from kvxform.errors import CodegenError
from kvxform.pipeline import plan_pipeline
from kvxform.recipe import load_recipe

pytestmark = [pytest.mark.triton, pytest.mark.slow]

INT = {"codec": "int", "zero": "float"}
MIXED = {  # what a search of bits per layer leaves, and a boundary layer without codec
    "version": 1,
    "name": "mixed",
    "passes": [
        "insert-cache",
        "rotate-qk",
        {
            "quantize-kv": {
                "key": {**INT, "bits": 8},
                "value": {**INT, "bits": 4},
                "layers": {
                    "1": {"key": {**INT, "bits": 4}, "value": {**INT, "bits": 2}},
                    "-1": {"key": None, "value": None},
                },
            }
        },
        "simplify",
    ],
}
METHODS = {  # recipe, tokens of the prompt: more than stay exact
    "saw-int4": 40,
    "quarot-kv4": 40,
    "oscar-omni2": 150,
    "kivi2": 150,
    "turboquant-3": 40,
    "turboquant-2": 40,
    "fibquant-2": 40,
    "fibquant-1.5": 40,
}


def run_both(program, tokens):
    """Feed a prompt in two chunks and two more tokens to both lowerings."""
    ids = prompts(program, 1, tokens + 2)
    found = []
    for model in both(program):
        session = model.new_session(1, tokens + 2)
        logits = [session.prefill(ids[:, :tokens], chunk_size=tokens - 5)]
        logits += [session.decode(ids[:, t]) for t in (tokens, tokens + 1)]
        found.append((session, torch.cat(logits)))
    return (*found[1], *found[0])


@pytest.mark.parametrize("name", METHODS)
def test_a_method_gives_what_eager_gives(name):
    program = lowered_program(name, layers=1, heads=2, kv_heads=1)
    got_session, got, session, expected = run_both(program, METHODS[name])
    assert program.plan.site(0).key.body_tokens(METHODS[name]) > 0
    assert divergence(got, expected) <= 1e-4
    assert_same_cache(got_session, session, 5e-2)


def test_layers_may_differ():
    program = lowered_program(MIXED, layers=3, heads=2, kv_heads=1)
    codecs = [(s.key.codec.get("bits"), s.value.codec.get("bits")) for s in program.plan.sites]
    assert codecs == [(8, 4), (4, 2), (None, None)]
    got_session, got, session, expected = run_both(program, 40)
    assert divergence(got, expected) <= 1e-4
    assert_same_cache(got_session, session, 5e-2)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("kvx-3", "keys must be cached after RoPE"),
        ("rotatekv2", "keys must be cached after RoPE"),
        ("octopus-3", "the codec must be .*got octahedral"),
        ("gear", "the codec must be .*got low-rank-residual"),
        ("zipcache", "the codec must be .*got saliency"),
    ],
)
def test_a_method_without_kernels_is_refused_with_the_reason(name, words):
    program = llama_program(dtype=torch.float32, head_dim=64)
    planned, _ = plan_pipeline(program, load_recipe(name))
    with pytest.raises(CodegenError, match=rf"KVX401 \[triton\] {words}.*at layer 0.*Hint"):
        capability.check_plan(planned.plan)
