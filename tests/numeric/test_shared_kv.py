"""Layers that read the keys and values of an earlier layer: one cache, several readers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from models import VOCAB, randomise, rotate_half
from programs import apply
from torch import Tensor, nn

import kvxform
from kvxform.capture import capture
from kvxform.ir.program import Program
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.rotation.rotate_qk import RotateQk
from kvxform.passes.rotation.rotate_v import RotateV

HEADS, KV_HEADS, DIM, WIDTH = 4, 2, 16, 64
EXACT_PASSES = ["rotate-v", "insert-cache", {"page-cache": {"page_size": 16}}, "rotate-qk"]


class SharedLayers(nn.Module):
    """Four layers; the second and fourth read keys and values of the one before.

    Args:
        turns: `owner`: keys are rotated once; `reader`: every layer rotates the shared projection.
        own_gain: The second layer scales the keys it reads, so that they are not the same.
        windows: Sliding window of each layer, or None.
    """

    def __init__(
        self,
        turns: str = "owner",
        own_gain: bool = False,
        windows: tuple[int | None, ...] = (None,) * 4,
    ) -> None:
        super().__init__()
        self.turns, self.own_gain, self.windows = turns, own_gain, windows
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.q, self.o, self.up, self.down = (
            nn.ModuleList(nn.Linear(a, b) for _ in range(4))
            for a, b in ((WIDTH, HEADS * DIM), (HEADS * DIM, WIDTH), (WIDTH, 96), (96, WIDTH))
        )
        self.k, self.v = (
            nn.ModuleList(nn.Linear(WIDTH, KV_HEADS * DIM) for _ in range(2)) for _ in range(2)
        )
        self.gain = nn.Parameter(torch.ones(DIM))
        inv_freq = 10000.0 ** (-torch.arange(DIM // 2, dtype=torch.float64) / (DIM // 2))
        angles = torch.outer(torch.arange(128, dtype=torch.float64), inv_freq)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        batch, length, _ = x.shape
        cos, sin = self.cos[:length], self.sin[:length]
        for layer in range(4):
            if layer % 2 == 0:
                k = self.k[layer // 2](x).view(batch, length, KV_HEADS, DIM)
                v = self.v[layer // 2](x).view(batch, length, KV_HEADS, DIM).transpose(1, 2)
                if self.turns == "owner":
                    k = rotate_half(k, cos, sin)
            q = rotate_half(self.q[layer](x).view(batch, length, HEADS, DIM), cos, sin)
            keys = k if self.turns == "owner" else rotate_half(k, cos, sin)
            if layer == 1 and self.own_gain:
                keys = keys * self.gain
            x = x + self.o[layer](self._attend(q, keys, v, layer))
            x = x + self.down[layer](F.gelu(self.up[layer](F.layer_norm(x, (WIDTH,)))))
        return F.linear(F.layer_norm(x, (WIDTH,)), self.embed.weight)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        batch, length = q.shape[:2]
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        where = torch.arange(length)
        distance = where[:, None] - where
        mask = distance >= 0
        window = self.windows[layer]
        if window is not None:
            mask = mask & (distance < window)
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).reshape(batch, length, -1)


def model(**options) -> nn.Module:
    return randomise(SharedLayers(**options).double().eval())


def owners(program: Program) -> list[int]:
    return [site.owner for site in program.sites]


def tokens(batch: int = 2, length: int = 21) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("turns", ["owner", pytest.param("reader", marks=pytest.mark.slow)])
def test_readers_are_found_and_append_nothing(turns):
    source = model(turns=turns, windows=(None, 5, 7, 7))
    optimized = kvxform.optimize(source, {"version": 1, "name": "t", "passes": EXACT_PASSES})
    assert owners(optimized.program) == [0, 0, 2, 2]
    assert [site.owner for site in optimized.plan.sites] == [0, 0, 2, 2]
    assert [n.kwargs["layer"] for n in optimized.program.graph.nodes
            if "cache_append" in str(n.target)] == [0, 2]  # fmt: skip
    assert optimized.plan.bytes_per_token == 2 * 2 * KV_HEADS * DIM * 8
    ids = tokens()
    with torch.no_grad():
        expected = source(ids)
    assert float((optimized(ids) - expected).abs().max()) <= 1e-8
    session = optimized.new_session(2, 32)
    session.prefill(ids[:, :15])
    for t in range(15, 21):
        logits = session.decode(ids[:, t])
        assert float((logits - expected[:, t]).abs().max()) <= 1e-8
    assert session.cache_bytes() == optimized.plan.bytes_at([21, 21], 32)


def test_readers_undo_the_basis_of_their_owner():
    source, text = model(), tokens(8, 40)
    passes = ["insert-cache", {"factor-kv": {"k_density": 1.0, "v_density": 1.0, "recent": 0}}]
    passes[1]["factor-kv"]["dtype"] = "float64"
    recipe = {"version": 1, "name": "t", "passes": passes}
    optimized = kvxform.optimize(source, recipe, calibration=text)
    assert [site.owner for site in optimized.plan.sites] == [0, 0, 2, 2]
    assert {loss.layer for loss in optimized.report.passes[-1].losses} == {0, 2}
    with torch.no_grad():
        expected = source(tokens())
    assert float((optimized(tokens()) - expected).abs().max()) <= 1e-8


def test_a_layer_that_changes_what_it_reads_has_its_own_keys():
    program = capture(model(own_gain=True)).program
    assert owners(program) == [0, 1, 2, 2]


@pytest.mark.parametrize(
    "order",
    [
        (InsertCache(), RotateQk()),
        pytest.param((RotateQk(), InsertCache()), marks=pytest.mark.slow),
    ],
)
def test_keys_of_an_owner_are_rotated_once(order):
    program = capture(model()).program
    for graph_pass in order:
        program, _ = apply(graph_pass, program)
    hadamards = [n for n in program.graph.nodes if "hadamard" in str(n.target)]
    assert len(hadamards) == 4 + 2  # every q, and the keys of two owners
    assert len({site.k_basis for site in program.sites}) == 1


def test_all_readers_undo_the_rotation_of_values():
    source = model()
    program, found = apply(RotateV(), capture(source).program)
    assert [getattr(f, "done", None) for f in found] == [None, True, None, True]
    ids = tokens()
    with torch.no_grad():
        got = program.to_module()(ids, torch.arange(21).expand(2, -1))
        assert float((got - source(ids)).abs().max()) <= 1e-10
    _, again = apply(RotateV(), program)
    assert all(f.done for f in again)


@pytest.mark.slow
def test_a_reader_without_a_plain_output_keeps_the_values_of_its_owner():
    program = capture(model()).program
    program.sites = tuple(
        dataclasses.replace(site, o=None) if site.layer == 1 else site for site in program.sites
    )
    _, found = apply(RotateV(), program)
    assert [f.done if hasattr(f, "done") else "match" for f in found] == [
        False, False, "match", True,
    ]  # fmt: skip
