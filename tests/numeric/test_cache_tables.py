"""Codecs with tables and shared norms in a live cache: every schedule gives what is defined."""

import pytest
import torch
from cached import cached_program, defined_cache, defined_logits
from programs import llama_program, run, token_ids

from kvxform.codegen.eager.site import SiteStore
from kvxform.runtime.model import OptimizedModel

TOKENS, HEAD_DIM = 36, 16
TOLERANCE = 1e-9
INT2 = {"codec": "int", "bits": 2, "axis": "channel", "group": 8}
NORMED = {"codec": "token-norm", "inner": INT2}


def both(codec, **options):
    return {"key": codec, "value": codec, **options}


PLANS = {
    "lloyd-max": both({"codec": "lloyd-max", "levels": 5, "gain": "corrected"}),
    "lloyd-max-qjl": both({"codec": "lloyd-max", "levels": 4, "qjl": True}),
    "fib-vq": both({"codec": "fib-vq", "words": 16, "k": 2}, regions={"sink": 2, "recent": 3}),
    "octahedral": both({"codec": "octahedral"}),
    "polar": both({"codec": "polar"}),
    "fp8": both({"codec": "fp8"}),
    "normed-pages": both({"codec": "token-norm", "inner": {"codec": "int", "bits": 4}}),
    "oscar": {
        "key": NORMED,
        "value": {"codec": "int", "bits": 2, "group": 8},
        "regions": {"sink": 1, "recent": 16, "flush": "block"},
    },
    "oscar-twice": both(NORMED),
    "oscar-heads": both(NORMED | {"over": "head"}),
}
SCHEDULES = {
    "at once": [TOKENS],
    "around a page": [15, 1, 1, 15, TOKENS - 32],
}


QUICK = {"lloyd-max", "oscar", "oscar-twice"}
CASES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PLANS]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    program = cached_program(PLANS[request.param], head_dim=HEAD_DIM)
    tokens = token_ids(program, 1, TOKENS)[0]
    stored = [defined_cache(program, tokens, layer) for layer in (0, 1)]
    return program, tokens, defined_logits(program, tokens), stored


def feed(session, tokens, pieces):
    """Feed one row in pieces and return all its logits; pieces of one token are decoded."""
    parts, first = [], 0
    for n in pieces:
        piece = tokens[first : first + n]
        one = n == 1 and first
        logits = session.decode(piece) if one else session.prefill(piece[None], all_logits=True)[0]
        parts.append(logits)
        first += n
    return torch.cat(parts)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_gives_the_defined_logits_cache_and_bytes(case, schedule):
    program, tokens, expected, stored = case
    session = OptimizedModel(program).new_session(1, TOKENS)
    found = feed(session, tokens, SCHEDULES[schedule])
    assert (found - expected).abs().max() < TOLERANCE
    for layer, (k, v) in enumerate(stored):
        logical = session.logical_cache(layer)
        assert (logical.k[0] - k).abs().max() < TOLERANCE
        assert (logical.v[0] - v).abs().max() < TOLERANCE
    assert session.cache_bytes() == program.plan.bytes_at([TOKENS], TOKENS)


def test_coding_has_an_effect(case):
    _, tokens, expected, _ = case
    exact = run(llama_program(head_dim=HEAD_DIM), tokens[None])[0]
    assert (exact - expected).abs().max() > 1e-6


def test_the_plan_counts_a_shared_norm_once():
    normed = cached_program(PLANS["oscar-twice"], head_dim=HEAD_DIM).plan
    bare = cached_program(both(INT2), head_dim=HEAD_DIM).plan
    sites = len(normed.owners)
    assert normed.bytes_per_token - bare.bytes_per_token == sites * 2 * 2  # K and V, float16
    assert normed.page_bytes(16) - bare.page_bytes(16) == sites * 2 * 2 * 16


@pytest.mark.parametrize(("name", "is_joint"), [("oscar-twice", False), ("oscar-heads", True)])
def test_k_and_v_share_a_store_only_if_heads_are_encoded_alone(name, is_joint):
    site = cached_program(PLANS[name], head_dim=HEAD_DIM).plan.owners[0]
    store = SiteStore(site, num_pages=2, page_size=16, num_rows=1, device=torch.device("cpu"))
    assert store.is_joint == is_joint
