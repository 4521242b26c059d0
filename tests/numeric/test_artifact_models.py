"""Text and artifacts of captured Hugging Face models, not of graphs written by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from kvxform.capture import capture
from kvxform.ir.artifact import load_artifact, save_artifact
from kvxform.ir.parse import parse_graph
from kvxform.ir.program import Program, default_positions
from kvxform.ir.text import format_graph, format_program
from kvxform.ir.verify import verify_program


def llama() -> torch.nn.Module:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def gpt2() -> torch.nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=32)
    )


@pytest.fixture(scope="module", params=[llama, gpt2])
def program(request) -> Program:
    return capture(request.param().double().eval()).program


def logits(program: Program) -> torch.Tensor:
    ids = torch.arange(18).reshape(2, 9)
    return program.to_module()(ids, default_positions(ids))


def test_print_parse_print_is_the_identity_and_the_graph_runs(program):
    verify_program(program)
    text = format_graph(program.graph)
    parsed = program.clone()
    parsed.graph = parse_graph(format_program(program))
    assert format_graph(parsed.graph) == text
    assert torch.equal(logits(parsed), logits(program))


def test_a_loaded_artifact_is_the_captured_program(program, tmp_path):
    save_artifact(tmp_path / "out", program)
    loaded = load_artifact(tmp_path / "out")
    assert format_program(loaded) == format_program(program)
    assert torch.equal(logits(loaded), logits(program))


def test_nothing_of_this_machine_is_in_the_text(program, tmp_path):
    save_artifact(tmp_path / "out", program)
    for name in ("program.json", "plan.json"):
        text = (tmp_path / "out" / name).read_text()
        assert "/" not in text
        assert "cpu" not in text
        assert "0x" not in text
