import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import gpt2_program, latent_program, llama_program

import kvxform.ir.ops as kvx
from kvxform.calibrate import collect
from kvxform.calibrate.collecting import largest_reach
from kvxform.calibrate.moments import MOST_SAMPLES, pick_tokens, sample_limit
from kvxform.ir.program import RopeSpec
from kvxform.ir.types import TensorType
from kvxform.ir.watching import Watcher
from kvxform.pass_base import Rewriter

WINDOWS, WINDOW = 3, 20


def text(seed=0, rows=WINDOWS, window=WINDOW):
    return torch.randint(0, 48, (rows, window), generator=torch.Generator().manual_seed(seed))


def first_layer(program, token_ids):
    """Keys before RoPE, queries before RoPE, and values of layer 0, by the equations."""
    w = program.weights
    x = w["embed.weight"][token_ids]
    x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w["layers.0.norm1.weight"]
    return {
        name: (x @ w[f"layers.0.attn.{name}.weight"].T).unflatten(-1, (-1, 16)).transpose(-3, -2)
        for name in "qkv"
    }  # each [windows, heads, S, 16]


def turned(x):
    """RoPE in halves, by complex numbers."""
    angles = torch.arange(x.shape[-2])[:, None] * 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    pairs = torch.complex(x[..., :8], x[..., 8:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], -1)


def over_tokens(x):
    """`[windows, heads, S, D]` as `[heads, windows * S, D]`."""
    return x.transpose(0, 1).flatten(1, 2)


def test_moments_are_those_of_all_tokens():
    program, ids = llama_program(), text()
    layer = collect(program, ids, name="text").layers[0]
    own = first_layer(program, ids)
    expected = {
        "k_pre": own["k"],
        "q_pre": own["q"],
        "k_post": turned(own["k"]),
        "q_post": turned(own["q"]),
        "v": own["v"],
    }
    for name, value in expected.items():
        x, found = over_tokens(value.double()), getattr(layer, name)
        assert found.count == WINDOWS * WINDOW
        torch.testing.assert_close(found.mean, x.mean(1), rtol=1e-6, atol=1e-7)
        gram = torch.einsum("htd,hte->hde", x, x) / x.shape[1]
        torch.testing.assert_close(found.gram, gram, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.low.double(), x.amin(1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.high.double(), x.amax(1), rtol=1e-5, atol=1e-6)
        covariance = torch.stack([head.T.cov(correction=0) for head in x])
        torch.testing.assert_close(found.covariance, covariance, rtol=1e-5, atol=1e-6)
        first = value[:, :, 0].mean(0)
        torch.testing.assert_close(found.first.double(), first.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [llama_program, gpt2_program])
def test_magnitudes_are_those_of_what_projections_read(make):
    """Against the inputs of layer 0, by the equations; weights that share one are one entry."""
    program, ids = make(), text()
    found = collect(program, ids, name="text").inputs
    w = program.weights
    if make is llama_program:
        x = w["embed.weight"][ids]
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w["layers.0.norm1.weight"]
        names = ["layers.0.attn.k.weight", "layers.0.attn.v.weight"]
        assert set(found) == {n.replace("0", i) for n in names for i in "01"}
    else:
        x = w["wte.weight"][ids] + w["wpe.weight"][: ids.shape[1]]
        gain, bias = w["h.0.ln_1.weight"], w["h.0.ln_1.bias"]
        x = torch.nn.functional.layer_norm(x, x.shape[-1:], gain, bias)
        names = ["h.0.attn.c_attn.weight"]
        assert set(found) == {n.replace("0", i) for n in names for i in "01"}
    for name in names:
        torch.testing.assert_close(found[name], x.abs().mean((0, 1)))


def test_samples_are_the_same_tokens_in_every_stream(monkeypatch):
    monkeypatch.setattr("kvxform.calibrate.moments.MOST_SAMPLES", 17)
    program, ids = llama_program(), text()
    calibration = collect(program, ids, name="text", seed=3)
    picks = pick_tokens(WINDOWS, WINDOW, 17, 3)
    own = first_layer(program, ids)
    for name in ("k", "v"):
        stream = getattr(calibration.layers[0], "k_pre" if name == "k" else name)
        expected = own[name][picks.rows, :, picks.positions].transpose(0, 1)
        torch.testing.assert_close(stream.samples.double(), expected.double(), rtol=1e-5, atol=1e-6)
        assert stream.positions.tolist() == picks.positions.tolist()
    assert calibration.layers[1].q_post.samples.shape == (4, 17, 16)


def test_equal_runs_give_equal_statistics_and_the_program_stays_as_it_was():
    program = llama_program()
    before = str(program.graph)
    a, b = (collect(program, text(), name="text", fisher=True).layers[1] for _ in range(2))
    for stream in ("k_pre", "k_post", "v", "q_post"):
        for field in ("mean", "gram", "low", "samples"):
            left, right = getattr(getattr(a, stream), field), getattr(getattr(b, stream), field)
            assert torch.equal(left, right)
    assert torch.equal(a.v.gradients, b.v.gradients)
    assert torch.equal(a.v_weighted, b.v_weighted)
    assert str(program.graph) == before


@given(rows=st.integers(1, 5), window=st.integers(1, 9), most=st.integers(1, 50))
@settings(max_examples=20, deadline=None)
def test_picks_are_distinct_and_in_order(rows, window, most):
    picks = pick_tokens(rows, window, most, 0)
    flat = (picks.rows * window + picks.positions).tolist()
    assert flat == sorted(set(flat))
    assert len(flat) == min(most, rows * window)
    slots = [picks.slots(row) for row in range(rows)]
    assert [s.stop for s in slots[:-1]] == [s.start for s in slots[1:]]
    assert slots[-1].stop == len(flat)


def test_samples_of_large_models_are_fewer():
    site = llama_program().sites[0]
    assert sample_limit([site]) == MOST_SAMPLES
    large = dataclasses.replace(site, num_q_heads=64, num_kv_heads=8, head_dim=128, v_head_dim=128)
    kept = sample_limit([large] * 80)
    values = 80 * (2 * 72 + 8) * 128
    assert kept * values * 4 <= 1 << 30 < (kept + 1) * values * 4


@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 3.0}, {"window": 5}, {"sink_logits": torch.tensor([0.5, -1.0, 2.0, 0.0])}],
    ids=["plain", "softcap", "window", "sinks"],
)
def test_v_weighted_is_by_the_probabilities(options, monkeypatch):
    monkeypatch.setattr("kvxform.ir.watching.QUERY_CHUNK", 7)
    program, ids = llama_program(attention=options), text()
    found = collect(program, ids, name="text").layers[0].v_weighted
    own = {name: x.double() for name, x in first_layer(program, ids).items()}
    q, k = turned(own["q"]), turned(own["k"]).repeat_interleave(2, 1)
    scores = q @ k.mT / 4
    if "softcap" in options:
        scores = 3 * torch.tanh(scores / 3)
    distance = torch.arange(WINDOW)[:, None] - torch.arange(WINDOW)
    seen = (distance >= 0) & (distance < options.get("window", WINDOW))
    exponentials = scores.exp() * seen
    total = exponentials.sum(-1, keepdim=True)
    if "sink_logits" in options:
        total = total + options["sink_logits"].double().exp()[:, None, None]
    p = (exponentials / total).mean(-2)  # over queries: [windows, H, S]
    p = p.unflatten(1, (2, 2)).mean(2)
    expected = torch.einsum("wht,whtd,whte->hde", p, own["v"], own["v"]) / WINDOWS
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [16, 8])
def test_envelope_holds_at_every_position_and_is_reached(rotary_dim, interleaved):
    rope = RopeSpec("inv_freq", rotary_dim, 1.3, interleaved)
    site = dataclasses.replace(llama_program().sites[0], rope=rope)
    k = torch.randn(1, 2, 6, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    frequencies = 100.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)

    def at(start):
        positions = torch.arange(start, start + 6)[None]
        return kvx.rope(
            k,
            positions,
            frequencies,
            rotary_dim=rotary_dim,
            attention_scaling=1.3,
            interleaved=interleaved,
        )[0]

    reach = largest_reach(site, at(0))
    everywhere = torch.stack([at(start).abs().amax(1) for start in range(0, 4000, 3)]).amax(0)
    assert (everywhere <= reach + 1e-9).all()
    assert (everywhere >= 0.99 * reach).all(), "a wider envelope than needed"


def test_envelope_of_a_latent_follows_its_shared_part():
    site = dataclasses.replace(
        latent_program(shared_first=False).sites[0], rope=RopeSpec("inv_freq", 8)
    )
    keys = torch.zeros(4, 1, 12)
    keys[:, 0, 4], keys[:, 0, 8] = 3.0, 4.0  # one pair of the shared part, which is last
    keys[:, 0, 0] = 2.0
    expected = torch.zeros(12)
    expected[[4, 8]], expected[0] = 5.0, 2.0
    assert torch.equal(largest_reach(site, keys), expected.expand(4, 12))


def sharing():
    """Layer 1 reads the keys and values of layer 0."""
    program = llama_program()
    first, second = (program.attention_node(layer) for layer in (0, 1))
    second.args = (second.args[0], *first.args[1:])
    Rewriter(program, "test").finish()
    reader = dataclasses.replace(program.sites[1], shared_with=0)
    return dataclasses.replace(program, sites=(program.sites[0], reader))


def test_layers_that_share_a_cache_share_its_statistics():
    layers = collect(sharing(), text(), name="text", fisher=True).layers
    for stream in ("k_pre", "k_post", "v"):
        mine, owned = getattr(layers[1], stream), getattr(layers[0], stream)
        assert torch.equal(mine.samples, owned.samples)
        assert torch.equal(mine.gradients, owned.gradients)
        assert mine.count == WINDOWS * WINDOW
    assert not torch.allclose(layers[1].v_weighted, layers[0].v_weighted, rtol=1e-3)
    assert not torch.allclose(layers[1].q_post.gram, layers[0].q_post.gram, rtol=1e-3)


def test_an_added_bias_counts(monkeypatch):
    monkeypatch.setattr("kvxform.ir.watching.QUERY_CHUNK", 7)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
    by_slopes = collect(llama_program(attention={"alibi_slopes": slopes}), text(), name="text")
    distance = torch.arange(WINDOW)[None, :] - torch.arange(WINDOW)[:, None]
    tensor = (slopes[:, None, None] * distance)[None]
    biased = llama_program()
    biased.weights["bias"] = tensor
    for layer in (0, 1):
        node, rewriter = biased.attention_node(layer), Rewriter(biased, "test")
        type_ = TensorType(torch.float64, tuple(tensor.shape))
        rewriter.set_args(node, bias=rewriter.get_weight_node("bias", node, type_))
    by_tensor = collect(biased, text(), name="text")
    plain = collect(llama_program(), text(), name="text")
    found = [c.layers[0].v_weighted for c in (by_slopes, by_tensor, plain)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-8)
    assert not torch.allclose(found[0], found[2], rtol=1e-3)


def test_models_without_rope_or_with_partial_keys_have_no_keys_before_it():
    for program in (gpt2_program(), latent_program()):
        layer = collect(program, text(), name="text", fisher=True).layers[0]
        assert layer.k_pre is None
        assert layer.q_pre is None
        largest = torch.maximum(layer.k_post.low.abs(), layer.k_post.high.abs())
        torch.testing.assert_close(layer.rotary_envelope(), largest)
        assert layer.k_fisher.shape == layer.k_post.samples.shape


class Nudged(Watcher):
    """A program in which one operand of one attention is moved."""

    def __init__(self, program, layer, stream, delta):
        super().__init__(program.to_module())
        self.place, self.delta = (layer, stream), delta

    def seen(self, layer, stream, x):
        if (layer, stream) == self.place:
            x += self.delta


@pytest.mark.parametrize("stream", ["k_post", "v"])
def test_gradients_are_those_of_the_next_token_loss(stream):
    program, ids = llama_program(), text(rows=1)
    found = getattr(collect(program, ids, name="text", fisher=True).layers[1], stream)
    slot, head, channel = 4, 1, 3
    token = int(found.positions[slot])

    def loss(step):
        delta = torch.zeros(1, 2, WINDOW, 16, dtype=torch.float64)
        delta[0, head, token, channel] = step
        logits = Nudged(program, 1, stream, delta).show(ids[0])[0]
        return -logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None]).sum()

    slope = float(loss(1e-4) - loss(-1e-4)) / 2e-4
    assert abs(slope) > 1e-6
    assert float(found.gradients[head, slot, channel]) == pytest.approx(slope, rel=1e-3)
    assert torch.equal(found.fisher, found.gradients**2)


def test_gradients_before_and_after_rope_differ_by_the_rotation():
    layer = collect(llama_program(), text(), name="text", fisher=True).layers[0]
    pre, post = layer.k_pre.gradients, layer.k_post.gradients
    torch.testing.assert_close(pre.square().sum(-1), post.square().sum(-1), rtol=1e-4, atol=1e-9)
    assert not torch.allclose(pre, post, rtol=1e-2)


def test_statistics_turn_with_the_basis():
    layer = collect(llama_program(), text(), name="text", fisher=True).layers[0]
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(2, 16, 16, generator=generator, dtype=torch.float64)).Q
    x = layer.v.samples.double() @ q  # all tokens are samples here
    found = layer.v.in_basis(q)
    torch.testing.assert_close(found.mean, x.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.gram, x.mT @ x / x.shape[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.high.double(), x.amax(1), rtol=1e-5, atol=1e-6)
    gradients = (layer.v.gradients.double() @ q).float()
    torch.testing.assert_close(found.gradients, gradients, rtol=1e-4, atol=1e-7)
