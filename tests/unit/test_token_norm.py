"""Codec token-norm: OScaR's four paths, equivariance, shared planes, wrapping, refusals."""

from __future__ import annotations

import pytest
import torch
from distortion import TOLERANCE, check_planes, normal_vectors
from hypothesis import given, settings
from hypothesis import strategies as st

from kvxform.codecs.base import CodecSamples, make_codec
from kvxform.codecs.basis import Basis
from kvxform.codecs.integer import IntCodec
from kvxform.codecs.token_norm import TokenNormCodec
from kvxform.errors import PassError, RecipeError

INT2 = IntCodec(bits=2, axis="channel", group=32, zero="float")
HADAMARD = Basis("hadamard", 128)
PATHS = {  # codec, basis, errors of the first token (here, published) and of the others (published)
    "KIVI": (INT2, Basis(), (17.7, 17.69), 0.153),
    "rotation": (INT2, HADAMARD, (17.3, 18.87), 0.155),
    "scaling": (TokenNormCodec(INT2), Basis(), (0.211, 0.207), 0.167),
    "OScaR": (TokenNormCodec(INT2), HADAMARD, (0.202, 0.197), 0.154),
}


def blocks_with_a_sink(count: int = 64) -> torch.Tensor:
    """Return blocks of 32 normal keys of 8 heads, the first one small and in two channels."""
    keys = normal_vectors(count * 8 * 32).reshape(count, 8, 32, 128)
    keys[:, :, 0] = 0
    keys[:, :, 0, 5], keys[:, :, 0, 77] = 0.875, -0.875  # norm 3.5; that of the others is 32
    return keys


@pytest.mark.parametrize("path", sorted(PATHS))
def test_the_four_paths_of_oscar(path):
    """The published numbers are of one block, whose small token is not told but for its size."""
    codec, basis, (first, published), others = PATHS[path]
    keys = blocks_with_a_sink()
    decoded = basis.unrotate(codec.decode(codec.encode(basis.rotate(keys)), torch.float32))
    errors = (decoded - keys).square().sum((1, 3)) / keys.square().sum((1, 3))
    assert float(errors[:, 0].mean()) == pytest.approx(first, rel=TOLERANCE)
    assert first == pytest.approx(published, rel=0.1)
    assert float(errors[:, 1:].mean()) == pytest.approx(others, rel=TOLERANCE)


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_one_token_of_an_unusual_norm_ruins_only_plain_groups(factor):
    keys = normal_vectors(64 * 4).reshape(4, 64, 128)
    keys[:, ::32] *= factor
    errors = []
    for codec in (INT2, TokenNormCodec(INT2)):
        decoded = codec.decode(codec.encode(keys), torch.float32)
        errors.append(float(((decoded - keys).square().sum(-1) / keys.square().sum(-1)).mean()))
    assert errors[1] < 0.2 < 5 * errors[1] < errors[0]


@settings(deadline=None, max_examples=40)
@given(
    over=st.sampled_from(["site", "head"]),
    norm=st.sampled_from(["l2", "max", "mean"]),
    token=st.integers(0, 31),
    factor=st.floats(1e-3, 1e3),
)
def test_scaling_a_token_changes_its_norm_and_no_code(over, norm, token, factor):
    codec = TokenNormCodec(IntCodec(bits=4, axis="channel"), over, norm)
    keys = normal_vectors(2 * 32, 16).reshape(2, 32, 16).double()
    scaled = keys.clone()
    scaled[:, token] *= factor
    before, after = codec.encode(keys), codec.encode(scaled)
    # Rounding of the division may move a value across the middle between two codes.
    same = (before["codes"] == after["codes"]).float().mean()
    assert same > 0.99
    ratio = after["norm"].double() / before["norm"].double()
    expected = torch.ones_like(ratio)
    expected[:, token] = factor
    assert torch.allclose(ratio, expected, rtol=2e-3)


@pytest.mark.parametrize("factor", [0.25, 8.0])
def test_powers_of_two_leave_every_code_as_it_is(factor):
    keys = normal_vectors(2 * 32, 16).reshape(2, 32, 16)
    scaled = keys.clone()
    scaled[:, 7] *= factor
    codec = TokenNormCodec(INT2)
    before, after = codec.encode(keys), codec.encode(scaled)
    for name in ("codes", "scale", "zero"):
        assert torch.equal(before[name], after[name])
    assert not torch.equal(INT2.encode(keys)["scale"], INT2.encode(scaled)["scale"])  # near miss


def test_the_error_of_a_block_is_bounded_by_its_steps():
    keys = normal_vectors(4 * 32).reshape(4, 32, 128)
    planes = TokenNormCodec(INT2).encode(keys)
    norms = torch.linalg.vector_norm(keys, dim=(0, 2)).reshape(1, 32, 1)
    error = (INT2.decode(planes, torch.float32) - keys / norms).square().sum((-2, -1))
    bound = 32 * planes["scale"].float().square().sum((-2, -1)) / 4
    assert bool((error <= bound * 1.001).all())


@pytest.mark.parametrize("over", ["site", "head"])
def test_an_exact_inner_codec_leaves_only_the_rounding_of_norms(over):
    codec = TokenNormCodec(make_codec({"codec": "none"}), over)
    keys = normal_vectors(3 * 8, 16).reshape(3, 8, 16) * torch.logspace(-3, 3, 8)[:, None]
    assert torch.allclose(codec.decode(codec.encode(keys), torch.float32), keys, rtol=2**-10)


def test_one_norm_for_all_heads_is_stored_once():
    keys = normal_vectors(2 * 4 * 32, 64).reshape(2, 4, 32, 64)
    together, alone = TokenNormCodec(INT2), TokenNormCodec(INT2, "head")
    assert (together.is_headwise, alone.is_headwise) == (False, True)
    for codec in (together, alone):
        check_planes(codec, keys)
    norm = together.encode(keys)["norm"]
    assert torch.equal(norm, keys.square().sum((1, 3)).sqrt()[:, None, :, None].half())
    assert together.bits_per_value(64, 4) == 3 + 16 / 256
    assert alone.bits_per_value(64, 4) == 3 + 16 / 64


def test_zero_and_huge_tokens_stay_finite():
    keys = normal_vectors(2 * 32, 16).reshape(2, 32, 16)
    keys[:, 3], keys[:, 4] = 0, 1e30
    codec = TokenNormCodec(INT2)
    decoded = codec.decode(codec.encode(keys), torch.float32)
    assert decoded.isfinite().all()


def test_a_codec_that_is_fitted_sees_normalised_tokens():
    codec = make_codec(
        {"codec": "token-norm", "inner": {"codec": "nuq", "bits": 2, "axis": "channel"}}
    )
    assert codec.needs_calibration
    keys = normal_vectors(2 * 256, 16).reshape(2, 256, 16)
    fitted = [codec.fit(CodecSamples(keys * scale)) for scale in (1.0, 8.0)]
    assert fitted[0] == fitted[1] != codec
    assert make_codec(fitted[0].to_dict()) == fitted[0]


def test_options_that_cannot_be_are_refused():
    nested = {"codec": "token-norm", "inner": {"codec": "token-norm"}}
    for spec, word in (
        ({"codec": "token-norm", "over": "layer"}, "site or head"),
        ({"codec": "token-norm", "norm": "l1"}, "l2, max or mean"),
        ({"codec": "token-norm", "inner": "int"}, "inner must be a codec"),
        (nested, "must not store norms"),
    ):
        with pytest.raises(RecipeError, match=rf"KVX107.*codec token-norm.*{word}"):
            make_codec(spec)
    with pytest.raises(PassError, match=r"KVX203"):
        TokenNormCodec(IntCodec(bits=3)).check(20)
