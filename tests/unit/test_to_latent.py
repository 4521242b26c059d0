"""to-latent: exact where nothing is lost, the algebra against equations, and what is refused."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from programs import (
    apply,
    fired,
    gpt2_program,
    latent_program,
    llama_program,
    reasons,
    run,
    token_ids,
)
from torch import Tensor

from kvxform.calibrate import collect
from kvxform.errors import RecipeError
from kvxform.ir.program import Program
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.rotation.rotate_qk import RotateQk
from kvxform.passes.structure.cache_latent import CacheLatent
from kvxform.passes.structure.to_latent import ToLatent
from kvxform.runtime.model import OptimizedModel
from kvxform.structure.latent_maps import Turning, mix_heads

HEADS, KV_HEADS, DIM = 4, 2, 16
KEYS = VALUES = KV_HEADS * DIM


@functools.cache
def ready(**model: object) -> Program:
    """Return a program with a calibration, which tests must not change."""
    program = llama_program(**model)
    calibration = collect(program, token_ids(program, 12, 32, seed=3), name="random")
    return dataclasses.replace(program, calibration=calibration)


def turned(x: Tensor) -> Tensor:
    """RoPE in halves by complex numbers, `[..., T, D]`."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
    pairs = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angles)
    return torch.cat([pairs.real, pairs.imag], -1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_nothing_is_lost_at_full_width(bias, interleaved):
    program = ready(bias=bias)
    if interleaved:
        program = dataclasses.replace(program.clone(), calibration=program.calibration)
        for node in program.graph.nodes:
            if "rope" in str(node.target):
                node.kwargs = {**node.kwargs, "interleaved": True}
        program.sites = tuple(
            dataclasses.replace(s, rope=dataclasses.replace(s.rope, interleaved=True))
            for s in program.sites
        )
    ids = token_ids(program, 2, 40, seed=9)
    expected = run(program, ids)
    for rank, is_exact in ((VALUES, True), (VALUES - 1, False)):
        latent, found = apply(ToLatent(KEYS, rank), program)
        assert fired(found) == 2
        assert (float((run(latent, ids) - expected).abs().max()) < 1e-10) == is_exact
        assert all((loss.error == 0) == (loss.stream == "key") or is_exact
                   for match in found for loss in match.losses)  # fmt: skip


def test_what_is_written_is_what_cache_latent_takes():
    latent, _ = apply(ToLatent(8, 24), ready())
    ids = token_ids(latent, 2, 40, seed=9)
    absorbed, found = apply(CacheLatent(), latent)
    assert fired(found) == 2
    cached, _ = apply(InsertCache(), absorbed)
    rotated, _ = apply(RotateQk(), cached)
    assert {site.payload for site in rotated.plan.sites} == {"latent"}
    assert rotated.plan.values_per_token == 2 * (24 + 8)
    for program in (absorbed, cached, rotated):
        torch.testing.assert_close(
            OptimizedModel(program)(ids) if program.is_cached else run(program, ids),
            run(latent, ids),
            rtol=0,
            atol=1e-10,
        )


def test_scores_lose_rope_of_the_other_pairs_and_nothing_else():
    """At full rank: scores by hand, with RoPE on the mixed pairs that keep it."""
    program = ready(layers=1)
    latent, (match,) = apply(ToLatent(16, None), program)
    mixing = match.data["mixing"]
    ids = token_ids(program, 1, 20, seed=4)
    w, layer = program.weights, "layers.0.attn"
    x = w["embed.weight"][ids[0]]
    x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w["layers.0.norm1.weight"]
    q, k, v = ((x @ w[f"{layer}.{n}.weight"].T).unflatten(-1, (-1, DIM)) for n in "qkv")
    joined = k.flatten(1)  # [T, Hk D]
    out = []
    for head in range(HEADS):
        group = head // (HEADS // KV_HEADS)
        place = torch.zeros(20, KEYS, dtype=torch.float64)
        place[:, group * DIM : (group + 1) * DIM] = q[:, head]
        angles = torch.arange(20)[:, None] * mixing.inv_freq
        pairs = []
        for y in (place, joined):
            first, second = (y @ mixing.shared.T).chunk(2, -1)
            pairs.append(torch.complex(first, second) * torch.exp(1j * angles))
        scores = (pairs[0] @ pairs[1].conj().T).real
        scores = (scores + place @ mixing.rest.T @ (joined @ mixing.rest.T).T) * DIM**-0.5
        weights = scores.masked_fill(torch.ones(20, 20).triu(1).bool(), -torch.inf).softmax(-1)
        out.append(weights @ v[:, group])
    node = latent.attention_node(0)
    output = next(n for n in latent.graph.nodes if n.op == "output")
    output.args = (node,)
    found = latent.to_module()(ids, torch.arange(20)[None])[0]  # [H, T, Dv]
    torch.testing.assert_close(found, torch.stack(out), rtol=0, atol=1e-10)


def test_mixing_is_orthogonal_and_commutes_with_rope():
    statistics = ready().calibration.layers[0]
    inv_freq = ready().weights["inv_freq"]
    turning = Turning.of(inv_freq, DIM, interleaved=False)
    samples = statistics.k_pre.samples, statistics.q_pre.samples
    mixing = mix_heads(turning, KV_HEADS, 5, samples, 32)
    whole = torch.cat([mixing.shared, mixing.rest])
    eye = torch.eye(KEYS).double()
    torch.testing.assert_close(whole @ whole.T, eye, rtol=0, atol=1e-12)
    k = torch.randn(KV_HEADS, 9, DIM).double()
    after = turned(k).transpose(0, 1).flatten(1) @ mixing.shared.T
    first, second = (k.transpose(0, 1).flatten(1) @ mixing.shared.T).chunk(2, -1)
    angles = torch.arange(9)[:, None] * mixing.inv_freq
    before = torch.complex(first, second) * torch.exp(1j * angles)
    torch.testing.assert_close(after, torch.cat([before.real, before.imag], -1))


def test_the_pairs_that_matter_keep_rope():
    """Keys of equal heads fall into one component; pairs that hardly turn can go without RoPE."""
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(1, 500, DIM, generator=generator)
    k, q = one.expand(KV_HEADS, -1, -1), torch.randn(HEADS, 500, DIM, generator=generator)
    inv_freq = torch.tensor([1.0, 0.5, 0.1, 0.05, 1e-3, 1e-4, 1e-5, 1e-6])
    turning = Turning.of(inv_freq, DIM, interleaved=False)
    mixing = mix_heads(turning, KV_HEADS, 4, (k, q), 32)
    assert sorted(mixing.inv_freq.tolist(), reverse=True) == pytest.approx(inv_freq[:4].tolist())
    assert mixing.kept > 0.999
    blind = mix_heads(turning, KV_HEADS, 4, None, 32)
    assert blind.kept == pytest.approx(4 / 16)


def test_losses_fall_with_the_rank_and_balance_weighs_keys():
    def losses(rank: int, balance: float = 1.0) -> tuple[float, float]:
        _, found = apply(ToLatent(16, rank, balance), ready())
        key, value = found[0].losses
        return key.error, value.error

    assert losses(10) > losses(20) > losses(30)
    assert losses(48) == pytest.approx((0, 0), abs=1e-12)
    light, heavy = losses(20, 0.5), losses(20, 2.0)
    assert heavy[0] < light[0]
    assert heavy[1] > light[1]


def test_a_dry_run_has_the_shapes():
    dry, found = apply(ToLatent(8, 24), dataclasses.replace(ready(), calibration=None))
    measured, _ = apply(ToLatent(8, 24), ready())
    assert not any(match.losses for match in found)
    assert dry.sites == measured.sites
    shapes = [{n: w.shape for n, w in p.weights.items()} for p in (dry, measured)]
    assert shapes[0] == shapes[1]


def test_healing_may_train_what_it_made():
    latent, _ = apply(ToLatent(8, 24), ready())
    assert set(latent.touched.values()) == {"to-latent"}
    assert {"to_latent.0.down.weight", "to_latent.1.up_v.weight"} <= set(latent.touched)
    assert not any("attn.k" in name or "attn.v" in name for name in latent.weights)


def test_what_has_no_latent_is_left_alone():
    program = gpt2_program()
    assert set(reasons(ToLatent().match(program))) == {"there is no RoPE"}
    once, _ = apply(ToLatent(), ready())
    assert {f.done for f in ToLatent().match(once)} == {True}
    assert {f.done for f in ToLatent().match(latent_program())} == {True}
    program = dataclasses.replace(ready())
    program.sites = tuple(dataclasses.replace(site, k=None) for site in program.sites)
    assert set(reasons(ToLatent().match(program))) == {
        "keys or values are not the output of a plain linear layer"
    }
    program.sites = (ready().sites[0], dataclasses.replace(ready().sites[1], shared_with=0))
    assert set(reasons(ToLatent().match(program))) == {"layers share these keys and values"}
    rotated, _ = apply(RotateQk(), ready())
    assert set(reasons(ToLatent().match(rotated))) == {
        "something lies between RoPE and the attention"
    }


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"rope_dim": 3}, "rope_dim must be even"),
        ({"rank": 0}, "rank must be"),
        ({"balance": 0}, "balance must be"),
    ],
)
def test_options_are_checked(options, rule):
    with pytest.raises(RecipeError, match=rule):
        ToLatent(**options)
