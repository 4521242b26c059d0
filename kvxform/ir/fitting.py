"""What a codec of a stream is fitted on: calibration samples as the stream stores them."""

from __future__ import annotations

import torch
from torch import Tensor

from kvxform.codecs.base import Codec, CodecSamples
from kvxform.codecs.basis import Basis
from kvxform.codecs.static_int import StaticIntCodec
from kvxform.errors import PassError
from kvxform.ir.calibration import StreamStatistics
from kvxform.ir.program import AttentionSite, Program
from kvxform.ir.rotary import rotary_table, turn_pairs
from kvxform.ir.stream_plan import StreamPlan

LONGEST_CONTEXT = 32768  # tokens, for models that name no limit


def codec_samples(program: Program, layer: int, name: str, stream: StreamPlan) -> CodecSamples:
    """Return calibration samples of one stream in its stored basis, on its side of RoPE.

    Args:
        program: A program with a calibration; dense bases are among its weights.
        layer: Layer that owns the stream.
        name: `key` or `value`.
        stream: How the stream is stored.

    Raises:
        PassError: KVX205 if the calibration has no such values: of a latent, or of keys before
            RoPE where it turns a part of them alone.
    """
    assert program.calibration is not None, "the pipeline has collected one"
    site = program.site(layer)
    if site.payload == "residual":
        rule = "codecs are fitted on K and V of heads; a calibration knows no residual stream"
        hint = "use a codec without calibration, such as int"
        raise PassError("KVX205", rule, at=site.module, hint=hint)
    if site.payload == "latent":
        rule = "codecs are fitted on K and V of heads; a calibration knows no latents"
        raise PassError("KVX205", rule, at=site.module, hint="leave cache-latent out")
    layer_statistics = program.calibration.layers[layer]
    statistics = stream_statistics(program, layer, name, stream.rope)
    basis, fisher = stream.basis, None
    if statistics.gradients is not None:
        fisher = basis.rotate_gradient(statistics.gradients, program.weights).square()
    elsewhere, envelope = None, None
    if name == "key" and stream.rope == "post":
        elsewhere = _at_other_positions(program, site, statistics)
        if basis.kind == "identity":
            envelope = layer_statistics.rotary_envelope()
    return CodecSamples(
        basis.rotate(statistics.samples, program.weights),
        fisher,
        envelope,
        None if elsewhere is None else basis.rotate(elsewhere, program.weights),
        _first_token(program, statistics, basis),
    )


def _first_token(program: Program, statistics: StreamStatistics, basis: Basis) -> Tensor | None:
    if statistics.first is None:
        return None
    return basis.rotate(statistics.first[:, None], program.weights)[:, 0]


def turned_channels(site: AttentionSite) -> slice:
    """Return which channels of a key RoPE turns; the site has one."""
    assert site.rope is not None, "the site has RoPE"
    is_last = site.latent is not None and not site.latent.shared_first
    first = site.head_dim - site.rope.rotary_dim if is_last else 0
    return slice(first, first + site.rope.rotary_dim)


def _at_other_positions(
    program: Program, site: AttentionSite, statistics: StreamStatistics
) -> Tensor | None:
    """Return samples of keys after RoPE, turned on to positions drawn over the whole context."""
    if site.rope is None:
        return None
    generator = torch.Generator().manual_seed(0)
    context = program.info.context_length or LONGEST_CONTEXT
    drawn = torch.randint(context, statistics.positions.shape, generator=generator)
    inv_freq = program.weights[site.rope.inv_freq].cpu().double()
    table = rotary_table(drawn - statistics.positions, inv_freq, 1.0, torch.float32)
    x, own = statistics.samples.clone(), turned_channels(site)
    x[..., own] = turn_pairs(x[..., own], table, interleaved=site.rope.interleaved)
    return x


def stream_statistics(program: Program, layer: int, name: str, rope: str) -> StreamStatistics:
    """Return the statistics of one stream of a layer, as the source model computes it.

    Args:
        program: A program with a calibration.
        layer: Layer that owns the stream.
        name: `key` or `value`.
        rope: Whether keys are meant before RoPE (`pre`).

    Raises:
        PassError: KVX205, see `codec_samples`.
    """
    assert program.calibration is not None, "the pipeline has collected one"
    statistics = program.calibration.layers[layer]
    if name == "value":
        return statistics.v
    if rope != "pre":
        return statistics.k_post
    if statistics.k_pre is None:
        rule = "codecs of keys before RoPE can be fitted only where RoPE turns whole keys"
        at = program.site(layer).module
        raise PassError("KVX205", rule, at=at, hint="cache keys after RoPE")
    return statistics.k_pre


def check_codec(codec: Codec, num_heads: int, head_dim: int, where: str, at: str) -> None:
    """Refuse a codec that cannot take heads of `head_dim`, or has constants of other heads.

    Args:
        codec: The codec.
        num_heads: KV heads of the site.
        head_dim: Channels of what it will encode.
        where: Pass that asks, for the error text.
        at: Where in the model, likewise.

    Raises:
        PassError: KVX203.
    """
    try:
        codec.check(head_dim)
        if isinstance(codec, StaticIntCodec):
            codec.check_heads(num_heads, head_dim)
    except PassError as error:
        raise PassError(
            error.code, error.rule, where=where, got=error.got, at=at, hint=error.hint
        ) from error
