"""Packages in ONNX Runtime GenAI: it loads them and generates the tokens of our runner.

Needs `pip install onnxruntime-genai` and SmolLM2-135M; `make nightly` installs both.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import kvxform
from kvxform.onnx_options import OnnxOptions
from kvxform.runtime.onnx_session import OnnxSession

genai = pytest.importorskip("onnxruntime_genai")
pytestmark = [pytest.mark.slow, pytest.mark.model]

# The winner leads clearly at every step. Where two tokens nearly tie, two runners may part.
PROMPTS = (
    "1, 2, 3, 4, 5, 6, 7, 8,",
    "0 1 0 1 0 1 0 1 0 1",
    "Row, row, row your boat, row, row, row your boat, row, row, row your boat,",
)
NEW_TOKENS = 48
PACKAGES = {
    "L1": ("onnx-fp16", OnnxOptions(level="L1", opset=23)),
    "L1-buffers": ("onnx-fp16", OnnxOptions(level="L1", opset=24)),
    "L3": ("onnx-fp16", OnnxOptions(level="L3", logits="last")),
    "L3-int8": ("onnx-int8", OnnxOptions(level="L3", logits="last")),
    "L3-int4": ("onnx-int4", OnnxOptions(level="L3", logits="last")),
}


@pytest.fixture(scope="module", params=PACKAGES)
def package(request, tmp_path_factory):
    """A package, our session of it, and the tokenizer of its source."""
    recipe, options = PACKAGES[request.param]
    model = kvxform.optimize("smollm2-135m", recipe, verify="none", progress=False)
    folder = tmp_path_factory.mktemp("genai") / request.param
    model.export_onnx(folder, options, verify="none")
    return folder, OnnxSession(folder, threads=1), model.tokenizer


def generate(folder, ids, new_tokens: int) -> list[list[int]]:
    """Return what GenAI appends to prompts `[B, S]`, greedily."""
    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    length = np.shape(ids)[1] + new_tokens
    params.set_search_options(max_length=length, do_sample=False, batch_size=len(ids))
    generator = genai.Generator(model, params)
    generator.append_tokens(np.array(ids, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    rows = [generator.get_sequence(row) for row in range(len(ids))]
    return [[int(token) for token in row[np.shape(ids)[1] :]] for row in rows]


def test_genai_generates_the_tokens_of_our_runner(package):
    folder, session, tokenizer = package
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        ours = session.generate(ids, max_new_tokens=NEW_TOKENS)[:, ids.shape[1] :]
        assert generate(folder, ids.tolist(), NEW_TOKENS) == ours.tolist(), prompt


def test_rows_of_one_length_are_generated_together(package):
    folder, session, tokenizer = package
    rows = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    ids = torch.tensor([row[: min(map(len, rows))] for row in rows])
    ours = session.generate(ids, max_new_tokens=8, eos_token_id=())[:, ids.shape[1] :]
    assert generate(folder, ids.tolist(), 8) == ours.tolist()


def test_a_prompt_may_come_in_pieces(package):
    folder, session, tokenizer = package
    ids = tokenizer(PROMPTS[0]).input_ids
    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + 8, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(np.array(ids[:5], np.int32))
    generator.append_tokens(np.array(ids[5:], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    ours = session.generate(torch.tensor([ids]), max_new_tokens=8)
    assert generator.get_sequence(0).tolist() == ours[0].tolist()


def test_the_tokenizer_in_the_package_is_that_of_the_source(package):
    folder, _, tokenizer = package
    theirs = genai.Tokenizer(genai.Model(str(folder)))
    for text in (*PROMPTS, "Ünïcödé, 你好 & <tags>\n\ttabs  and   blanks"):
        assert theirs.encode(text).tolist() == tokenizer(text).input_ids
        assert theirs.decode(theirs.encode(text)) == text
