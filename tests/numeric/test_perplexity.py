"""Perplexity and KL against Hugging Face's own loss and torch's own kl_div."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from kvxform.errors import KvxformError
from kvxform.evaluate.perplexity import evaluate
from kvxform.evaluate.runners import SourceRunner

VOCAB, WINDOW, WINDOWS = 97, 70, 2  # more positions than are scored at a time


def tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def models() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    return tiny_llama(0), tiny_llama(1)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (WINDOW * WINDOWS + 9,), generator=torch.manual_seed(3))


@pytest.mark.parametrize("protocol", ["quantized-prefill", "decode"])
def test_all_figures_equal_an_independent_computation(models, tokens, protocol):
    model, reference = models
    result = evaluate(
        SourceRunner(model),
        tokens,
        window=WINDOW,
        windows=WINDOWS,
        protocol=protocol,
        reference=SourceRunner(reference),
    )
    rows = tokens[: WINDOW * WINDOWS].view(WINDOWS, WINDOW)
    with torch.no_grad():  # labels: Hugging Face shifts and averages by itself
        nll = model(rows, labels=rows).loss
        reference_nll = reference(rows, labels=rows).loss
        ours, theirs = model(rows).logits[:, :-1], reference(rows).logits[:, :-1]
    kl = F.kl_div(
        ours.flatten(0, 1).log_softmax(-1),
        theirs.flatten(0, 1).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-5)
    assert result.reference_perplexity == pytest.approx(math.exp(reference_nll), rel=1e-5)
    assert result.kl == pytest.approx(float(kl), rel=1e-4)
    agreed = (ours.argmax(-1) == theirs.argmax(-1)).double().mean()
    assert result.top1_agreement == pytest.approx(float(agreed), abs=1e-12)
    assert result.scored_tokens == WINDOWS * (WINDOW - 1)
    assert result.protocol == protocol


def test_a_model_against_itself_has_no_divergence(models, tokens):
    runner = SourceRunner(models[0])
    result = evaluate(runner, tokens, window=20, windows=3, reference=runner)
    assert result.kl == pytest.approx(0.0, abs=1e-12)
    assert result.top1_agreement == 1.0
    assert result.perplexity == result.reference_perplexity


def test_without_a_reference_there_is_no_divergence_to_report(models, tokens):
    seen: list[int] = []
    result = evaluate(SourceRunner(models[0]), tokens, window=8, windows=3, progress=seen.append)
    assert (result.kl, result.reference_perplexity, result.top1_agreement) == (None, None, None)
    assert seen == [1, 2, 3]
    assert result.to_dict()["window"] == 8


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"windows": 1000}, "70000 tokens"),
        ({"window": 1}, "2 tokens or more"),
        ({"windows": 0}, "one or more windows"),
        ({"protocol": "prefill"}, "quantized-prefill, decode"),
    ],
)
def test_bad_arguments_are_refused_with_a_code(models, tokens, change, word):
    arguments = {"window": WINDOW, "windows": WINDOWS, **change}
    with pytest.raises(KvxformError, match=word) as caught:
        evaluate(SourceRunner(models[0]), tokens, **arguments)
    assert caught.value.code == "KVX704"
