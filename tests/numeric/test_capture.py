"""Captured programs against their unrewritten sources, and what must not be captured."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import VOCAB, PlainGPT, plain, tiny_hf
from torch import Tensor, nn
from torch.export import Dim
from transformers import LlamaConfig, LlamaForCausalLM

import kvxform.ir.ops as kvx
from kvxform.capture import Captured, capture
from kvxform.errors import CaptureError
from kvxform.ir.program import Program, default_positions
from kvxform.ir.verify import verify_program

DYNAMIC = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
# Rounding of two layers; the captured program adds up the same numbers in another order.
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-5}


@functools.cache
def captured_hf(family: str, attention: str, dtype: torch.dtype) -> tuple[nn.Module, Captured]:
    layers = {} if family in ("llama", "gpt2") else {"num_hidden_layers": 1}
    model = tiny_hf(family, attention=attention, dtype=dtype, **layers)
    return model, capture(model)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def run(program: Program, ids: Tensor, start: int = 0) -> Tensor:
    with torch.no_grad():
        logits = program.to_module()(ids, default_positions(ids) + start)
    assert isinstance(logits, Tensor)
    return logits


def run_source(model: nn.Module, ids: Tensor, start: int = 0) -> Tensor:
    with torch.no_grad():
        return model(ids, position_ids=default_positions(ids) + start, use_cache=False).logits


def count(program: Program, op: Any) -> int:
    return sum(1 for _ in program.calls(op))


QUICK = [
    ("llama", "sdpa", torch.float64),
    ("gpt2", "eager", torch.float64),
    ("qwen3", "sdpa", torch.float32),
    ("gpt_neox", "sdpa", torch.float32),
]
SLOW = [
    ("llama", "eager", torch.float64),
    ("gpt2", "sdpa", torch.float64),
    ("qwen2", "eager", torch.float32),
    ("mistral", "eager", torch.float32),
    ("phi", "eager", torch.float32),
]
CASES = [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.mark.parametrize(("family", "attention", "dtype"), CASES)
def test_a_hugging_face_program_equals_its_source(
    family: str, attention: str, dtype: torch.dtype
) -> None:
    model, captured = captured_hf(family, attention, dtype)
    program = captured.program
    layers = model.config.num_hidden_layers
    assert len(program.sites) == count(program, kvx.ATTENTION) == layers
    assert program.rejected == ()
    calls = {str(n.target) for n in program.graph.nodes}
    assert not [c for c in calls if "softmax" in c or "scaled_dot" in c or "arange" in c]
    verify_program(program)
    for shape, start in (((2, 9), 0), ((1, 1), 0), ((3, 21), 11)):
        ids = tokens(*shape)
        got, want = run(program, ids, start), run_source(model, ids, start)
        assert float((got - want).abs().max()) <= BOUNDS[dtype]
    assert captured.max_abs_error <= BOUNDS[dtype]


def test_a_llama_site_is_described_in_full() -> None:
    model, captured = captured_hf("llama", "sdpa", torch.float64)
    program = captured.program
    site = program.sites[1]
    assert (site.layer, site.module) == (1, "model.layers.1.self_attn")
    assert (site.num_q_heads, site.num_kv_heads, site.head_dim, site.v_head_dim) == (6, 2, 8, 8)
    assert site.scale == pytest.approx(8**-0.5)
    assert site.window is None
    assert site.rope is not None
    assert (site.rope.rotary_dim, site.rope.interleaved) == (8, False)
    for name in "qkvo":
        projection = getattr(site, name)
        assert projection.weight == f"model.layers.1.self_attn.{name}_proj.weight"
        assert (projection.layout, projection.start, projection.head_stride) == ("out_in", 0, 8)
    assert count(program, kvx.ROPE) == 4
    assert count(program, kvx.RMS_NORM) == 5
    k = program.attention_node(1).args[1]
    assert k.meta["type"].shape == ("B", 2, "S", 8)  # every KV head once
    assert program.info.family == "llama"
    assert program.info.vocab_size == VOCAB
    assert program.info.eos_token_ids == (2,)
    assert model.training is False


def test_angles_in_float32_stay_in_float32_in_a_float64_model() -> None:
    _, captured = captured_hf("llama", "sdpa", torch.float64)
    rope = captured.program.sites[0].rope
    assert rope is not None
    assert captured.program.weights[rope.inv_freq].dtype is torch.float32


def test_the_fused_projection_of_gpt2_is_found() -> None:
    _, captured = captured_hf("gpt2", "eager", torch.float64)
    site = captured.program.sites[0]
    found = [(p.weight, p.bias, p.layout, p.start, p.head_stride) for p in (site.q, site.k, site.v)]
    name = "transformer.h.0.attn.c_attn"
    want = [(f"{name}.weight", f"{name}.bias", "in_out", start, 12) for start in (0, 48, 96)]
    assert found == want
    assert site.o.weight == "transformer.h.0.attn.c_proj.weight"
    assert site.o.layout == "in_out"


def test_interleaved_fused_heads_of_gpt_neox_are_found() -> None:
    _, captured = captured_hf("gpt_neox", "sdpa", torch.float32)
    site = captured.program.sites[0]
    starts = [(p.start, p.head_stride) for p in (site.q, site.k, site.v)]
    assert starts == [(0, 24), (8, 24), (16, 24)]
    assert site.rope.rotary_dim == 2  # a quarter of the channels


def test_norms_between_projection_and_rope_stay_and_hide_the_projection() -> None:
    _, captured = captured_hf("qwen3", "sdpa", torch.float32)
    site = captured.program.sites[0]
    assert site.rope is not None
    assert (site.q, site.k) == (None, None)
    assert site.v is not None


def test_a_short_sliding_window_is_read_from_the_mask() -> None:
    _, captured = captured_hf("mistral", "eager", torch.float32)
    assert [s.window for s in captured.program.sites] == [5]


def test_a_long_sliding_window_is_found_without_a_long_run() -> None:
    captured = capture(tiny_hf("mistral", sliding_window=4096, num_hidden_layers=1))
    assert [s.window for s in captured.program.sites] == [4096]


def test_the_attention_factor_of_yarn_is_kept() -> None:
    scaling = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = tiny_hf("llama", dtype=torch.float64, rope_parameters=scaling, num_hidden_layers=1)
    captured = capture(model)
    rope = captured.program.sites[0].rope
    assert rope.attention_scaling == pytest.approx(0.1 * torch.tensor(4.0).log().item() + 1)
    ids = tokens(2, 40)
    assert float((run(captured.program, ids) - run_source(model, ids)).abs().max()) <= 1e-12


PLAIN = [
    ("llama", {"rotary": "half", "by_hand": True}),
    ("llama", {"rotary": "complex", "by_hand": False}),
    ("llama", {"rotary": "none", "by_hand": True}),
    ("gpt", {"positions": "arange", "by_hand": False}),
    ("gpt", {"positions": "slice", "by_hand": True}),
]


@pytest.mark.parametrize(("kind", "options"), PLAIN)
def test_a_plain_program_equals_its_source(kind: str, options: dict[str, Any]) -> None:
    model = plain(kind, dtype=torch.float64, **options)
    program = capture(model).program
    assert len(program.sites) == 2
    assert program.rejected == ()
    assert all(p is not None for s in program.sites for p in (s.q, s.k, s.v, s.o))
    rotary = options.get("rotary", "none")
    assert count(program, kvx.ROPE) == (0 if rotary == "none" else 4)
    assert {s.rope.interleaved for s in program.sites if s.rope} <= {rotary == "complex"}
    for shape in ((2, 9), (1, 1), (2, 33)):
        ids = tokens(*shape)
        with torch.no_grad():
            want = model(ids)
        assert float((run(program, ids) - want).abs().max()) <= 1e-12


def test_counted_rotary_positions_follow_position_ids() -> None:
    program = capture(plain("llama", dtype=torch.float64)).program
    ids = tokens(2, 9)
    # Rotary scores depend on distances alone; per-row starts show that positions are per row.
    starts = torch.tensor([[3], [17]])
    with torch.no_grad():
        moved = program.to_module()(ids, default_positions(ids) + starts)
    assert float((moved - run(program, ids)).abs().max()) <= 1e-10


@pytest.mark.parametrize("positions", ["arange", "slice"])
def test_learned_positions_follow_position_ids(positions: str) -> None:
    model = plain("gpt", dtype=torch.float64, positions=positions)
    assert isinstance(model, PlainGPT)
    program = capture(model).program
    ids = tokens(2, 9)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.wpe.weight.copy_(model.wpe.weight.roll(-7, 0))
        want = moved(ids)
    assert float((run(program, ids, start=7) - want).abs().max()) <= 1e-12
    assert program.weights["wpe.weight"].data_ptr() == model.wpe.weight.data_ptr()


class Sinusoids(PlainGPT):
    """Computes its position vectors from a range, without any table."""

    def forward(self, idx: Tensor) -> Tensor:
        width = self.wte.weight.shape[1]
        angles = torch.arange(idx.shape[1])[:, None] / 100 ** (torch.arange(width) / width)
        x = self.wte(idx) + angles.sin().to(self.wte.weight.dtype)
        for block in self.blocks:
            x = x + self._attend(block, block["ln1"](x))
        return self.head(self.ln(x))


def test_computed_position_vectors_become_a_table() -> None:
    torch.manual_seed(0)
    model = Sinusoids(by_hand=True).eval()
    program = capture(model).program
    ids = tokens(1, 30)
    with torch.no_grad():
        want = model(ids)
    assert float((run(program, ids) - want).abs().max()) <= BOUNDS[torch.float32]
    assert program.weights["position_rows_0"].shape == (64, 48)  # as long as the mask table
    assert program.info.context_length == 64


def test_the_source_is_not_changed_and_weights_are_shared() -> None:
    model = plain("llama", by_hand=True).train()
    model.blocks[0]["attention"].eval()
    flags = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    program = capture(model).program
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    parameters = dict(model.named_parameters())
    shared = [n for n in program.weights if n in parameters]
    assert len(shared) == len(parameters)
    assert all(program.weights[n].data_ptr() == parameters[n].data_ptr() for n in shared)


def test_another_dtype_leaves_the_source_alone() -> None:
    model = plain("gpt")
    program = capture(model, dtype=torch.float64).program
    assert program.dtype is torch.float64
    assert next(model.parameters()).dtype is torch.float32


def test_capture_is_deterministic() -> None:
    def text() -> str:
        program = capture(plain("llama", rotary="complex")).program
        names = [f"{n.name} {n.args} {n.kwargs} {n.meta}" for n in program.graph.nodes]
        return "\n".join([*names, *sorted(program.weights), repr(program.sites)])

    assert text() == text()


def test_progress_is_told_in_order() -> None:
    told: list[str] = []
    capture(plain("gpt"), progress=told.append)
    assert told[0] == "reading the model"
    assert told[-1] == "comparing with the source"


# What must not be raised.


def test_one_detuned_key_frequency_leaves_rope_alone() -> None:
    model = plain("llama", dtype=torch.float64, key_detune=1.001)
    program = capture(model).program
    assert [s.rope for s in program.sites] == [None, None]
    assert count(program, kvx.ROPE) == 0
    left = "rotary embedding left as it is: q and k turn with different frequencies"
    assert [s.notes for s in program.sites] == [(left,), (left,)]
    assert program.rejected == ()
    ids = tokens(2, 9)
    with torch.no_grad():
        assert float((run(program, ids) - model(ids)).abs().max()) <= 1e-12


REFUSED = [
    ({"by_hand": True, "diagonal": 1}, "neither causal nor a sliding window"),
    ({"by_hand": True, "diagonal": -1}, "neither causal nor a sliding window"),
    ({"tile": True}, "not repeated in groups of neighbours"),
]


@pytest.mark.parametrize(("options", "reason"), REFUSED)
def test_a_planted_fault_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(CaptureError, match=reason) as caught:
        capture(plain("llama", **options))
    assert caught.value.code == "KVX303"


class Bidirectional(PlainGPT):
    """Attention without a mask."""

    def _attend(self, block: nn.ModuleDict, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = block["qkv"](x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return block["proj"](out.transpose(1, 2).reshape(batch, length, width))


class SquareBias(PlainGPT):
    """Scores get a bias that grows with the square of the distance, unlike ALiBi."""

    def _attend(self, block: nn.ModuleDict, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = block["qkv"](x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        where = torch.arange(length)
        distance = where[:, None] - where[None]
        bias = (distance**2 * -0.1).masked_fill(distance < 0, float("-inf"))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return block["proj"](out.transpose(1, 2).reshape(batch, length, width))


class NoAttention(PlainGPT):
    """Only feed-forward blocks."""

    def _attend(self, block: nn.ModuleDict, x: Tensor) -> Tensor:
        return block["proj"](block["qkv"](x)[..., : x.shape[-1]])


class LastOnly(PlainGPT):
    """Returns the logits of the last token alone, as generation code often does."""

    def forward(self, idx: Tensor) -> Tensor:
        return super().forward(idx)[:, -1:]


class DataDependent(PlainGPT):
    """Branches on the value of a token."""

    def forward(self, idx: Tensor) -> Tensor:
        return super().forward(idx) if idx[0, 0] > 3 else self.wte(idx)


FAULTY = [
    (Bidirectional, "KVX303", "bidirectional"),
    (SquareBias, "KVX303", "bias besides the mask"),
    (NoAttention, "KVX303", "no softmax over scores"),
    (LastOnly, "KVX304", "logits .B, S, vocab. of all positions"),
    (DataDependent, "KVX302", "torch.export must be able to trace"),
]


@pytest.mark.parametrize(("faulty", "code", "text"), FAULTY)
def test_a_model_that_cannot_be_cached_is_refused(
    faulty: type[nn.Module], code: str, text: str
) -> None:
    torch.manual_seed(0)
    with pytest.raises(CaptureError, match=text) as caught:
        capture(faulty().eval())
    assert caught.value.code == code


# Exported programs.


def test_an_exported_program_with_keywords_is_captured() -> None:
    model, captured = captured_hf("llama", "sdpa", torch.float64)
    ids = tokens(2, 7)
    exported = torch.export.export(
        model,
        (),
        {"input_ids": ids, "position_ids": default_positions(ids).contiguous(), "use_cache": False},
        dynamic_shapes={"input_ids": DYNAMIC, "position_ids": DYNAMIC, "use_cache": None},
    )
    program = capture(exported).program
    assert [s.q for s in program.sites] == [s.q for s in captured.program.sites]
    ids = tokens(2, 12)
    assert torch.equal(run(program, ids), run(captured.program, ids))


def test_an_exported_program_that_counts_positions_is_captured() -> None:
    model = plain("gpt", dtype=torch.float64)
    exported = torch.export.export(model, (tokens(2, 7),), dynamic_shapes=(DYNAMIC,))
    program = capture(exported).program
    ids = tokens(2, 12)
    with torch.no_grad():
        assert float((run(program, ids) - model(ids)).abs().max()) <= 1e-12


def test_a_static_exported_program_is_refused() -> None:
    exported = torch.export.export(plain("gpt"), (tokens(2, 7),))
    with pytest.raises(CaptureError, match="must be dynamic") as caught:
        capture(exported)
    assert caught.value.code == "KVX304"


def test_an_exported_program_with_a_mask_input_is_refused() -> None:
    ids = tokens(2, 7)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    shapes = {"input_ids": DYNAMIC, "attention_mask": DYNAMIC, "use_cache": None}
    exported = torch.export.export(tiny_hf("gpt2", n_layer=1), (), inputs, dynamic_shapes=shapes)
    with pytest.raises(CaptureError, match="only input_ids and position_ids") as caught:
        capture(exported)
    assert "attention_mask" in str(caught.value)


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_is_captured_whole() -> None:
    captured = capture("smollm2-135m")
    assert len(captured.program.sites) == 30
    assert captured.program.rejected == ()
    assert captured.max_abs_error <= 1e-3
    assert captured.program.info.context_length == 8192
    assert captured.tokenizer_path is not None


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
def test_16_bit_models_wider_than_their_integers_are_raised_whole(dtype):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,  # 1024 features of q: more than the integers that bfloat16 holds
        vocab_size=64,
    )
    site = capture(LlamaForCausalLM(config).to(dtype).eval()).program.site(0)
    assert (site.num_q_heads, site.num_kv_heads, site.head_dim) == (8, 4, 128)
    assert site.rope is not None
    assert None not in (site.q, site.k, site.v, site.o)
