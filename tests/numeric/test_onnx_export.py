"""Exported packages, step by step, against the definition of the cache."""

from __future__ import annotations

import onnx
import pytest
import torch
from cached import cached_program, defined_cache, defined_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_tools import open_export
from programs import apply, gpt2_program, token_ids

import kvxform.ir.ops as kvx
from kvxform.codecs.base import make_codec
from kvxform.ir.types import TensorType
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.quantize.quantize_kv import QuantizeKv
from kvxform.passes.rotation.rotate_qk import RotateQk

TOKENS = 40
TOLERANCE = 1e-3  # where two ways of rounding meet, a code may flip; logits are about 2


def both(**codec):
    return {"key": {"codec": "int", **codec}, "value": {"codec": "int", **codec}}


KIVI = {
    "key": {"codec": "int", "bits": 2, "axis": "channel", "group": 8, "zero": "float"},
    "value": {"codec": "int", "bits": 2, "group": 8, "zero": "float"},
    "key_regions": {"recent": 16, "flush": "block"},
    "value_regions": {"recent": 16, "flush": "sliding"},
}
PLANS = {
    "exact": None,
    "exact-regions": {
        "key": {"codec": "none", "dtype": "float32"},
        "regions": {"sink": 3, "recent": 5},
    },
    "int8-symmetric": both(bits=8, symmetric=True),
    "int4": both(bits=4),
    "int4-keys-only": {"key": {"codec": "int", "bits": 4}},
    "int4-groups": both(bits=4, group=8),
    "int3": both(bits=3, zero="float"),
    "int4-sink": both(bits=4) | {"regions": {"sink": 4}},
    "int4-recent": both(bits=4) | {"regions": {"recent": 5}},
    "int4-block": both(bits=4) | {"regions": {"sink": 3, "recent": 8, "flush": "block"}},
    "channel": both(bits=4, axis="channel", group=8),
    "kivi2": KIVI,
    "kivi2-sink": KIVI | {"regions": {"sink": 5}},
}
FOLDED = ("int8-symmetric", "int4", "int4-groups", "int4-sink", "kivi2-sink")
CASES = [*PLANS, *(f"{name}, folded" for name in FOLDED)]


def program_of(case, **model):
    name, _, folded = case.partition(", ")
    return cached_program(PLANS[name], None, folded=bool(folded), dtype=torch.float32, **model)


def assert_close(found, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def assert_steps(session, ids, expected):
    """Assert that a prompt in one piece, in chunks and by tokens gives the expected logits."""
    assert_close(session.prefill(ids, all_logits=True), expected)
    session.reset()
    start = 0
    for count in (7, 1, 12):
        chunk = ids[:, start : start + count]
        start += count
        assert_close(session.prefill(chunk), expected[:, start - 1])
    for t in range(start, ids.shape[1]):
        assert_close(session.decode(ids[:, t]), expected[:, t])
    assert session.sequence_lengths() == (ids.shape[1],) * len(ids)


@pytest.mark.parametrize("case", CASES)
def test_every_plan_is_as_defined(case, tmp_path):
    program = program_of(case)
    ids = token_ids(program, 2, TOKENS)
    expected = torch.stack([defined_logits(program, row) for row in ids])
    session = open_export(program, tmp_path / "out")
    assert_steps(session, ids, expected)
    onnx.checker.check_model(str(tmp_path / "out" / "model.onnx"), full_check=True)
    model = onnx.load(str(tmp_path / "out" / "model.onnx"), load_external_data=False)
    onnx.shape_inference.infer_shapes(model, strict_mode=True)


@pytest.mark.parametrize("options", [None, both(bits=4), KIVI])
def test_a_gpt2_like_model_is_as_defined(options, tmp_path):
    program, _ = apply(InsertCache(), gpt2_program(dtype=torch.float32))
    if options:
        program, _ = apply(QuantizeKv(**options), program)
    ids = token_ids(program, 2, TOKENS)
    expected = torch.stack([defined_logits(program, row) for row in ids])
    scale = float(expected.abs().max())
    session = open_export(program, tmp_path / "out")
    assert_close(session.prefill(ids, all_logits=True) / scale, expected / scale)


def test_a_lossy_plan_differs_from_the_exact_one():
    """Else the tests above would pass with a cache that encodes nothing."""
    ids = token_ids(program_of("exact"), 1, TOKENS)[0]
    exact = defined_logits(program_of("exact"), ids)
    for name in PLANS:
        if name.startswith(("int", "kivi", "channel")):
            lossy = defined_logits(program_of(name), ids)
            assert (lossy - exact).abs().max() > 2 * TOLERANCE, name


@pytest.mark.parametrize("case", ["exact", "int4", "int4, folded", "int4-recent"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_as_if_alone(case, side, tmp_path):
    program = program_of(case)
    ids = token_ids(program, 3, TOKENS)
    counts = (20, 9, 1)
    mask = torch.zeros(3, 20, dtype=torch.int64)
    for row, count in enumerate(counts):
        mask[row, slice(20 - count, 20) if side == "left" else slice(count)] = 1
    prompts = torch.zeros(3, 20, dtype=torch.int64)
    prompts[mask.bool()] = torch.cat([ids[r, :n] for r, n in enumerate(counts)])
    session = open_export(program, tmp_path / "out")
    expected = [defined_logits(program, row) for row in ids]

    every = session.prefill(prompts, mask, all_logits=True)
    for row, count in enumerate(counts):
        assert_close(every[row][mask[row].bool()], expected[row][:count])
        assert not every[row][~mask[row].bool()].any()
    session.reset()
    session.prefill(prompts, mask)
    for step in range(12):
        tokens = torch.stack([ids[r, n + step] for r, n in enumerate(counts)])
        logits = session.decode(tokens)
        for row, count in enumerate(counts):
            assert_close(logits[row], expected[row][count + step])
    assert session.sequence_lengths() == tuple(n + 12 for n in counts)


ATTENTION = {
    "window": {"window": 6},
    "chunk": {"chunk": 6},
    "softcap": {"softcap": 0.5},
    "both": {"window": 6, "softcap": 0.5},
}


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("case", ["exact", "int4, folded", "kivi2"])
def test_options_of_attention(name, case, tmp_path):
    program = program_of(case, attention=ATTENTION[name])
    ids = token_ids(program, 1, TOKENS)
    expected = defined_logits(program, ids[0])[None]
    plain = defined_logits(program_of(case), ids[0])[None]
    assert (expected - plain).abs().max() > 5 * TOLERANCE
    assert_steps(open_export(program, tmp_path / "out"), ids, expected)


def give_heads(program, option, values):
    """Give every attention an option with one value a head."""
    for node in program.calls(kvx.CACHED_ATTENTION):
        with program.graph.inserting_before(node):
            weight = program.graph.create_node("get_attr", option)
        weight.meta = {**node.meta, "type": TensorType(values.dtype, tuple(values.shape))}
        node.kwargs = {**node.kwargs, option: weight}
    program.weights[option] = values


@pytest.mark.parametrize("option", ["sink_logits", "alibi_slopes"])
@pytest.mark.parametrize("case", ["exact", "kivi2"])
def test_options_with_a_value_a_head(option, case, tmp_path):
    program = program_of(case)
    ids = token_ids(program, 1, TOKENS)
    plain = defined_logits(program, ids[0])[None]
    give_heads(program, option, torch.tensor([1.5, 0.75, 0.3, 0.1]))
    expected = defined_logits(program, ids[0])[None]
    assert (expected - plain).abs().max() > 5 * TOLERANCE
    assert_steps(open_export(program, tmp_path / "out"), ids, expected)


@pytest.mark.parametrize("attention", [{"chunk": 6}, {"window": 6}, {}])
def test_padded_rows_with_options_by_position_are_as_if_alone(attention, tmp_path):
    program = program_of("exact", attention=attention)
    if not attention:
        give_heads(program, "alibi_slopes", torch.tensor([1.5, 0.75, 0.3, 0.1]))
    ids = token_ids(program, 2, TOKENS)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, :11] = 0
    prompts = torch.zeros(2, 20, dtype=torch.int64)
    prompts[mask.bool()] = torch.cat([ids[0, :20], ids[1, :9]])
    expected = [defined_logits(program, row) for row in ids]
    session = open_export(program, tmp_path / "out")
    session.prefill(prompts, mask)
    for step in range(8):
        logits = session.decode(torch.stack([ids[0, 20 + step], ids[1, 9 + step]]))
        assert_close(logits[0], expected[0][20 + step])
        assert_close(logits[1], expected[1][9 + step])


@pytest.mark.parametrize("case", ["exact", "int4, folded"])
def test_layers_that_share_a_cache(case, tmp_path):
    program = program_of(case)
    first, second = (program.append_node(layer) for layer in (0, 1))
    second.replace_all_uses_with(first)
    program.graph.erase_node(second)
    program.plan = program.plan.replace_site(1, owner=0)
    ids = token_ids(program, 1, TOKENS)
    expected = defined_logits(program, ids[0])[None]
    session = open_export(program, tmp_path / "out")
    assert_steps(session, ids, expected)
    assert all(".0." in name for name in session.cache_planes())


@pytest.mark.parametrize("seed", [None, 3])
def test_rotated_keys(seed, tmp_path):
    program = program_of("exact")
    rotated, found = apply(RotateQk(block=8, seed=seed), program)
    quantised, _ = apply(QuantizeKv(**both(bits=4)), rotated)
    assert len(found) == 2
    for step in (rotated, quantised):
        ids = token_ids(step, 1, TOKENS)
        expected = defined_logits(step, ids[0])[None]
        assert_steps(open_export(step, tmp_path / "out"), ids, expected)
    exact = defined_logits(program, ids[0])
    assert_close(defined_logits(rotated, ids[0]), exact, 1e-5)


def test_half_precision(tmp_path):
    program = cached_program(both(bits=8), None, dtype=torch.float16)
    ids = token_ids(program, 1, 24)
    expected = defined_logits(program, ids[0])[None]
    session = open_export(program, tmp_path / "out")
    found = session.prefill(ids, all_logits=True)
    assert found.dtype == torch.float16
    assert_close(found.float(), expected.float(), 2e-2)  # ten times the rounding of a logit of 2


@pytest.mark.parametrize("case", ["int4", "kivi2", "int4-block"])
def test_the_planes_hold_what_the_definition_says(case, tmp_path):
    program = program_of(case)
    ids = token_ids(program, 1, TOKENS)
    session = open_export(program, tmp_path / "out")
    session.prefill(ids[:, :33])
    for t in range(33, TOKENS):
        session.decode(ids[:, t])
    planes = session.cache_planes()
    for stream, expected in zip(
        ("key", "value"), defined_cache(program, ids[0], layer=0), strict=True
    ):
        plan = program.plan.site(0).streams[stream]
        stored = {p.name: planes[f"past_key_values.0.{stream}_{p.name}"] for p in plan.planes}
        body = make_codec(plan.codec).decode(stored, torch.float32)
        assert body.shape[2] == plan.body_tokens(TOKENS)
        ends = [planes.get(f"past_key_values.0.{stream}_{end}") for end in ("sink", "recent")]
        parts = [ends[0], body, ends[1]]
        whole = torch.cat([x.float() for x in parts if x is not None], 2)
        assert_close(whole[0], expected, 1e-5)


REGIONS = st.builds(
    lambda sink, recent, flush: {"sink": sink, "recent": recent, "flush": flush},
    st.integers(0, 5),
    st.sampled_from([0, 4, 8, 12]),
    st.sampled_from(["sliding", "block"]),
)


@settings(max_examples=8, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    axis=st.sampled_from(["token", "channel"]),
    key=REGIONS,
    value=REGIONS,
    heads=st.sampled_from([(2, 2), (4, 1)]),
    cuts=st.lists(st.integers(1, 12), min_size=1, max_size=3),
)
def test_any_plan_and_any_chunks(tmp_path_factory, bits, axis, key, value, heads, cuts):
    codec = {"codec": "int", "bits": bits, "zero": "float"}
    options = {
        "key": {**codec, "axis": axis, "group": 4},
        "value": codec,
        "key_regions": key,
        "value_regions": value,
    }
    program = cached_program(
        options, None, dtype=torch.float32, layers=1, heads=heads[0], kv_heads=heads[1]
    )
    ids = token_ids(program, 1, TOKENS)
    expected = defined_logits(program, ids[0])
    session = open_export(program, tmp_path_factory.mktemp("any") / "out")
    start = 0
    for count in [*cuts, TOKENS - sum(cuts)]:
        logits = session.prefill(ids[:, start : start + count], all_logits=True)
        assert_close(logits[0], expected[start : start + count])
        start += count


def test_the_page_layout_does_not_matter(tmp_path):
    for name, page_size in (("a", None), ("b", 16)):
        program = cached_program(both(bits=4), page_size, dtype=torch.float32)
        open_export(program, tmp_path / name)
    one, other = ((tmp_path / name / "model.onnx").read_bytes() for name in "ab")
    assert one == other


def test_sixty_four_steps_of_decode(tmp_path):
    program = program_of("int4, folded")
    ids = token_ids(program, 1, 66)
    expected = defined_logits(program, ids[0])
    session = open_export(program, tmp_path / "out")
    session.prefill(ids[:, :2])
    for t in range(2, 66):
        assert_close(session.decode(ids[:, t])[0], expected[t])
