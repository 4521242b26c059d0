"""Recognition of rotary embeddings in hand-made graphs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.capture.heads import measure_heads
from kvxform.capture.probing import Prober, Setting
from kvxform.capture.rope import RopeProbe, Rotary, find_rope, fit_frequencies, prove_rope
from kvxform.capture.structure import chain_back, is_transparent
from kvxform.capture.weights import new_meta
from kvxform.ir.types import TensorType

aten = torch.ops.aten
HEADS, HEAD_DIM = 2, 8


def frequencies(count: int, base: float = 10000.0) -> Tensor:
    return base ** (-torch.arange(count, dtype=torch.float64) / count)


class RotaryGraph:
    """`x [B, S, H * D]` -> heads -> `turned * cos + partner * sin`, tables from `position_ids`.

    Written with aten ops, by the equations of RoFormer, as models write it.
    """

    def __init__(
        self,
        *,
        rotary_dim: int = HEAD_DIM,
        interleaved: bool = False,
        scaling: float = 1.0,
        sine_factor: float = 1.0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.graph, self.dtype = fx.Graph(), dtype
        freq = frequencies(rotary_dim // 2).to(dtype)
        doubled = freq.repeat_interleave(2) if interleaved else freq.repeat(2)
        self.weights = {"freq": doubled}
        self.rotary_dim, self.interleaved = rotary_dim, interleaved
        ids, positions = (
            self._stamp(self.graph.placeholder(n), torch.int64, ("B", "S"))
            for n in ("input_ids", "position_ids")
        )
        sizes = [self.graph.call_function(aten.sym_size.int, (ids, i)) for i in (0, 1)]
        self.x = self._call(aten.unsqueeze.default, ids, 2)  # stands for hidden states
        self.x = self._call(aten.to.dtype, self.x, dtype, shape=("B", "S", HEADS * HEAD_DIM))
        heads = self._call(aten.reshape.default, self.x, [*sizes, HEADS, HEAD_DIM])
        heads = self._call(aten.transpose.int, heads, 1, 2)
        cos, sin = self._tables(positions, scaling, sine_factor)
        turned = self._call(aten.slice.Tensor, heads, 3, 0, rotary_dim)
        rest = self._call(aten.slice.Tensor, heads, 3, rotary_dim, HEAD_DIM)
        a = self._call(aten.mul.Tensor, turned, cos)
        b = self._call(aten.mul.Tensor, self._partner(turned), sin)
        out = self._call(aten.add.Tensor, a, b)
        self.out = self._call(aten.cat.default, [out, rest], -1, shape=("B", HEADS, "S", HEAD_DIM))
        self.prober = Prober(self.graph, self.weights)

    def _tables(self, positions: fx.Node, scaling: float, sine: float) -> tuple[fx.Node, fx.Node]:
        freq = self._stamp(self.graph.create_node("get_attr", "freq"), self.dtype, (8,))
        where = self._call(aten.unsqueeze.default, positions, 2)
        where = self._call(aten.to.dtype, where, self.dtype)
        angles = self._call(aten.mul.Tensor, where, freq)
        angles = self._call(aten.unsqueeze.default, angles, 1)
        cos = self._call(aten.mul.Tensor, self._call(aten.cos.default, angles), scaling)
        sin = self._call(aten.mul.Tensor, self._call(aten.sin.default, angles), scaling * sine)
        return cos, sin

    def _partner(self, turned: fx.Node) -> fx.Node:
        half = self.rotary_dim // 2
        if not self.interleaved:
            first = self._call(aten.slice.Tensor, turned, 3, 0, half)
            second = self._call(aten.slice.Tensor, turned, 3, half, self.rotary_dim)
            return self._call(aten.cat.default, [self._call(aten.neg.default, second), first], -1)
        first = self._call(aten.slice.Tensor, turned, 3, 0, self.rotary_dim, 2)
        second = self._call(aten.slice.Tensor, turned, 3, 1, self.rotary_dim, 2)
        pair = self._call(aten.stack.default, [self._call(aten.neg.default, second), first], -1)
        return self._call(aten.flatten.using_ints, pair, -2)

    def _call(self, target, *args, shape: tuple[int | str, ...] = ()) -> fx.Node:
        return self._stamp(self.graph.call_function(target, args), self.dtype, shape)

    def _stamp(self, node: fx.Node, dtype: torch.dtype, shape: tuple[int | str, ...]) -> fx.Node:
        node.meta = new_meta(TensorType(dtype, shape))
        return node

    def probe(self) -> RopeProbe:
        stops = chain_back(self.out, self.prober.content, is_transparent)
        stop = next(s for s in stops if s.node is self.x)
        heads = measure_heads(self.prober, self.out, stop)
        assert heads is not None
        return RopeProbe(self.prober, self.out, heads)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [2, 4, 8])
def test_half_interleaved_and_partial_embeddings_are_found(
    rotary_dim: int, interleaved: bool
) -> None:
    graph = RotaryGraph(rotary_dim=rotary_dim, interleaved=interleaved)
    found = find_rope(graph.probe())
    assert isinstance(found, Rotary)
    # Two channels are one pair either way.
    assert found.interleaved is (interleaved and rotary_dim > 2)
    assert found.rotary_dim == rotary_dim
    assert (found.scaling, found.factor) == (1.0, 1.0)
    want = frequencies(rotary_dim // 2)
    assert torch.allclose(graph.prober.weights[found.inv_freq], want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rotary_dim", [4, 8])
def test_the_factor_of_cosine_and_sine_is_found(rotary_dim: int) -> None:
    found = find_rope(RotaryGraph(rotary_dim=rotary_dim, scaling=1.25).probe())
    assert isinstance(found, Rotary)
    assert found.scaling == 1.25


def test_angles_of_a_float32_model_are_matched_exactly() -> None:
    graph = RotaryGraph(dtype=torch.float32)
    found = find_rope(graph.probe())
    assert isinstance(found, Rotary)
    assert torch.equal(graph.prober.weights[found.inv_freq], frequencies(4).float())


def test_a_wrong_sine_is_refused() -> None:
    found = find_rope(RotaryGraph(sine_factor=1.01).probe())
    assert found == "cosine and sine do not lie on one circle"


def test_one_frequency_that_is_off_is_refused() -> None:
    probe = RotaryGraph().probe()
    setting = probe.find_setting()
    assert setting is not None
    guess = Rotary("", HEAD_DIM, False, 1.0, 1.0)
    wrong = frequencies(4)
    wrong[2] *= 1.001
    refusal = prove_rope(probe, setting, guess, wrong)
    assert isinstance(refusal, str)
    assert refusal.startswith("kvx::rope differs from it by")
    assert isinstance(prove_rope(probe, setting, guess, frequencies(4)), Rotary)


def test_pairs_that_are_wrong_are_refused() -> None:
    probe = RotaryGraph(interleaved=True).probe()
    setting = probe.find_setting()
    assert setting is not None
    half = Rotary("", HEAD_DIM, False, 1.0, 1.0)
    assert isinstance(prove_rope(probe, setting, half, frequencies(4)), str)


def test_the_region_equals_kvx_rope_at_positions_not_probed() -> None:
    graph = RotaryGraph(rotary_dim=4)
    found = find_rope(graph.probe())
    assert isinstance(found, Rotary)
    positions = (5, 9, 31, 3000)
    x = torch.randn(1, 4, HEADS * HEAD_DIM, dtype=torch.float64)
    (want,) = graph.prober.run([graph.out], Setting(1, positions), {graph.x: x})
    heads = x.view(1, 4, HEADS, HEAD_DIM).transpose(1, 2)
    got = kvx.rope(
        heads, torch.tensor([positions]), graph.prober.weights[found.inv_freq], rotary_dim=4
    )
    assert float((got - want).abs().max()) < 1e-11


@settings(max_examples=25, deadline=None)
@given(theta=st.lists(st.floats(1e-6, 3.1), min_size=1, max_size=6))
def test_frequencies_are_recovered_from_wrapped_angles(theta: list[float]) -> None:
    want = torch.tensor(theta, dtype=torch.float64)
    positions = (0, 1, 2, 3, 8, 64, 1024, 4096)
    turns = torch.outer(torch.tensor(positions, dtype=torch.float64), want)
    wrapped = torch.remainder(turns + math.pi, 2 * math.pi) - math.pi
    noisy = wrapped + 1e-7 * torch.sin(turns * 1e3)
    noisy[0] = 0.0
    assert float((fit_frequencies(noisy, positions) - want).abs().max()) < 1e-9
