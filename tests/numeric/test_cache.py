"""Every schedule must give what the definition of the cache gives, for every kind of plan."""

import dataclasses

import pytest
import torch
from cached import cached_program, defined_cache, defined_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import llama_program, run, token_ids

from kvxform.errors import CodegenError
from kvxform.runtime.model import OptimizedModel

TOKENS = 40
EXACT_TOLERANCE, CODED_TOLERANCE = 1e-12, 1e-9


def both(**codec):
    return {"key": {"codec": "int", **codec}, "value": {"codec": "int", **codec}}


def kivi(bits, recent):
    return {
        "key": {"codec": "int", "bits": bits, "axis": "channel", "group": 16, "zero": "float"},
        "value": {"codec": "int", "bits": bits, "zero": "float"},
        "key_regions": {"recent": recent, "flush": "block"},
        "value_regions": {"recent": recent, "flush": "sliding"},
    }


def saliency(score, **options):
    """Keys and values in chunks of eight, three tokens at 8 bits and five at 2."""
    shared = {"codec": "saliency", "chunk": 8, "share": 0.375, "score": score, **options}
    low = {"codec": "int", "bits": 2, "axis": "channel", "group": 5, "zero": "float"}
    return {
        "key": {**shared, "high": {"codec": "int", "bits": 8}, "low": low},
        "value": {**shared, "high": {"codec": "int", "bits": 8}, "separable": True},
    }


WINDOWS = {"sink": 4, "recent": 16}
PLANS = {
    "exact": None,
    "exact-regions": {"key": {"codec": "none", "dtype": "float64"}, "regions": WINDOWS},
    "int8": both(bits=8),
    "int4": both(bits=4),
    "int3-symmetric": both(bits=3, symmetric=True),
    "int2-groups": both(bits=2, group=8),
    "int4-keys-only": {"key": {"codec": "int", "bits": 4}},
    "int4-sink": both(bits=4) | {"regions": {"sink": 4}},
    "int4-recent": both(bits=4) | {"regions": {"recent": 5}},
    "int4-windows": both(bits=4) | {"regions": WINDOWS},
    "int4-block": both(bits=4) | {"regions": {"sink": 3, "recent": 8, "flush": "block"}},
    "channel": both(bits=4, axis="channel", group=16),
    "channel-sliding": both(bits=4, axis="channel", group=8)
    | {"regions": {"sink": 2, "recent": 5, "flush": "sliding"}},
    "kivi2": kivi(2, 16),
    "kivi4": kivi(4, 32) | {"regions": {"sink": 5}},
    "saliency-mean": saliency("mean", last=0.1, random=0.3) | {"regions": {"sink": 3}},
    "saliency-sum": saliency("sum", last=1.0, random=0.0)
    | {"regions": {"recent": 5, "flush": "sliding"}},
}


def tolerance(name):
    return EXACT_TOLERANCE if name == "exact" else CODED_TOLERANCE


FOLDED = {"int4", "int2-groups", "int4-windows", "channel", "kivi2"}
CASES = [*PLANS, *(f"{name}, folded" for name in sorted(FOLDED))]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """Name of the plan, program, tokens, and the logits and K and V of each layer by definition."""
    plan, _, form = request.param.partition(", ")
    program = cached_program(PLANS[plan], folded=form == "folded")
    tokens = token_ids(program, 1, TOKENS)[0]
    stored = [defined_cache(program, tokens, layer) for layer in (0, 1)]
    return request.param, program, tokens, defined_logits(program, tokens), stored


def feed(session, tokens, pieces):
    """Feed one row in pieces and return all its logits; pieces of one token are decoded."""
    parts, first = [], 0
    for n in pieces:
        if n == 1 and first:
            parts.append(session.decode(tokens[first : first + 1]))
        else:
            parts.append(session.prefill(tokens[None, first : first + n], all_logits=True)[0])
        first += n
    return torch.cat(parts)


SCHEDULES = {
    "at once": [TOKENS],
    "in sevens": [7] * (TOKENS // 7) + [TOKENS % 7],
    "one by one": [1] * TOKENS,
    "around a page": [15, 1, 1, 15, TOKENS - 32],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_gives_the_defined_logits_cache_and_bytes(case, schedule):
    name, program, tokens, expected, stored = case
    session = OptimizedModel(program).new_session(1, TOKENS)
    found = feed(session, tokens, SCHEDULES[schedule])
    assert (found - expected).abs().max() < tolerance(name)
    for layer, (k, v) in enumerate(stored):
        logical = session.logical_cache(layer)
        assert (logical.k[0] - k).abs().max() < tolerance(name)
        assert (logical.v[0] - v).abs().max() < tolerance(name)
    assert session.cache_bytes() == program.plan.bytes_at([TOKENS], TOKENS)


def test_stateless_call_gives_the_defined_logits(case):
    name, program, tokens, expected, _ = case
    assert (OptimizedModel(program)(tokens[None])[0] - expected).abs().max() < tolerance(name)


def test_coding_has_an_effect(case):
    name, _, tokens, expected, _ = case
    error = (run(llama_program(), tokens[None])[0] - expected).abs().max()
    assert error < 1e-12 if name == "exact" else error > 1e-6


@st.composite
def ragged_batches(draw):
    counts = draw(st.lists(st.integers(1, 26), min_size=1, max_size=3))
    more = [draw(st.integers(1, TOKENS - 12 - n)) for n in counts]
    chunks = draw(st.tuples(*[st.none() | st.integers(1, 20)] * 2))
    return counts, more, chunks, draw(st.booleans()), draw(st.integers(0, 8))


@given(ragged_batches())
@settings(deadline=None, max_examples=4)
def test_ragged_batch_gives_each_row_what_it_gets_alone(case, drawn):
    name, program, tokens, expected, _ = case
    counts, more, chunks, left, steps = drawn
    session = OptimizedModel(program).new_session(len(counts), TOKENS)
    starts = [0] * len(counts)
    for lengths, chunk in zip((counts, more), chunks, strict=True):
        ids, mask = padded([tokens[a : a + n] for a, n in zip(starts, lengths, strict=True)], left)
        logits = session.prefill(ids, mask, chunk_size=chunk)
        starts = [a + n for a, n in zip(starts, lengths, strict=True)]
        assert (logits - rows_before(expected, starts)).abs().max() < tolerance(name)
    for _ in range(steps):
        logits = session.decode(torch.stack([tokens[a] for a in starts]))
        starts = [a + 1 for a in starts]
        assert (logits - rows_before(expected, starts)).abs().max() < tolerance(name)
    assert session.sequence_lengths() == tuple(starts)
    assert session.cache_bytes() == program.plan.bytes_at(starts, TOKENS)


def padded(rows, left):
    width = max(len(row) for row in rows) + 2  # padding on the longest row, too
    ids = torch.full((len(rows), width), 7)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        part = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, part], mask[i, part] = row, 1
    return ids, mask


def rows_before(expected, lengths):
    return torch.stack([expected[n - 1] for n in lengths])


@pytest.mark.parametrize("page_size", [None, 16, 32, 64])
@pytest.mark.parametrize("name", ["exact", "int4", "int4-windows", "kivi2"])
def test_page_size_changes_nothing(name, page_size):
    program = cached_program(PLANS[name], page_size)
    tokens = token_ids(program, 1, 70)[0]
    expected = defined_logits(program, tokens)
    session = OptimizedModel(program).new_session(2, 70)
    session.prefill(tokens[None, :1].repeat(2, 1))
    for first, n in ((1, 14), (15, 1), (16, 1), (17, 47), (64, 1)):  # to page - 1, page, page + 1
        logits = session.prefill(tokens[None, first : first + n].repeat(2, 1))
        assert (logits - expected[first + n - 1]).abs().max() < tolerance(name)
        assert session.cache_bytes() == program.plan.bytes_at([first + n] * 2, 70)


@pytest.mark.parametrize("name", ["exact", "int4", "int4-windows", "kivi2"])
def test_sixty_four_decode_steps_over_a_reused_page_pool(name):
    program = cached_program(PLANS[name])
    tokens = token_ids(program, 2, 100)
    session = OptimizedModel(program).new_session(3, 100, num_pages=14)
    session.prefill(tokens[:, :30].repeat(2, 1)[:3])
    session.free([0, 2])  # leaves holes before and after row 1
    session.prefill(tokens[:1, :33], rows=[2])
    expected = [defined_logits(program, row) for row in tokens]
    lengths = {1: 30, 2: 33}
    source = {1: 1, 2: 0}
    for _ in range(64):
        ids = torch.stack([tokens[source[row], lengths[row]] for row in (1, 2)])
        logits = session.decode(ids)
        for i, row in enumerate((1, 2)):
            wanted = expected[source[row]][lengths[row]]
            assert (logits[i] - wanted).abs().max() < tolerance(name)
            lengths[row] += 1
    assert session.sequence_lengths() == (94, 97)


@pytest.mark.parametrize("name", ["exact", "int4-windows", "kivi2"])
def test_values_of_a_freed_row_never_reach_its_successor(name):
    program = cached_program(PLANS[name])
    tokens = token_ids(program, 2, 40)
    poisoned = dataclasses.replace(program, weights=dict(program.weights))
    for stream in "kv":  # NaN times a weight of zero would still be NaN
        matrix = f"layers.0.attn.{stream}.weight"
        poisoned.weights[matrix] = torch.full_like(program.weights[matrix], float("nan"))
    clean, dirty = OptimizedModel(program), OptimizedModel(poisoned)
    session = clean.new_session(2, 40)
    session._executable = dirty._executable
    assert session.prefill(tokens).isnan().all()
    session.free()
    session._executable = clean._executable
    expected = ragged_steps(clean.new_session(2, 40), tokens)
    assert torch.equal(ragged_steps(session, tokens), expected)
    assert expected.isfinite().all()


def ragged_steps(session, tokens):
    mask = torch.ones_like(tokens)
    mask[1, 2:] = 0  # the short row reads as many columns as the long one
    logits = [session.prefill(tokens[:, :31], mask[:, :31])]
    logits += [session.decode(tokens[:, t]) for t in (31, 32, 33)]
    return torch.stack(logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["exact", "int8", "kivi4"])
def test_narrow_dtypes_follow_the_wide_result(name, dtype):
    wide, narrow = cached_program(PLANS[name]), cached_program(PLANS[name], dtype=dtype)
    tokens = token_ids(wide, 1, TOKENS)[0]
    expected = defined_logits(wide, tokens)
    session = OptimizedModel(narrow).new_session(1, TOKENS)
    found = feed(session, tokens, SCHEDULES["around a page"])
    assert found.dtype == dtype
    bound = 8 * torch.finfo(dtype).eps if name == "exact" else 0.1  # a code may fall either way
    assert (found - expected).abs().max() < bound * expected.abs().max()


PER_HEAD = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("name", ["exact", "int4-windows"])
@pytest.mark.parametrize(
    "attention",
    [
        {"window": 6},
        {"softcap": 2.0},
        {"window": 9, "softcap": 3.0},
        {"chunk": 7},
        {"chunk": 9, "window": 5},
        {"sink_logits": PER_HEAD},
        {"alibi_slopes": PER_HEAD},
        {"alibi_slopes": PER_HEAD, "softcap": 2.0, "chunk": 8},
    ],
    ids=lambda options: "+".join(options),
)
def test_what_shapes_the_scores(name, attention):
    program = cached_program(PLANS[name], attention=attention)
    tokens = token_ids(program, 1, 30)[0]
    expected = defined_logits(program, tokens)
    for pieces in ([30], [11, 19], [12, *[1] * 18]):
        session = OptimizedModel(program).new_session(1, 30)
        assert (feed(session, tokens, pieces) - expected).abs().max() < tolerance(name)


def test_layers_that_share_a_cache_read_that_of_the_owner():
    program = cached_program(PLANS["int4-windows"])
    append = program.append_node(1)
    append.replace_all_uses_with(program.append_node(0))
    program.graph.erase_node(append)
    program.plan = program.plan.replace_site(1, owner=0)
    tokens = token_ids(program, 1, 30)[0]
    expected = defined_logits(program, tokens)
    for pieces in ([30], [10, 20], [1] * 30):
        session = OptimizedModel(program).new_session(1, 30)
        assert (feed(session, tokens, pieces) - expected).abs().max() < CODED_TOLERANCE
        k = session.logical_cache(1).k[0]
        assert torch.equal(k, session.logical_cache(0).k[0])
        assert session.cache_bytes() == program.plan.bytes_at([30], 30)


def test_long_prompt_goes_through_in_runs_of_queries(monkeypatch):
    program = cached_program(PLANS["kivi2"])
    tokens = token_ids(program, 2, 40)
    model = OptimizedModel(program)
    expected = model(tokens)
    monkeypatch.setattr("kvxform.codegen.eager.attend.SCORE_ELEMENTS", 1000)
    assert (model(tokens) - expected).abs().max() < EXACT_TOLERANCE


def test_groups_that_would_cross_a_page_are_refused():
    program = cached_program(PLANS["kivi2"])
    layout = dataclasses.replace(program.plan.layout, page_size=24)
    program.plan = dataclasses.replace(program.plan, layout=layout)
    with pytest.raises(CodegenError, match=r"KVX401 \[eager\] a page must hold whole groups of 16"):
        OptimizedModel(program)
