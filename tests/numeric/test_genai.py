"""Packages in ONNX Runtime GenAI: it loads them and generates the tokens of our runner.

Needs `pip install onnxruntime-genai`; `make nightly` installs it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkpoints import EOS, PAD, write_llama
from models import tiny_hf

import kvxform
from kvxform.onnx_options import OnnxOptions
from kvxform.runtime.onnx_session import OnnxSession

genai = pytest.importorskip("onnxruntime_genai")
pytestmark = pytest.mark.slow

FORMS = {
    "L0": ("exact", OnnxOptions(level="L0")),
    "L1": ("onnx-fp16", OnnxOptions(level="L1", opset=23)),
    "L1-last": ("onnx-fp16", OnnxOptions(level="L1", opset=23, logits="last")),
    "L1-buffers": ("onnx-fp16", OnnxOptions(level="L1", opset=24)),
    "L1-buffers-last": ("onnx-fp16", OnnxOptions(level="L1", opset=24, logits="last")),
    "L2-int4": ("onnx-int4", OnnxOptions(level="L2")),
    "L3": ("onnx-fp16", OnnxOptions(level="L3")),
    "L3-last": ("onnx-fp16", OnnxOptions(level="L3", logits="last")),
    "L3-int8": ("onnx-int8", OnnxOptions(level="L3", logits="last")),
    "L3-int4": ("onnx-int4", OnnxOptions(level="L3", logits="last")),
    "L3-int8-int4-weights": ("onnx-int8", OnnxOptions(level="L3", logits="last", weights="int4")),
    "L5": ("onnx-fp16", OnnxOptions(level="L5")),
}

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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return a function that exports a two-layer Llama, each recipe optimised once."""
    source = write_llama(tmp_path_factory.mktemp("llama"), max_position_embeddings=1024)
    texts = torch.randint(0, 256, (8192,), generator=torch.Generator().manual_seed(1))
    models = {}

    def export(recipe, options):
        if recipe not in models:
            models[recipe] = kvxform.optimize(
                str(source), recipe, calibration=texts, verify="none", progress=False
            )
        folder = tmp_path_factory.mktemp("package") / "onnx"
        return models[recipe].export_onnx(folder, options, verify="none")

    return export


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


def ours(session, ids, new_tokens: int) -> list[list[int]]:
    """Return what our runner appends."""
    out = session.generate(ids, max_new_tokens=new_tokens, eos_token_id=())
    return out[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_with_one_plane_a_stream_runs(tiny, form):
    folder = tiny(*FORMS[form])
    session = OnnxSession(folder, threads=1)
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(3))
    short, long = ids[:1, :7], ids[1:]
    both = ids.clone()
    both[0, 7:] = PAD  # GenAI pads on the right
    assert EOS not in (expected := [*ours(session, short, 8), *ours(session, long, 8)])[0]
    assert generate(folder, long.tolist(), 8) == expected[1:]
    assert generate(folder, ids.tolist(), 8) == ours(session, ids, 8)
    assert generate(folder, both.tolist(), 8) == expected


@pytest.mark.parametrize("level", ["L1", "L3"])
def test_the_graph_itself_sees_to_windows(level, tmp_path):
    """The description has no `sliding_window`, by which GenAI would move the cache."""
    options = {"sliding_window": 8, "max_position_embeddings": 64}
    source = tiny_hf("mistral", **options)
    model = kvxform.optimize(source, "onnx-fp16", verify="none", progress=False)
    assert {site.window for site in model.program.sites} == {8}
    folder = model.export_onnx(tmp_path / "out", OnnxOptions(level=level), verify="none")
    ids = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(3))
    assert generate(folder, ids.tolist(), 16) == ours(OnnxSession(folder, threads=1), ids, 16)


def test_streams_of_several_planes_are_refused_by_genai(tiny):
    folder = tiny("kv4", OnnxOptions(level="L2"))
    with pytest.raises(RuntimeError, match="Missing Input: past_key_values"):
        generate(folder, [[1, 2, 3]], 2)


@pytest.mark.model
def test_genai_generates_the_tokens_of_our_runner(package):
    folder, session, tokenizer = package
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = session.generate(ids, max_new_tokens=NEW_TOKENS)[:, ids.shape[1] :]
        assert generate(folder, ids.tolist(), NEW_TOKENS) == expected.tolist(), prompt


@pytest.mark.model
def test_rows_of_one_length_are_generated_together(package):
    folder, session, tokenizer = package
    rows = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    ids = torch.tensor([row[: min(map(len, rows))] for row in rows])
    assert generate(folder, ids.tolist(), 8) == ours(session, ids, 8)


@pytest.mark.model
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
    expected = session.generate(torch.tensor([ids]), max_new_tokens=8)
    assert generator.get_sequence(0).tolist() == expected[0].tolist()


@pytest.mark.model
def test_the_tokenizer_in_the_package_is_that_of_the_source(package):
    folder, _, tokenizer = package
    theirs = genai.Tokenizer(genai.Model(str(folder)))
    for text in (*PROMPTS, "Ünïcödé, 你好 & <tags>\n\ttabs  and   blanks"):
        assert theirs.encode(text).tolist() == tokenizer(text).input_ids
        assert theirs.decode(theirs.encode(text)) == text
