"""loop-layers: a window runs K times in damped steps; each loop is a layer of its own."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from families import ALL, InFloat64
from programs import apply, fired, gpt2_program, llama_program, reasons, run, token_ids
from still_layers import still
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import kvxform
import kvxform.ir.ops as kvx
from kvxform.capture import capture
from kvxform.codegen.eager.lowering import EagerExecutable
from kvxform.codegen.onnx import export_onnx
from kvxform.errors import PassError, RecipeError
from kvxform.ir.program import Program, default_positions
from kvxform.ir.stream_cuts import layer_inputs
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.structure.loop_layers import LoopLayers
from kvxform.pipeline import plan_pipeline
from kvxform.recipe import load_recipe
from kvxform.runtime.model import OptimizedModel
from kvxform.runtime.onnx_session import OnnxSession

FAMILIES = [  # grouped heads, MHA; then biases, QK-norm, MHA with parallel layers
    "llama",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "qwen2", "qwen3", "phi")),
]


@functools.cache
def captured(name: str, **changes: Any) -> tuple[nn.Module, Program]:
    fields = {**ALL[name].fields, **changes}
    model = dataclasses.replace(ALL[name], fields=fields).build(torch.float64)
    return model, capture(model).program


def looped(program: Program, **options: Any) -> Program:
    rewritten, found = apply(LoopLayers(**options), program)
    assert fired(found)
    return rewritten


def by_hand(model: nn.Module, ids: Tensor, runs: list[list[int]], loops: int, eta: float) -> Tensor:
    """Run a Hugging Face Llama with each of `runs` repeated; layers in no run come once."""
    inner = model.model
    h = inner.embed_tokens(ids)
    angles = inner.rotary_emb(h, default_positions(ids))

    def through(h: Tensor, layers: list[int]) -> Tensor:
        for layer in layers:
            h = inner.layers[layer](h, position_embeddings=angles)
        return h

    layer = 0
    while layer < len(inner.layers):
        own = next((r for r in runs if r[0] == layer), None)
        if own is None:
            h = through(h, [layer])
        for _ in range(loops if own else 0):
            h = h + eta * (through(h, own) - h)
        layer += len(own or [layer])
    return model.lm_head(inner.norm(h))


@pytest.mark.parametrize(
    ("options", "runs", "loops", "eta"),
    [
        ({}, [[1, 2]], 2, 0.5),
        ({"layers": "0-3", "loops": 3, "eta": 0.25}, [[0, 1, 2, 3]], 3, 0.25),
        ({"layers": "1-2", "mode": "layer", "loops": 3}, [[1], [2]], 3, 1 / 3),
        ({"layers": "-1", "eta": 1.0}, [[3]], 2, 1.0),
        ({"layers": "1", "loops": 1, "eta": 0.5}, [[1]], 1, 0.5),
    ],
)
def test_loops_are_euler_steps(options, runs, loops, eta):
    model, program = captured("llama", num_hidden_layers=4)
    ids = torch.randint(3, program.info.vocab_size, (2, 9))
    with torch.no_grad(), InFloat64():
        expected, source = by_hand(model, ids, runs, loops, eta), model(ids).logits
    found = run(looped(program, **options), ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert float((found - source).abs().max()) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_one_loop_is_the_source(family):
    program = captured(family)[1]
    same, found = apply(LoopLayers(loops=1), program)
    assert (fired(found), reasons(found)) == (0, ["one loop is the model itself"])
    ids = token_ids(program)
    assert torch.equal(run(same, ids), run(program, ids))


@pytest.mark.parametrize("mode", ["block", "layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_change_nothing_may_loop(family, mode):
    program = still(captured(family)[1])
    ids = token_ids(program)
    found = run(looped(program, layers="0-1", loops=3, mode=mode), ids)
    torch.testing.assert_close(found, run(program, ids), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("cache", "caches"), [("each", [0, 1, 2, 3, 4, 5]), ("first", [0, 1, 2, 5])]
)
def test_sessions_hold_what_loops_need(cache, caches):
    program = looped(llama_program(layers=4), cache=cache)
    assert [site.layer for site in program.sites] == list(range(6))
    cached, _ = apply(InsertCache(), program)
    assert [site.layer for site in cached.plan.owners] == caches
    model, ids = OptimizedModel(cached), token_ids(program, tokens=12)
    expected = run(program, ids)
    session = model.new_session(max_batch_size=2, max_seq_len=16)
    session.prefill(ids[:, :7], chunk_size=3)
    for t in range(7, 12):
        torch.testing.assert_close(session.decode(ids[:, t]), expected[:, t], rtol=0, atol=1e-9)
    plain, _ = apply(InsertCache(), llama_program(layers=4))
    share = model.plan.bytes_per_token / plain.plan.bytes_per_token
    assert share == len(caches) / 4


def flops(program: Program) -> int:
    ids = torch.zeros(1, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        EagerExecutable(program)(ids, default_positions(ids))
    return counter.get_total_flops()


@pytest.mark.parametrize("mode", ["block", "layer"])
def test_work_grows_by_the_share_of_the_window(mode):
    program = llama_program(layers=4)
    one_layer = (flops(program) - flops(llama_program(layers=2))) // 2
    for loops in (2, 4):
        more = flops(looped(program, layers="1-3", loops=loops, mode=mode)) - flops(program)
        assert more == (loops - 1) * 3 * one_layer > 0


def test_layers_loop_once():
    program = looped(llama_program(), layers="0")
    assert reasons(LoopLayers(layers="2").match(program)) == ["layers loop already"]


def test_layers_behind_keep_their_options_and_weights():
    program = looped(llama_program(layers=3), layers="1", loops=3)
    assert [site.module for site in program.sites] == [f"layers.{i}.attn" for i in (0, 1, 1, 1, 2)]
    assert [n.kwargs["layer"] for n in program.calls(kvx.ATTENTION)] == [0, 1, 2, 3, 4]
    assert len(program.weights) == len(llama_program(layers=3).weights)


def test_layers_that_share_keys_are_a_near_miss():
    program = llama_program(layers=3)
    reader, owner = program.attention_node(1), program.attention_node(0)
    reader.args = (reader.args[0], *owner.args[1:3], reader.args[3])
    own, other, last = program.sites
    other = dataclasses.replace(other, shared_with=0, k=own.k, v=own.v)
    program.sites = (own, other, last)
    alone = LoopLayers(layers="1").match(program)
    assert reasons(alone) == ["more than one value goes into layer 1"]
    assert reasons(LoopLayers(layers="0").match(program)) == [
        "more than one value, or none that is a sum, leaves layer 0"
    ]
    both = looped(program, layers="0-1")
    assert [site.owner for site in both.sites] == [0, 0, 2, 2, 4]
    first = looped(program, layers="0-1", cache="first")
    assert [site.owner for site in first.sites] == [0, 0, 0, 0, 4]


def test_the_end_of_a_model_is_before_its_last_norm():
    for program in (llama_program(), gpt2_program()):
        names = [node.target for node in layer_inputs(program).values()]
        assert len(names) == 3
        assert names[-1] is torch.ops.aten.add.Tensor


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"loops": 0}, "loops must be at least 1"),
        ({"eta": 0.0}, "eta must be above 0"),
        ({"eta": 1.5}, "eta must be above 0"),
        ({"cache": "last"}, "a loop must not read what later loops of earlier tokens leave"),
        ({"layers": "a"}, "layers must be numbers"),
    ],
)
def test_bad_options_are_refused(options, rule):
    with pytest.raises(RecipeError, match=rule):
        LoopLayers(**options)


def test_bad_windows_are_refused():
    with pytest.raises(PassError, match="one run of layers"):
        LoopLayers(layers="0,2").match(llama_program(layers=3))
    with pytest.raises(PassError, match="layers must be those of the model"):
        LoopLayers(layers="7").match(llama_program())


def test_loops_come_before_the_cache():
    recipe = {"version": 1, "name": "t", "passes": ["insert-cache", "loop-layers"]}
    with pytest.raises(RecipeError, match="its own place in a cache"):
        plan_pipeline(llama_program(), load_recipe(recipe))


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["each", "first"])
def test_packages_run(cache, tmp_path):
    source = looped(llama_program(dtype=torch.float32), cache=cache)
    program, _ = apply(InsertCache(), source)
    session = OnnxSession(export_onnx(program, tmp_path / "p"))
    ids = token_ids(source, tokens=10)
    expected = run(source, ids)
    session.prefill(ids[:, :6])
    for t in range(6, 10):
        got = torch.as_tensor(session.decode(ids[:, t]))
        torch.testing.assert_close(got, expected[:, t], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["first", "each"])
def test_rotations_and_codecs_compose(cache):
    passes = [
        "rotate-v",
        {"loop-layers": {"layers": "0-1", "cache": cache}},
        "insert-cache",
        {"page-cache": {"page_size": 16}},
        "rotate-qk",
        {"quantize-kv": {name: {"codec": "int", "bits": 4} for name in ("key", "value")}},
    ]
    recipe = {"version": 1, "name": "t", "passes": passes}
    model = kvxform.optimize(ALL["llama"].build(torch.float64), recipe)
    assert len(model.plan.owners) == (4 if cache == "each" else 2)
    assert model.report.passes[1].vs_before.kl > 0
