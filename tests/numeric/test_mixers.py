"""What mixes tokens outside raised attention is left alone and reported, module by module."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from models import VOCAB, PlainGPT, PlainLlama, randomise
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BambaConfig

from kvxform.capture import capture, mixers
from kvxform.ir.program import Program, default_positions
from kvxform.ir.text import format_program
from kvxform.pass_base import NoMatch
from kvxform.passes.base.insert_cache import InsertCache


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))


def captured(model: nn.Module, bound: float = 1e-12) -> Program:
    """Return the program of a float64 model after comparing it with the model."""
    program = capture(model).program
    ids = tokens(2, 29)  # four chunks
    with torch.no_grad():
        want = getattr(want := model(ids), "logits", want)
        got = program.to_module()(ids, default_positions(ids))
    assert float((got - want).abs().max()) <= bound
    return program


class Convolution(nn.Module):
    """A causal convolution over three tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)


class Hybrid(PlainLlama):
    """The first block has a convolution in the place of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[0]["attention"] = Convolution(48)


class TokenShift(PlainGPT):
    """Mixes in the token before, outside attention and outside any submodule."""

    def _attend(self, block: nn.ModuleDict, x: Tensor) -> Tensor:
        return super()._attend(block, x + F.pad(x, (0, 0, 1, 0))[:, :-1])


class OneBad(PlainLlama):
    """The second layer has no causal mask."""

    def __init__(self) -> None:
        super().__init__(by_hand=True)
        self.blocks[1]["attention"].mask.fill_(True)


class Longer(PlainLlama):
    """Logits depend on how many tokens there are, though tokens do not meet."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * tokens.shape[1]


def double(model: nn.Module) -> nn.Module:
    return randomise(model.double().eval())


def test_a_convolution_is_reported_and_attention_raised() -> None:
    program = captured(double(Hybrid()))
    (mixer,) = program.rejected
    assert (mixer.kind, mixer.module) == ("mixer", "blocks.0.attention.conv")
    assert mixer.reason == "conv1d outside attention mixes tokens"
    assert "test_mixers.py" in mixer.origin
    assert [s.module for s in program.sites] == ["blocks.1.attention"]
    assert "# mixer: blocks.0.attention.conv: conv1d outside" in format_program(program)


def test_insert_cache_names_the_mixer_that_blocks_it() -> None:
    program = captured(double(Hybrid()))
    found = InsertCache().match(program)
    assert all(isinstance(f, NoMatch) for f in found)
    want = "blocks.0.attention.conv keeps a state that is not cached: conv1d outside"
    assert any(f.reason.startswith(want) for f in found)


def test_mixing_outside_any_module_is_reported_once() -> None:
    program = captured(double(TokenShift()))
    (mixer,) = program.rejected
    assert (mixer.kind, mixer.module) == ("mixer", "")
    assert len(program.sites) == 2


def test_refused_attention_is_no_mixer() -> None:
    program = captured(double(OneBad()))
    (refused,) = program.rejected
    assert (refused.kind, refused.module) == ("attention", "blocks.1.attention")
    assert "bidirectional" in refused.reason
    assert [s.module for s in program.sites] == ["blocks.0.attention"]


def test_dependence_on_the_length_is_told_from_mixing() -> None:
    program = captured(double(Longer()))
    (mixer,) = program.rejected
    assert mixer.reason == "mul depends on the length or on positions that it counts itself"


def test_a_model_without_mixers_has_none() -> None:
    assert captured(double(PlainLlama())).rejected == ()


@pytest.mark.slow
def test_the_attention_of_a_state_space_hybrid_is_raised() -> None:
    config = BambaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        attn_layer_indices=[1],
        mamba_n_heads=12,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_d_state=8,
        mamba_chunk_size=8,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = double(AutoModelForCausalLM.from_config(config))
    with torch.no_grad():
        want = model(tokens(2, 29), use_cache=False).logits
    program = capture(model).program
    ids = tokens(2, 29)  # four chunks
    with torch.no_grad():
        got = program.to_module()(ids, default_positions(ids))
    assert float((got - want).abs().max()) <= 1e-10
    assert [(s.module, s.num_kv_heads) for s in program.sites] == [("model.layers.1.self_attn", 2)]
    assert [(r.kind, r.module) for r in program.rejected] == [("mixer", "model.layers.0.mamba")]


def test_rounding_is_measured_against_all_values():
    want = torch.tensor([100.0, 0.001, math.inf], dtype=torch.bfloat16)
    assert mixers._is_same(torch.tensor([100.0, 0.0015, math.inf], dtype=torch.bfloat16), want)
    assert not mixers._is_same(torch.tensor([90.0, 0.001, math.inf], dtype=torch.bfloat16), want)
    assert not mixers._is_same(torch.tensor([100.0, 0.001, 7.0], dtype=torch.bfloat16), want)
