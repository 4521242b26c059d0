"""What a codec of a stream is fitted on: calibration samples as the stream stores them."""

from __future__ import annotations

from kvxform.codecs.base import CodecSamples
from kvxform.errors import PassError
from kvxform.ir.calibration import LayerStatistics, StreamStatistics
from kvxform.ir.plan import StreamPlan
from kvxform.ir.program import Program


def codec_samples(program: Program, layer: int, name: str, stream: StreamPlan) -> CodecSamples:
    """Return calibration samples of one stream in its stored basis, on its side of RoPE.

    Args:
        program: A program with a calibration; dense bases are among its weights.
        layer: Layer that owns the stream.
        name: `key` or `value`.
        stream: How the stream is stored.

    Raises:
        PassError: KVX205 if the calibration has no such keys, because RoPE turns a part of them
            alone.
    """
    assert program.calibration is not None, "the pipeline has collected one"
    layer_statistics = program.calibration.layers[layer]
    statistics = _statistics(layer_statistics, name, stream, program.site(layer).module)
    fisher = None
    if statistics.gradients is not None:  # gradients turn as values do
        fisher = stream.basis.rotate(statistics.gradients, program.weights).square()
    is_plain_key = name == "key" and stream.rope == "post" and stream.basis.kind == "identity"
    return CodecSamples(
        stream.basis.rotate(statistics.samples, program.weights),
        fisher,
        layer_statistics.rotary_envelope() if is_plain_key else None,
    )


def _statistics(
    layer: LayerStatistics, name: str, stream: StreamPlan, module: str
) -> StreamStatistics:
    if name == "value":
        return layer.v
    if stream.rope != "pre":
        return layer.k_post
    if layer.k_pre is None:
        rule = "codecs of keys before RoPE can be fitted only where RoPE turns whole keys"
        raise PassError("KVX205", rule, at=module, hint="cache keys after RoPE")
    return layer.k_pre
