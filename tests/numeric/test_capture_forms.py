"""Attention written in many ways: each is found, proven and raised; near misses are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import VOCAB, PlainGPT, randomise
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import kvxform.ir.ops as kvx
from kvxform.capture import capture
from kvxform.errors import CaptureError
from kvxform.ir.program import Program, default_positions

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v and result [B, H, S, D]


class Decoder(PlainGPT):
    """PlainGPT with one layer, two KV heads and its attention core given as a function."""

    def __init__(self, attend: Attend, *, repeat: bool = True) -> None:
        super().__init__(layers=1)
        self.core, self.repeat = attend, repeat

    def _attend(self, block: nn.ModuleDict, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        shape = (batch, length, self.heads, width // self.heads)
        q, k, v = (t.view(shape).transpose(1, 2) for t in block["qkv"](x).split(width, dim=2))
        k, v = k[:, ::2], v[:, ::2]  # two KV heads for four query heads
        if self.repeat:
            k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        return block["proj"](self.core(q, k, v).transpose(1, 2).reshape(batch, length, width))


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))


def captured(model: nn.Module) -> Program:
    """Return the program of a float64 copy of a model, after comparing the two."""
    model = randomise(model.double().eval())
    program = capture(model).program
    for shape in ((2, 13), (1, 1)):
        ids = tokens(*shape)
        with torch.no_grad():
            got, want = program.to_module()(ids, default_positions(ids)), model(ids)
        assert float((got - want).abs().max()) <= 1e-10
    return program


def later(length: int) -> Tensor:
    """True where a query (row) may not see a key (column)."""
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def masked(scores: Tensor) -> Tensor:
    return scores.masked_fill(later(scores.shape[-1]), float("-inf"))


def sdpa_folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).unflatten(0, (-1, 4))


def bmm_folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
    weights = masked(torch.bmm(q, k.transpose(1, 2)) / 3.5).softmax(-1)
    return torch.bmm(weights, v).view(-1, 4, *q.shape[1:])


def baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    shape = q.shape
    q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
    mask = torch.zeros(shape[2], shape[2], dtype=q.dtype).masked_fill(later(shape[2]), -1e9)
    scores = torch.baddbmm(mask[None].expand(q.shape[0], -1, -1), q, k.mT, alpha=0.3)
    return torch.bmm(scores.softmax(-1), v).view(shape)


def einsum_heads_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = masked(torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.3)
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


def einsum_tokens_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = masked(torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.3)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).transpose(1, 2)


def einsum_keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhkd,bhqd->bhkq", k, q) * 0.3
    scores = scores.masked_fill(later(q.shape[2]).T, float("-inf"))
    return torch.einsum("bhkq,bhkd->bhqd", scores.softmax(-2), v)


def einsum_grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhgqd,bhkd->bhgqk", q.unflatten(1, (2, 2)), k) * 0.3
    return torch.einsum("bhgqk,bhkd->bhgqd", masked(scores).softmax(-1), v).flatten(1, 2)


def five_axes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.unflatten(1, (2, 2)), k.unsqueeze(2), v.unsqueeze(2)
    return (masked(q @ k.mT * 0.3).softmax(-1) @ v).flatten(1, 2)


def keys_times_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (k @ q.mT * 0.3).masked_fill(later(q.shape[2]).T, float("-inf"))
    return (v.mT @ scores.softmax(-2)).mT


def batch_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(0, 1) for t in (q, k, v))  # [H, B, S, D]
    return (masked(q @ k.mT * 0.3).softmax(-1) @ v).transpose(0, 1)


def softmax_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = masked(q @ k.mT * 0.3)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ v


def log_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return masked(q @ k.mT * 0.3).log_softmax(-1).exp() @ v


def logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = masked(q @ k.mT * 0.3)
    return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v


def renormalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * 0.3).softmax(-1) * ~later(q.shape[2])
    return (weights / weights.sum(-1, keepdim=True)) @ v


def normalised_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = masked(q @ k.mT * 0.3)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights @ v) / weights.sum(-1, keepdim=True)


def where_and_finfo(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * 0.3
    low = torch.tensor(torch.finfo(q.dtype).min, dtype=q.dtype)
    return torch.where(later(q.shape[2]), low, scores).softmax(-1) @ v


def small_negative_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.3 + later(q.shape[2]) * -10000.0).softmax(-1) @ v


def sum_of_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q.unsqueeze(3) * k.unsqueeze(2)).sum(-1) * 0.3
    return (masked(scores).softmax(-1).unsqueeze(-1) * v.unsqueeze(2)).sum(3)


def off_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = masked(q @ k.mT * 0.3).exp()
    return (weights / (weights.sum(-1, keepdim=True) + 1)) @ v


def scaled_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (masked(q @ k.mT * 0.3).softmax(-1) * 1.01) @ v


def anti_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (k @ q.mT * 0.3).masked_fill(later(q.shape[2]), float("-inf"))
    return (v.mT @ scores.softmax(-2)).mT


def differential(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
    weights = [masked(a @ b.mT * 0.3).softmax(-1) for a, b in ((q1, k1), (q2, k2))]
    return (weights[0] - 0.4 * weights[1]) @ v


def squared_relu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).relu().square() * ~later(q.shape[2])) @ v


def flex_excluding_itself(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def earlier(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where((i > j) | (j == 0), score, float("-inf"))

    return flex_attention(q, k, v, score_mod=earlier)


def flex_with_table(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=q.dtype)

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + slopes[h] * (j - i)

    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    length = q.shape[2]
    mask = create_block_mask(causal, None, None, length, length, device="cpu")
    return flex_attention(q, k, v, score_mod=biased, block_mask=mask)


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def causal(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(i >= j, score, float("-inf"))

    return flex_attention(q, k, v, score_mod=causal, scale=0.3)


def flex_capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where((i >= j) & (i - j < 4), 20.0 * torch.tanh(score / 20.0), -float("inf"))

    return flex_attention(q, k, v, score_mod=capped, enable_gqa=True)


FORMS = [
    (sdpa_folded, True),
    (bmm_folded, True),
    (baddbmm, True),
    pytest.param(einsum_heads_first, True, marks=pytest.mark.slow),
    (einsum_tokens_first, True),
    pytest.param(einsum_keys_first, True, marks=pytest.mark.slow),
    (einsum_grouped, False),
    (five_axes, False),
    pytest.param(keys_times_queries, True, marks=pytest.mark.slow),
    (batch_last, True),
    (softmax_by_hand, True),
    pytest.param(log_softmax, True, marks=pytest.mark.slow),
    pytest.param(logsumexp, True, marks=pytest.mark.slow),
    pytest.param(renormalised, True, marks=pytest.mark.slow),
    pytest.param(normalised_last, True, marks=pytest.mark.slow),
    (where_and_finfo, True),
    (small_negative_mask, True),
    (sum_of_products, True),
    pytest.param(flex, True, marks=pytest.mark.slow),
    (flex_capped, False),
    pytest.param(flex_with_table, True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("attend", "repeat"), FORMS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_form_of_attention_is_raised(attend: Attend, repeat: bool) -> None:
    program = captured(Decoder(attend, repeat=repeat))
    (site,) = program.sites
    assert program.rejected == ()
    assert (site.num_q_heads, site.num_kv_heads, site.head_dim) == (4, 2, 12)
    assert site.o is not None
    assert sum(1 for _ in program.calls(kvx.ATTENTION)) == 1


class Halves(Decoder):
    """Two layers, of which the first attends in a way of its own."""

    def __init__(self, attend: Attend) -> None:
        super().__init__(attend)
        extra = PlainGPT(layers=1).blocks[0]
        self.blocks.append(extra)

    def _attend(self, block: nn.ModuleDict, x: Tensor) -> Tensor:
        own, self.core = self.core, self.core if block is self.blocks[0] else bmm_folded
        out = super()._attend(block, x)
        self.core = own
        return out


REFUSED = [
    (scaled_weights, "the attention weights go through mul"),
    (anti_causal, "the mask is neither"),
    (differential, "the attention weights go through"),
    pytest.param(flex_excluding_itself, "", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("attend", "reason"), REFUSED)
def test_a_near_miss_is_refused_and_the_other_layer_raised(attend: Attend, reason: str) -> None:
    program = captured(Halves(attend))
    assert len(program.sites) == 1
    assert program.rejected
    for refused in program.rejected:
        assert refused.kind == "attention"
        assert refused.reason.startswith(reason)
        assert refused.node


@pytest.mark.parametrize("attend", [off_by_one, pytest.param(squared_relu, marks=pytest.mark.slow)])
def test_what_is_no_softmax_is_a_mixer(attend: Attend) -> None:
    program = captured(Halves(attend))
    assert [r.kind for r in program.rejected] == ["mixer"]
    with pytest.raises(CaptureError, match="no softmax over scores") as caught:
        captured(Decoder(attend))
    assert caught.value.code == "KVX303"


class Builtin(PlainGPT):
    """Attends with `nn.MultiheadAttention`."""

    def __init__(self, *, batch_first: bool, need_weights: bool) -> None:
        super().__init__(layers=1)
        self.mha = nn.MultiheadAttention(48, 4, batch_first=batch_first)
        self.need_weights = need_weights

    def _attend(self, block: nn.ModuleDict, x: Tensor) -> Tensor:
        x = x if self.mha.batch_first else x.transpose(0, 1)
        mask = later(x.shape[1 if self.mha.batch_first else 0])
        out = self.mha(x, x, x, attn_mask=mask, need_weights=self.need_weights)[0]
        return out if self.mha.batch_first else out.transpose(0, 1)


@pytest.mark.parametrize(
    ("batch_first", "need_weights"),
    [
        (True, False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(False, False), (True, True), (False, True)]
        ),
    ],
)
def test_multihead_attention_of_torch_is_raised(batch_first: bool, need_weights: bool) -> None:
    program = captured(Builtin(batch_first=batch_first, need_weights=need_weights))
    (site,) = program.sites
    assert program.rejected == ()
    assert (site.num_q_heads, site.num_kv_heads, site.head_dim) == (4, 4, 12)
    assert site.module == "mha"
    assert site.q is not None
    assert site.q.weight == "mha.in_proj_weight"


@pytest.mark.parametrize(
    "attend", [sdpa_folded, pytest.param(einsum_tokens_first, marks=pytest.mark.slow)]
)
def test_a_decomposed_exported_program_is_raised(attend: Attend) -> None:
    model = randomise(Decoder(attend).double().eval())
    dynamic = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    exported = torch.export.export(model, (tokens(2, 7),), dynamic_shapes=(dynamic,))
    program = capture(exported.run_decompositions()).program
    (site,) = program.sites
    assert (site.num_q_heads, site.num_kv_heads, site.head_dim) == (4, 2, 12)
    ids = tokens(2, 12)
    with torch.no_grad():
        got, want = program.to_module()(ids, default_positions(ids)), model(ids)
    assert float((got - want).abs().max()) <= 1e-10
