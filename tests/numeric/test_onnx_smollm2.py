"""SmolLM2-135M as ONNX packages, against the eager lowering."""

from __future__ import annotations

import time

import pytest
import torch

import kvxform
from kvxform.runtime.onnx_session import OnnxSession

# The winner leads by 0.6 at every step. Where two tokens nearly tie, two ways of rounding may part.
PROMPTS = (
    "1, 2, 3, 4, 5, 6, 7, 8,",
    "10, 20, 30, 40, 50, 60,",
    "0 1 0 1 0 1 0 1 0 1",
    "Hello! Hello! Hello! Hello!",
    "Row, row, row your boat, row, row, row your boat, row, row, row your boat,",
)
NEW_TOKENS = 64


@pytest.fixture(scope="module", params=["exact", pytest.param("kv4", marks=pytest.mark.slow)])
def pair(request, tmp_path_factory):
    """The optimised model, its package as a session, and the seconds of the export."""
    model = kvxform.optimize("smollm2-135m", request.param, verify="none", progress=False)
    start = time.process_time()
    folder = model.export_onnx(tmp_path_factory.mktemp(request.param) / "onnx")
    return model, OnnxSession(folder), time.process_time() - start


@pytest.mark.model
def test_export_is_quick(pair):
    assert pair[2] < 20


@pytest.mark.model
@pytest.mark.parametrize("pair", ["exact"], indirect=True)
def test_logits_of_the_exact_cache_equal_eager(pair):
    model, session, _ = pair
    ids = model.tokenizer(
        "The cache of a language model holds keys and values", return_tensors="pt"
    )
    ids = ids.input_ids
    torch.testing.assert_close(session.prefill(ids, all_logits=True), model(ids), rtol=0, atol=1e-3)


@pytest.mark.model
@pytest.mark.slow
def test_greedy_tokens_equal_eager(pair):
    model, session, _ = pair
    for prompt in PROMPTS:
        ids = model.tokenizer(prompt, return_tensors="pt").input_ids
        options = {"max_new_tokens": NEW_TOKENS, "eos_token_id": ()}
        found, expected = session.generate(ids, **options), model.generate(ids, **options)
        assert torch.equal(found, expected), prompt
