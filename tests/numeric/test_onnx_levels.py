"""Primitives of opset 18 and buffers of opset 24 and 25, against the definition of the cache."""

from __future__ import annotations

import onnx
import pytest
import torch
from cached import cached_program, defined_logits
from programs import apply, gpt2_program, latent_program, token_ids

import kvxform.ir.ops as kvx
from kvxform.codegen.onnx import export_onnx
from kvxform.codegen.onnx.forms import OnnxOptions
from kvxform.ir.types import TensorType
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.structure.cache_latent import CacheLatent
from kvxform.passes.structure.cache_prerope import CachePrerope
from kvxform.runtime.model import OptimizedModel
from kvxform.runtime.onnx_session import OnnxSession

TOKENS = 26
TOLERANCE = 1e-3  # where two ways of rounding meet, a code may flip; logits are about 2
INT4 = {"key": {"codec": "int", "bits": 4}, "value": {"codec": "int", "bits": 4}}
KIVI = {
    "key": {"codec": "int", "bits": 2, "axis": "channel", "group": 8, "zero": "float"},
    "value": {"codec": "int", "bits": 2, "group": 8, "zero": "float"},
    "regions": {"sink": 3, "recent": 8},
}
FORMS = {
    "L0": OnnxOptions("L0"),
    "L0 in opset 25": OnnxOptions("L0", 25),
    "opset 24": OnnxOptions(opset=24),
    "opset 25": OnnxOptions(opset=25),
    "opset 24, old runtime": OnnxOptions(opset=24, runtime="1.26"),
}


def toy(options=None, *, folded=False, **model):
    return cached_program(options, None, folded=folded, dtype=torch.float32, **model)


def open_form(program, folder, name):
    """Export a form of a program, check the file, and open it."""
    out = export_onnx(program, folder / "out", FORMS[name])
    onnx.checker.check_model(str(out / "model.onnx"), full_check=True)
    model = onnx.load(str(out / "model.onnx"), load_external_data=False)
    onnx.shape_inference.infer_shapes(model, strict_mode=True)
    return OnnxSession(out, threads=1)


def assert_close(found, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def assert_steps(session, ids, expected):
    """Assert that chunks and single tokens give the expected logits; ids `[B, n]`."""
    found = [session.prefill(ids[:, :7], all_logits=True)]
    found.append(session.prefill(ids[:, 7:18], all_logits=True))
    found += [session.decode(ids[:, t])[:, None] for t in range(18, ids.shape[1])]
    assert_close(torch.cat(found, 1), expected)


def check(program, folder, name):
    ids = token_ids(program, 1, TOKENS)
    expected = defined_logits(program, ids[0])[None]
    assert_steps(open_form(program, folder, name), ids, expected)


def cases(names, quick):
    """Return every form with every name; those that are not `quick` are slow tests."""
    return [
        pytest.param(form, name, marks=() if (form, name) in quick else pytest.mark.slow)
        for form in FORMS
        for name in names
    ]


PLANS = {
    "exact": (None, False),
    "int4": (INT4, False),
    "int4, folded": (INT4, True),
    "kivi": (KIVI, False),
    "kivi, folded": (KIVI, True),
}
QUICK_PLANS = [("L0", "exact"), ("L0", "kivi"), ("opset 24", "exact"), ("opset 24", "int4, folded")]


@pytest.mark.parametrize(("form", "name"), cases(PLANS, QUICK_PLANS))
def test_steps_are_as_defined(form, name, tmp_path):
    options, folded = PLANS[name]
    check(toy(options, folded=folded), tmp_path, form)


@pytest.mark.parametrize(
    "options", [INT4, pytest.param(None, marks=pytest.mark.slow)], ids=["int4", "exact"]
)
@pytest.mark.parametrize("side", ["left", pytest.param("right", marks=pytest.mark.slow)])
def test_rows_of_different_lengths_share_buffers(options, side, tmp_path):
    program = toy(options)
    ids, counts = token_ids(program, 3, TOKENS), (14, 6, 1)
    prompts = torch.zeros(3, 14, dtype=torch.int64)
    mask = torch.zeros_like(prompts)
    for row, count in enumerate(counts):
        mask[row, slice(14 - count, 14) if side == "left" else slice(count)] = 1
        prompts[row, mask[row].bool()] = ids[row, :count]
    expected = [defined_logits(program, row) for row in ids]
    session = open_form(program, tmp_path, "opset 24")
    every = session.prefill(prompts, mask, all_logits=True)
    for row, count in enumerate(counts):
        assert_close(every[row][mask[row].bool()], expected[row][:count])
    for step in range(6):
        logits = session.decode(torch.stack([ids[r, n + step] for r, n in enumerate(counts)]))
        for row, count in enumerate(counts):
            assert_close(logits[row], expected[row][count + step])
    more = torch.stack([ids[r, n + 6 : n + 9] for r, n in enumerate(counts)])
    logits = session.prefill(more)
    for row, count in enumerate(counts):
        assert_close(logits[row], expected[row][count + 8])


ATTENTION = {
    "window": {"window": 6},
    "chunk": {"chunk": 6},
    "softcap": {"softcap": 0.5},
    "both": {"window": 6, "softcap": 0.5},
}


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("opset 24", "window"),
        *(
            pytest.param(f, n, marks=pytest.mark.slow)
            for f in ("L0", "opset 24")
            for n in ATTENTION
        ),
    ],
)
@pytest.mark.parametrize(
    "options", [None, pytest.param(INT4, marks=pytest.mark.slow)], ids=["exact", "int4"]
)
def test_options_of_attention(form, name, options, tmp_path):
    program = toy(options, attention=ATTENTION[name])
    ids = token_ids(program, 1, TOKENS)
    change = defined_logits(program, ids[0]) - defined_logits(toy(options), ids[0])
    assert change.abs().max() > 5 * TOLERANCE
    check(program, tmp_path, form)


def give_heads(program, option):
    """Give every attention an option with one value a head."""
    values = torch.tensor([1.5, 0.75, 0.3, 0.1])
    for node in program.calls(kvx.CACHED_ATTENTION):
        with program.graph.inserting_before(node):
            weight = program.graph.create_node("get_attr", option)
        weight.meta = {**node.meta, "type": TensorType(values.dtype, (4,))}
        node.kwargs = {**node.kwargs, option: weight}
    program.weights[option] = values
    return program


@pytest.mark.slow
@pytest.mark.parametrize("form", ["L0", "opset 24"])
@pytest.mark.parametrize("option", ["sink_logits", "alibi_slopes"])
def test_options_with_a_value_a_head(form, option, tmp_path):
    check(give_heads(toy(), option), tmp_path, form)


MODELS = {
    "half of the channels turn": lambda: toy(rotary_dim=8),
    "neighbours turn": lambda: toy(interleaved=True),
    "some neighbours turn": lambda: toy(interleaved=True, rotary_dim=8),
    "gains with an offset": lambda: toy(weight_offset=1.0),
    "keys before RoPE": lambda: apply(CachePrerope(), toy())[0],
    "one cache for all layers": lambda: toy(shared=True),
    "learned positions": lambda: apply(InsertCache(), gpt2_program(dtype=torch.float32))[0],
    "latent": lambda: apply(
        InsertCache(), apply(CacheLatent(), latent_program(dtype=torch.float32))[0]
    )[0],
}


QUICK_MODELS = [("L0", "some neighbours turn"), ("opset 24", "keys before RoPE")]


@pytest.mark.parametrize(("form", "name"), cases(MODELS, QUICK_MODELS))
def test_models_are_as_in_eager(form, name, tmp_path):
    program = MODELS[name]()
    ids = token_ids(program, 2, TOKENS)
    expected = OptimizedModel(program)(ids)
    scale = float(expected.abs().max())
    session = open_form(program, tmp_path, form)
    found = [session.prefill(ids[:, :9], all_logits=True)]
    found.append(session.prefill(ids[:, 9:20], all_logits=True))
    found += [session.decode(ids[:, t])[:, None] for t in range(20, TOKENS)]
    assert_close(torch.cat(found, 1) / scale, expected / scale, 1e-4)
