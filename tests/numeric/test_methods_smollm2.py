"""What papers say of real models, on SmolLM2-135M: sinks, keys before values, eight bits."""

from __future__ import annotations

import pytest
import torch
from programs import apply

from kvxform.capture import capture, open_source
from kvxform.codecs.integer import IntCodec
from kvxform.evaluate.perplexity import evaluate
from kvxform.evaluate.runners import make_runner
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.pipeline import run_pipeline
from kvxform.recipe import load_recipe
from kvxform.runtime.model import OptimizedModel
from kvxform.sensitivity.measuring import Bench
from kvxform.texts import default_text, encode_text
from kvxform.tokenizer import load_tokenizer

pytestmark = [pytest.mark.model, pytest.mark.slow]


@pytest.fixture(scope="module")
def opened():
    """The model of the source, its program, and 512 tokens of the default text."""
    source = open_source("smollm2-135m")
    program = capture(source.model, name=source.info.name).program
    words = load_tokenizer(source.info.tokenizer_path)
    return source.model, program, encode_text(words, default_text())[:512]


def test_keys_need_more_bits_than_values_at_most_layers(opened):
    """KVTuner: attention is further off with K4V8 than with K8V4."""
    _, program, ids = opened
    cached, _ = apply(InsertCache(), program)
    bench = Bench(cached, ids[None, :256])
    keys_first = 0
    for site in cached.plan.sites:
        pairs = ((8, 4), (4, 8))
        k8v4, k4v8 = (
            {(site.layer, "key"): IntCodec(k), (site.layer, "value"): IntCodec(v)} for k, v in pairs
        )
        smaller, larger = (bench.attention_error(site.layer, pair) for pair in (k8v4, k4v8))
        keys_first += smaller < larger
    assert keys_first >= 25


def test_eight_bits_cost_no_perplexity(opened):
    """QuaRot: PPL(KV8) is that of the source."""
    model, program, ids = opened
    coded, _ = run_pipeline(program, load_recipe("int8"), executor=OptimizedModel, verify="none")
    found = [
        evaluate(make_runner(m, 256), ids, window=256, windows=2).perplexity
        for m in (model, OptimizedModel(coded))
    ]
    assert found[1] == pytest.approx(found[0], rel=2e-3)
    assert found[1] != found[0], "something was encoded"


def test_the_first_token_has_the_massive_activations(opened):
    """RotateKV keeps the tokens of the largest layer inputs exact: in its recipe the first four."""
    model, _, ids = opened
    inputs = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for layer in model.model.layers[12:]
    ]
    with torch.no_grad():
        model(ids[None])
    for hook in hooks:
        hook.remove()
    largest = torch.stack(inputs)[:, 0].abs().amax(-1)  # [layers, tokens]
    assert len(largest) == 18
    assert bool((largest.argmax(-1) == 0).all())
    assert float((largest[:, 0] / largest[:, 4:].amax(-1)).min()) > 10
    assert load_recipe("rotatekv2").passes[-2].options["regions"]["sink"] == 4
