"""rotate-residual: the stream is rotated, K and V and logits are not, and what blocks it."""

from __future__ import annotations

import pytest
import torch
from programs import (
    Builder,
    DenseCache,
    apply,
    aten,
    fired,
    gpt2_program,
    llama_program,
    reasons,
    run,
    token_ids,
)

import kvxform.ir.ops as kvx
from kvxform.errors import RecipeError
from kvxform.ir.cache import make_handle
from kvxform.ir.program import default_positions
from kvxform.ir.types import TensorType
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.rotation.fuse_norms import FuseNorms
from kvxform.passes.rotation.rotate_residual import RotateResidual
from kvxform.rotations.orders import DenseRotation

MODELS = {
    "llama": lambda: llama_program(tied=True),
    "llama with biases": lambda: llama_program(bias=True),
    "gpt2": gpt2_program,
    "gpt2, head of its own": lambda: gpt2_program(tied=False),
}


def fused(program):
    return apply(FuseNorms(untie=True), program)[0]


def embedded(program, ids):
    """Return what the first norm reads."""
    first = next(iter(program.calls(kvx.RMS_NORM, torch.ops.aten.layer_norm.default)))
    graph = program.clone()
    for node in graph.graph.nodes:
        if node.op == "output":
            node.args = (next(n for n in graph.graph.nodes if n.name == first.args[0].name),)
    return graph.to_module()(ids, default_positions(ids))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "options", [{}, {"kind": "orthogonal", "seed": 3}, {"online_down": True}], ids=str
)
def test_logits_keys_and_values_stay(model, options):
    program = MODELS[model]()
    ids = token_ids(program)
    rotated, found = apply(RotateResidual(**options), fused(program))
    assert fired(found) == 1
    assert rotated.facts["residual.basis"] == options.get("kind", "hadamard")
    torch.testing.assert_close(run(rotated, ids), run(program, ids), rtol=0, atol=1e-12)
    held = []
    for each in (program, rotated):
        cache = DenseCache()
        inserted, _ = apply(InsertCache(), each)
        inserted.to_module()(ids, default_positions(ids), make_handle(cache))
        held.append(cache.stored)
    for layer, pair in held[0].items():
        for a, b in zip(pair, held[1][layer], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_stream_is_the_old_one_times_the_rotation():
    program = fused(llama_program())
    ids = token_ids(program)
    rotated, _ = apply(RotateResidual(seed=4), program)
    before, after = embedded(program, ids), embedded(rotated, ids)
    expected = DenseRotation(32, "hadamard", 4).apply(before)
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-12)
    assert float((after - before).abs().max()) > 0.1


def test_layer_norms_become_rms_norms_of_a_stream_without_mean():
    program = fused(gpt2_program())
    ids = token_ids(program)
    rotated, _ = apply(RotateResidual(), program)
    assert not list(rotated.calls(torch.ops.aten.layer_norm.default))
    assert len(list(rotated.calls(kvx.RMS_NORM))) == 5
    before, after = embedded(program, ids), embedded(rotated, ids)
    centred = before - before.mean(-1, keepdim=True)
    expected = DenseRotation(32, "hadamard", 0).apply(centred)
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-12)


def test_outliers_of_the_stream_are_spread():
    program = llama_program()
    table = program.weights["embed.weight"]
    program.weights["embed.weight"] = table.index_fill(1, torch.tensor([5]), 30.0)
    ids = token_ids(program)
    rotated, _ = apply(RotateResidual(), fused(program))
    peak = [
        float(x.abs().max() / x.square().mean().sqrt())
        for x in (embedded(program, ids), embedded(rotated, ids))
    ]
    assert peak[0] > 5
    assert peak[1] < 2


def test_the_down_projection_reads_rotated_activations_and_attention_does_not():
    program = fused(llama_program())
    rotated, _ = apply(RotateResidual(online_down=True), program)
    turned = list(rotated.calls(kvx.HADAMARD))
    assert len(turned) == 2
    for node in turned:
        (reader,) = node.users
        assert reader.args[1].target.endswith("mlp.down.weight")
        assert node.kwargs == {"block": 64}


def test_a_tied_head_stays_tied_where_no_gain_came_between():
    program = llama_program(tied=True)
    for node in program.calls(kvx.RMS_NORM):
        node.args = (node.args[0], None, *node.args[2:])
    ids = token_ids(program)
    rotated, found = apply(RotateResidual(), program)
    assert fired(found) == 1
    assert not any("untied" in name for name in rotated.weights)
    torch.testing.assert_close(run(rotated, ids), run(program, ids), rtol=0, atol=1e-12)


def test_a_gain_in_the_stream_is_refused_with_the_norm():
    program, _ = apply(FuseNorms(), llama_program(tied=True))  # the last norm keeps its gain
    _, found = apply(RotateResidual(), program)
    assert reasons(found) == ["a norm of the stream has a gain"]
    assert found[0].node == list(program.calls(kvx.RMS_NORM))[-1].name
    assert "untie: true" in found[0].hint


def with_extra(edit):
    """Return a fused program whose stream meets one more operation."""
    program = fused(llama_program(layers=1))
    norm = list(program.calls(kvx.RMS_NORM))[-1]
    x = norm.args[0]
    with program.graph.inserting_before(norm):
        new = edit(program.graph, x)
    new.meta = dict(x.meta)
    norm.args = (new, *norm.args[1:])
    return program, new


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda g, x: g.call_function(aten.tanh.default, (x,)), "reads the stream and is no"),
        (lambda g, x: g.call_function(aten.add.Tensor, (x, 1.0)), "adds a number to the stream"),
        (lambda g, x: g.call_function(aten.mul.Tensor, (x, x)), "reads the stream and is no"),
    ],
)
def test_other_operations_on_the_stream_are_refused(edit, reason):
    program, node = with_extra(edit)
    _, found = apply(RotateResidual(), program)
    assert fired(found) == 0
    assert reason in reasons(found)[0]
    assert node.name in reasons(found)[0]


@pytest.mark.parametrize("factor", [0.5, 3])
def test_factors_of_the_stream_are_no_obstacle(factor):
    program, _ = with_extra(lambda g, x: g.call_function(aten.mul.Tensor, (x, factor)))
    ids = token_ids(program)
    rotated, found = apply(RotateResidual(), program)
    assert fired(found) == 1
    torch.testing.assert_close(run(rotated, ids), run(program, ids), rtol=0, atol=1e-12)


def odd_program(width: int = 18):
    """Return a program of one linear layer over an embedding, of a width without a Hadamard."""
    b = Builder(torch.float64, 0)
    ids = b.input("input_ids")
    b.input("position_ids")
    x = b.call(aten.embedding.default, b.weight("embed.weight", 48, width), ids)
    return b.finish(b.linear(x, "head", 48), [], 48)


def test_a_width_without_a_hadamard_matrix_is_refused_and_a_random_rotation_is_not():
    program = odd_program()
    _, found = apply(RotateResidual(), program)
    assert reasons(found) == ["no Hadamard matrix of order 18 is known"]
    assert found[0].hint == "use kind: orthogonal"
    ids = token_ids(program)
    rotated, found = apply(RotateResidual(kind="orthogonal"), program)
    assert fired(found) == 1
    torch.testing.assert_close(run(rotated, ids), run(program, ids), rtol=0, atol=1e-12)


def test_an_unknown_kind_is_refused():
    with pytest.raises(RecipeError, match=r"KVX107 \[rotate-residual\] kind must be hadamard or"):
        RotateResidual(kind="haar")


def test_a_reader_of_the_mean_beside_layer_norms_is_refused():
    program = fused(gpt2_program(tied=False))
    head = list(program.calls(aten.linear.default))[-1]
    norm = head.args[0]
    head.args = (norm.args[0], *head.args[1:])  # the logits come from the bare stream
    program.graph.erase_node(norm)
    _, found = apply(RotateResidual(), program)
    reason = "linear_default reads the mean of the stream, LayerNorm drops it"
    assert reasons(found) == [reason]


def test_a_weight_that_something_else_reads_is_refused():
    program = fused(llama_program(layers=2))
    for node in program.graph.nodes:
        if node.target == "layers.1.mlp.up.weight":
            node.target = "layers.0.mlp.up.weight"
    rotated, found = apply(RotateResidual(), program)
    assert fired(found) == 1, "two readers of the stream may share a weight"
    ids = token_ids(program)
    torch.testing.assert_close(run(rotated, ids), run(program, ids), rtol=0, atol=1e-12)
    program.weights["alias"] = program.weights["layers.0.mlp.up.weight"]
    head = list(program.calls(aten.linear.default))[-1]
    with program.graph.inserting_before(head):
        alias = program.graph.create_node("get_attr", "alias")
    alias.meta = {
        "type": TensorType(torch.float64, (64, 32)),
        "module": "",
        "origin": "",
        "via": (),
    }
    head.args = (head.args[0], alias)
    _, found = apply(RotateResidual(), program)
    assert reasons(found) == ["weight layers.0.mlp.up.weight is read in 3 places"]
