"""`explain` on captured models: from Python, and on the command line with its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import write_llama
from models import plain, tiny_hf
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from kvxform.api import explain_model
from kvxform.cli.main import main


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(write_llama(tmp_path_factory.mktemp("explain") / "model"))


def with_odd_layer(**options: object) -> nn.Module:
    """Return three layers, the middle one written differently."""
    model, odd = plain("llama", layers=3), plain("llama", layers=3, **options)
    model.blocks[1]["attention"] = odd.blocks[1]["attention"]
    return model


@pytest.mark.parametrize(
    ("options", "proven", "reason", "node", "hint"),
    [
        ({"tile": True}, ["core", "mask"], "groups of neighbours", "repeat", "0 0 1 1"),
        ({"by_hand": True, "diagonal": 1}, ["core"], "neither causal", "bitwise_not", "causal"),
    ],
)
def test_a_layer_that_is_left_alone_says_how_far_it_got(options, proven, reason, node, hint):
    explanation = explain_model(with_odd_layer(**options), progress=False)
    assert [site.module for site in explanation.sites] == [
        "blocks.0.attention",
        "blocks.2.attention",
    ]
    (site,) = explanation.rejected
    assert site.module == "blocks.1.attention"
    assert [step.partition(":")[0] for step in site.matched] == proven
    assert reason in site.reason
    assert site.node.startswith(f"{node} (models.py:")
    assert hint in site.hint
    assert "rejected    blocks.1.attention" in explanation.to_text()


def test_a_layer_that_keeps_its_rotary_code_is_an_exception():
    explanation = explain_model(with_odd_layer(key_detune=1.01), progress=False)
    assert explanation.rejected == ()
    assert explanation.sites[1].notes[0].endswith("q and k turn with different frequencies")
    text = explanation.to_text()
    assert "layers 0, 2    blocks.(0, 2).attention\n" in text
    assert "layer 1    blocks.1.attention    as layers 0, 2, but:\n" in text


def test_norms_of_queries_and_keys():
    (site,) = explain_model(tiny_hf("qwen3"), layer=1, progress=False).sites
    assert [(n.role, n.place) for n in site.norms] == [
        ("input", ""),
        ("q", "per head, before RoPE"),
        ("k", "per head, before RoPE"),
    ]
    assert site.q.weight == "model.layers.1.self_attn.q_proj.weight"
    assert site.rope.theta == 10000.0


def test_command_prints_a_page(model, capsys):
    assert main(["explain", model]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "model (llama, float32): attention: 2 raised, 0 rejected"
    assert lines[2] == "layers 0-1    model.layers.0-1.self_attn"
    assert lines[4:8] == [
        "  heads      2 query, 1 KV (MQA), head_dim 64",
        "  scores     scale 0.125 = 1/sqrt(64), causal",
        "  rope       all 64 channels, half pairs, theta 10000",
        "  norm       RMSNorm, eps 1e-06, gain model.layers.*.input_layernorm.weight",
    ]


def test_the_second_time_needs_no_model(model, capsys, monkeypatch):
    assert main(["explain", model, "--json"]) == 0
    first = capsys.readouterr().out

    def no_capture(*args, **kwargs):
        raise AssertionError("the capture is cached")

    monkeypatch.setattr("kvxform.capture.capture", no_capture)
    assert main(["explain", model, "--json"]) == 0
    assert capsys.readouterr().out == first
    assert [site["rope"]["theta"] for site in json.loads(first)["sites"]] == [10000.0, 10000.0]


@pytest.mark.parametrize(
    ("words", "code", "state"),
    [
        (["--pass", "rotate-v"], 0, "applies"),
        (["--pass", "page-cache", "-r", "kv4"], 0, "applies"),
        (["--pass", "page-cache"], 1, "not tried"),
        (["--pass", "quantize-kv"], 1, "not tried"),
        (["--pass", "rotate-qk: {block: 128}"], 1, "refused"),
    ],
)
def test_exit_codes_of_passes(model, words, code, state, capsys):
    assert main(["explain", model, *words, "--json"]) == code
    (finding,) = json.loads(capsys.readouterr().out)["passes"]
    assert finding["state"] == state


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--pass", "rotate"], "KVX104"),
        (["-r", "kv44"], "KVX101"),
        (["-r", "exact", "--pass", "quantize-kv"], "KVX104"),
    ],
)
def test_bad_questions_are_refused_before_the_model_is_read(words, code, capsys):
    assert main(["explain", "/no/such/model", *words]) == 2
    assert capsys.readouterr().err.startswith(code)


def test_bad_models_and_layers_are_refused(model, tmp_path: Path, capsys):
    assert main(["explain", "/no/such/model"]) == 2
    assert main(["explain", str(tmp_path)]) == 2
    assert main(["explain", model, "--layer", "2"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [line[:6] for line in err.splitlines() if "KVX" in line] == [
        "KVX301",
        "KVX301",
        "KVX801",
    ]


class MirrorConfig(PretrainedConfig):
    model_type = "kvxform-mirror"


class MirrorModel(PreTrainedModel):
    """Every token sees every other, so that nothing can be cached."""

    config_class = MirrorConfig

    def __init__(self, config: MirrorConfig) -> None:
        super().__init__(config)
        self.embed, self.qkv, self.head = nn.Embedding(20, 8), nn.Linear(8, 24), nn.Linear(8, 20)
        self.post_init()

    def forward(self, input_ids, position_ids=None, **kwargs):
        x = self.embed(input_ids)
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]
        return CausalLMOutput(logits=self.head(x))


def test_a_model_without_attention_shows_all_candidates(tmp_path, capsys):
    AutoConfig.register("kvxform-mirror", MirrorConfig, exist_ok=True)
    AutoModelForCausalLM.register(MirrorConfig, MirrorModel, exist_ok=True)
    torch.manual_seed(0)
    MirrorModel(MirrorConfig()).save_pretrained(tmp_path)
    capsys.readouterr()
    assert main(["explain", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "attention: 0 raised, 1 rejected\nKVX303 " in out
    assert "  candidate  scaled_dot_product_attention (test_explain.py:" in out
    assert "  - mask     attention is bidirectional, so that its keys cannot be cached\n" in out
    assert "  to change  mask later tokens: is_causal=True, or a causal mask\n" in out
    assert main(["explain", str(tmp_path), "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["failure"].startswith("KVX303")
    assert len(data["rejected"]) == 1
