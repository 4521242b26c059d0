"""Mixes of heads: what they lose is what the singular values say, and RoPE passes through."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxform.ir.rotary import rotary_table, turn_pairs
from kvxform.rotations.at_read import heads_together
from kvxform.structure.head_groups import (
    mean_similarity,
    plain_similarity,
    similar_order,
    turning_similarity,
)
from kvxform.structure.head_mixes import (
    Turns,
    in_order,
    mean_mix,
    mixed_rows,
    output_roots,
    plain_mix,
    reading_rows,
    score_roots,
    turning_mix,
    weighed_mix,
)

SHAPES = {
    "groups": st.integers(1, 3),
    "together": st.integers(1, 4),
    "dim": st.sampled_from([4, 6, 10]),
    "tokens": st.sampled_from([3, 50]),
    "seed": st.integers(0, 99),
}


def heads_of(groups, together, dim, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(groups * together, tokens, dim, generator=generator, dtype=torch.float64)


def lost_of(values, kept):
    """Return the share of the norm that is lost without the singular values after the first."""
    return float(np.sqrt((values[kept:] ** 2).sum() / (values**2).sum()))


@settings(deadline=None, max_examples=12)
@given(**SHAPES)
def test_the_plain_mix_loses_the_singular_values_it_leaves_out(groups, together, dim, tokens, seed):
    x = heads_of(groups, together, dim, tokens, seed)
    expected = [
        lost_of(np.linalg.svd(np.concatenate(list(own), 1), compute_uv=False), dim)
        for own in x.view(groups, together, tokens, dim).numpy()
    ]
    assert plain_mix(x, groups).errors(x) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=12)
@given(**SHAPES, rotary=st.sampled_from([2, 4]), interleaved=st.booleans())
def test_the_turning_mix_loses_the_singular_values_of_every_pair(
    groups, together, dim, tokens, seed, rotary, interleaved
):
    x = heads_of(groups, together, dim, tokens, seed)
    mix = turning_mix(x, groups, Turns(rotary, interleaved))
    expected = []
    for own in x.view(groups, together, tokens, dim).numpy():
        lost = 0.0
        for i in range(rotary // 2):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + rotary // 2)
            numbers = (own[..., a] + 1j * own[..., b]).T  # [tokens, heads]
            lost += (np.linalg.svd(numbers, compute_uv=False)[1:] ** 2).sum()
        if dim > rotary:
            rest = np.concatenate(list(own[..., rotary:]), 1)
            lost += (np.linalg.svd(rest, compute_uv=False)[dim - rotary :] ** 2).sum()
        expected.append(float(np.sqrt(lost / (own**2).sum())))
    assert mix.errors(x) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=12)
@given(**SHAPES, interleaved=st.booleans())
def test_no_mix_loses_more_than_the_mean_and_the_free_one_loses_least(
    groups, together, dim, tokens, seed, interleaved
):
    x = heads_of(groups, together, dim, tokens, seed)
    free, turning, mean = (
        np.array(mix.errors(x))
        for mix in (
            plain_mix(x, groups),
            turning_mix(x, groups, Turns(dim - dim % 4, interleaved)),
            mean_mix(groups * together, groups, dim),
        )
    )
    assert (free <= turning + 1e-12).all()
    assert (turning <= mean + 1e-12).all()
    if together == 1:
        assert max(*free, *turning, *mean) < 1e-12


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [4, 12])
def test_the_turning_mix_commutes_with_rope_and_the_free_one_does_not(rotary, interleaved):
    x = heads_of(2, 3, 12, 30, 0)
    frequencies = 100.0 ** -torch.arange(0, 1, 2 / rotary, dtype=torch.float64)
    table = rotary_table(torch.arange(30), frequencies, 1.0, torch.float64)

    def turn(y):
        return turn_pairs(y, table, interleaved=interleaved)

    mix = turning_mix(x, 2, Turns(rotary, interleaved))
    torch.testing.assert_close(mix.join(turn(x)), turn(mix.join(x)), rtol=0, atol=1e-12)
    free = plain_mix(x, 2)
    assert float((free.join(turn(x)) - turn(free.join(x))).abs().max()) > 0.1


@pytest.mark.parametrize("interleaved", [False, True])
def test_heads_that_are_complex_multiples_of_each_other_are_kept_whole(interleaved):
    x = heads_of(1, 1, 8, 40, 1)[0]
    turns = Turns(8, interleaved)
    first, second = turns.pairs()
    numbers = torch.complex(x[:, first], x[:, second])
    factors = torch.complex(*heads_of(2, 3, 4, 1, 2).view(2, 3, 4))
    heads = torch.empty(3, 40, 8, dtype=torch.float64)
    heads[..., first], heads[..., second] = (
        part(numbers * factors[:, None]) for part in (torch.real, torch.imag)
    )
    assert max(turning_mix(heads, 1, turns).errors(heads)) < 1e-12
    assert max(mean_mix(3, 1, 8).errors(heads)) > 0.1


def test_rows_make_what_is_stored_and_scores_are_those_of_what_is_read():
    x, width = heads_of(2, 2, 6, 20, 3), 5
    w_k, w_q = heads_of(4, 1, width, 6, 4), heads_of(8, 1, width, 6, 5)  # [heads, D, in]
    mix, inputs = plain_mix(x, 2), heads_of(1, 1, width, 9, 6)[0]
    heads, queries = inputs @ w_k.mT, inputs @ w_q.mT
    stored = inputs @ mixed_rows(w_k, mix).mT
    torch.testing.assert_close(stored, mix.join(heads))
    read = stored.repeat_interleave(2, 0) @ mix.up.mT
    scores = queries @ read.repeat_interleave(2, 0).mT
    new = (inputs @ reading_rows(w_q, mix).mT) @ stored.repeat_interleave(4, 0).mT
    torch.testing.assert_close(new, scores)


def in_roots(gram):
    values, vectors = np.linalg.eigh(gram)
    damped = values.clip(0) + 1e-2 * values.mean()
    return torch.from_numpy(vectors @ np.diag(np.sqrt(damped)) @ vectors.T)


def test_weighed_mixes_lose_least_of_what_scores_and_outputs_are_made_of():
    x, queries = heads_of(2, 2, 6, 50, 10), heads_of(4, 1, 6, 30, 11) * torch.linspace(0.1, 2, 6)
    moments = queries.mT @ queries / 30
    roots = score_roots(moments, None)
    expected = torch.stack([in_roots(m) for m in moments.numpy()])
    torch.testing.assert_close(roots, expected)
    mix = weighed_mix(plain_mix(x @ roots, 2), roots)

    def cost(mix):
        read = mix.join(x).repeat_interleave(2, 0) @ mix.up.mT
        return float(((x - read) @ roots).square().sum())

    values = [
        np.linalg.svd(torch.cat(list(own @ r), 1).numpy(), compute_uv=False)
        for own, r in zip(x.view(2, 2, 50, 6), roots.view(2, 2, 6, 6), strict=True)
    ]
    assert cost(mix) == pytest.approx(sum((s[6:] ** 2).sum() for s in values))
    assert cost(mix) < 0.99 * cost(plain_mix(x, 2))


def test_errors_of_values_cost_what_outputs_make_of_them():
    rows = heads_of(2, 3, 6, 9, 12).mT  # six query heads of 9 channels for two KV heads
    grams = (rows @ rows.mT).unflatten(0, (2, 3)).sum(1)
    expected = torch.stack([in_roots(gram) for gram in grams.numpy()])
    torch.testing.assert_close(output_roots(rows, 2), expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_what_scores_cost_commutes_with_rope(interleaved):
    x, turns = heads_of(1, 3, 12, 30, 13), Turns(8, interleaved)
    queries = heads_of(3, 1, 12, 40, 14) * torch.linspace(0.1, 2, 12)
    roots = score_roots(queries.mT @ queries / 40, turns)
    table = rotary_table(torch.arange(30), torch.linspace(1, 0.1, 4).double(), 1.0, torch.float64)
    mix = weighed_mix(turning_mix(x @ roots, 1, turns), roots)
    turned = turn_pairs(x, table, interleaved=interleaved)
    torch.testing.assert_close(
        mix.join(turned), turn_pairs(mix.join(x), table, interleaved=interleaved)
    )
    plain = turning_mix(x, 1, turns)

    def cost(mix):
        read = mix.join(x).repeat_interleave(3, 0) @ mix.up.mT
        return float(((x - read) @ roots).square().sum())

    assert cost(mix) < cost(plain)


def test_mixes_are_the_same_whatever_the_sign_of_the_data():
    x = heads_of(2, 2, 6, 20, 7)
    torch.testing.assert_close(plain_mix(x, 2).down, plain_mix(-x, 2).down)
    turns = Turns(6)
    torch.testing.assert_close(turning_mix(x, 2, turns).down, turning_mix(-x, 2, turns).down)


def planted(heads, images):
    """Return heads of which every second one is an image of the same head."""
    base = heads_of(2, 1, 8, 60, 8)
    return torch.stack([images(i) @ base[i % 2].T for i in range(heads)]).mT.contiguous()


@pytest.mark.parametrize("kind", ["mean", "plain", "turning"])
def test_heads_that_are_alike_are_found(kind):
    rotations = torch.linalg.qr(heads_of(6, 1, 8, 8, 9)).Q

    def image(i):
        return rotations[i] if kind == "plain" else torch.eye(8, dtype=torch.float64) * (i + 1)

    x = planted(6, image)
    similarity = {
        "mean": mean_similarity,
        "plain": plain_similarity,
        "turning": lambda y: turning_similarity(y, Turns(4)),
    }[kind](x)
    assert similar_order(similarity, 2) == (0, 2, 4, 1, 3, 5)
    assert similar_order(similarity, 3)[:2] in ((0, 2), (0, 4))
    torch.testing.assert_close(similarity.diagonal(), torch.ones(6).double())


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 99), groups=st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_groups_are_never_less_alike_than_neighbours(seed, groups):
    square = heads_of(1, 1, 12, 12, seed)[0]
    similarity = square + square.T

    def inside(order):
        runs = torch.tensor(order).view(groups, -1)
        return float(sum(similarity[run][:, run].sum() for run in runs))

    found = similar_order(similarity, groups)
    assert sorted(found) == list(range(12))
    assert inside(found) >= inside(range(12)) - 1e-9


def test_runs_of_query_heads_follow_their_kv_head():
    assert in_order(torch.arange(6), (2, 0, 1)).tolist() == [4, 5, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("heads", "wanted", "left"), [(3, 1.5, 1), (8, 4.0, 4), (9, 4.5, 3), (12, 5.9, 4), (7, 0.2, 1)]
)
def test_a_share_of_heads_is_rounded_down_to_a_divisor(heads, wanted, left):
    assert heads_together(heads, wanted) == left
