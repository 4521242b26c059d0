"""Samples that codecs are fitted on: basis, side of RoPE, gradients, envelope."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cached import cached_program

from kvxform.codecs.basis import Basis
from kvxform.errors import PassError
from kvxform.ir.calibration import Calibration, LayerStatistics, StreamStatistics
from kvxform.ir.fitting import codec_samples
from kvxform.ir.program import Program
from kvxform.passes.quantize.quantize_kv import QuantizeKv

HEADS, TOKENS, WIDTH = 2, 96, 16
NUQ = {"codec": "nuq", "bits": 2}


def stream(seed: int) -> StreamStatistics:
    generator = torch.Generator().manual_seed(seed)
    x, gradients = torch.randn(2, HEADS, TOKENS, WIDTH, generator=generator)
    mean, gram = x.mean(1).double(), (x.mT @ x / TOKENS).double()
    low, high = x.amin(1), x.amax(1)
    return StreamStatistics(TOKENS, mean, gram, low, high, x, torch.arange(TOKENS), gradients)


def calibrated() -> Program:
    program = cached_program()
    layers = {
        layer: LayerStatistics(
            stream(layer),
            stream(layer + 10),
            stream(layer + 20),
            torch.eye(WIDTH).expand(HEADS, -1, -1).double(),
            torch.full((HEADS, WIDTH), 9.0),
            stream(layer + 30),
        )
        for layer in range(2)
    }
    program.calibration = Calibration("some text", torch.zeros(1, TOKENS).long(), layers)
    return program


def samples(program: Program, name: str, **changes):
    plan = dataclasses.replace(program.plan.site(1).streams[name], **changes)
    return codec_samples(program, 1, name, plan)


def test_each_stream_gets_its_own_values():
    program = calibrated()
    layer = program.calibration.layers[1]
    for name, rope, expected in (
        ("key", "post", layer.k_post),
        ("key", "pre", layer.k_pre),
        ("value", "none", layer.v),
    ):
        found = samples(program, name, rope=rope)
        assert torch.equal(found.x, expected.samples)
        assert torch.equal(found.weights, expected.gradients.square())
        assert (found.envelope is not None) == (rope == "post")


def test_values_are_in_the_stored_basis_and_gradients_follow():
    program = calibrated()
    scale = torch.rand(HEADS, 1, WIDTH) + 0.5
    turn = torch.linalg.qr(torch.randn(HEADS, WIDTH, WIDTH)).Q
    shear = torch.randn(HEADS, WIDTH, WIDTH) + 4 * torch.eye(WIDTH)
    program.weights |= {"scale": scale, "turn": turn, "shear": shear, "back": shear.inverse()}
    bases = (
        (Basis("hadamard", 16), Basis("hadamard", 16).matrix(WIDTH, torch.float32)),
        (Basis("scale", weight="scale"), torch.diag_embed(scale[:, 0])),
        (Basis("matrix", weight="turn"), turn),
        (Basis("matrix", weight="shear", inverse="back"), shear),
    )
    for basis, matrix in bases:
        found = samples(program, "key", basis=basis)
        source = program.calibration.layers[1].k_post
        x = source.samples.clone().requires_grad_()
        stored = (x @ matrix).detach().requires_grad_()
        (stored @ matrix.inverse() * source.gradients).sum().backward()  # loss with these gradients
        torch.testing.assert_close(found.x, stored.detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.weights, stored.grad.square(), rtol=1e-3, atol=1e-4)
        assert found.envelope is None


@pytest.mark.parametrize("interleaved", [False, True])
def test_keys_at_other_positions_are_turned_with_their_pairs(interleaved):
    program = calibrated()
    program.info = dataclasses.replace(program.info, context_length=1500)
    rope = dataclasses.replace(program.sites[1].rope, rotary_dim=6, interleaved=interleaved)
    program.sites = tuple(dataclasses.replace(s, rope=rope) for s in program.sites)
    inv_freq = torch.tensor([1.0, 0.3, 0.002])
    program.weights[rope.inv_freq] = inv_freq
    found = samples(program, "key")
    pairs = [(0, 1), (2, 3), (4, 5)] if interleaved else [(0, 3), (1, 4), (2, 5)]
    here, there = (
        torch.view_as_complex(x[..., pairs].contiguous()) for x in (found.x, found.elsewhere)
    )
    moved = ((there / here).angle()[0, :, 2].double() / 0.002).round()  # less than half a turn
    drawn = moved + torch.arange(TOKENS)
    assert 0 <= float(drawn.min()) < 200
    assert 1300 < float(drawn.max()) < 1500
    angles = moved[:, None] * inv_freq.double()
    expected = here * torch.polar(torch.ones_like(angles), angles).to(here)
    torch.testing.assert_close(there, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(found.x[..., 6:], found.elsewhere[..., 6:])
    assert samples(program, "key", rope="pre").elsewhere is None
    assert samples(program, "value", rope="none").elsewhere is None


def test_keys_at_other_positions_are_in_the_stored_basis():
    program = calibrated()
    plain = samples(program, "key").elsewhere
    turned = samples(program, "key", basis=Basis("hadamard", 16)).elsewhere
    matrix = Basis("hadamard", 16).matrix(WIDTH, torch.float32)
    torch.testing.assert_close(turned, plain @ matrix)


def test_first_tokens_are_in_the_stored_basis():
    program = calibrated()
    layer = program.calibration.layers[1]
    assert samples(program, "key").first is None
    first = torch.randn(HEADS, WIDTH)
    post = dataclasses.replace(layer.k_post, first=first)
    program.calibration.layers[1] = dataclasses.replace(layer, k_post=post)
    assert torch.equal(samples(program, "key").first, first)
    matrix = Basis("hadamard", 16).matrix(WIDTH, torch.float32)
    turned = samples(program, "key", basis=Basis("hadamard", 16)).first
    torch.testing.assert_close(turned, first @ matrix)
    torch.testing.assert_close(post.in_basis(matrix).first, turned)


def test_keys_before_a_rope_of_a_part_are_refused():
    program = calibrated()
    layers = program.calibration.layers
    without = {n: dataclasses.replace(layer, k_pre=None) for n, layer in layers.items()}
    program.calibration = dataclasses.replace(program.calibration, layers=without)
    with pytest.raises(PassError, match="KVX205 codecs of keys before RoPE"):
        samples(program, "key", rope="pre")


def test_latents_are_refused():
    program = calibrated()
    program.sites = tuple(dataclasses.replace(s, payload="latent") for s in program.sites)
    with pytest.raises(PassError, match="KVX205 codecs are fitted on K and V of heads"):
        samples(program, "key")


def test_quantize_kv_fits_each_stream_on_its_own_samples():
    program = calibrated()
    quantise = QuantizeKv(NUQ, {"codec": "int", "clip": "fit"}, layers={"1": {"key": None}})
    assert quantise.needs_calibration
    assert quantise.needs_fisher
    first, second = quantise.match(program)
    assert first.data["key"].calibration == "some text"
    key = samples(program, "key")
    assert len(first.data["key"].codec["table"]) == 4
    assert torch.tensor(first.data["key"].codec["center"]).shape == (HEADS, WIDTH)
    assert key.x.shape == (HEADS, TOKENS, WIDTH)
    assert list(second.data) == ["value"]
    assert isinstance(second.data["value"].codec["clip"], float)
    program.calibration = None  # a dry run over shapes
    dry, _ = quantise.match(program)
    assert dry.data["key"].codec["table"] is None
    assert dry.data["key"].planes == first.data["key"].planes


def test_codecs_without_constants_need_no_calibration():
    assert not QuantizeKv({"codec": "int"}, None).needs_calibration
    assert QuantizeKv({"codec": "int", "clip": "fit"}, None).needs_calibration
    assert not QuantizeKv({"codec": "int", "clip": "fit"}, None).needs_fisher
    assert QuantizeKv(None, None, layers={"0": {"value": NUQ}}).needs_fisher
