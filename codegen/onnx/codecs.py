"""Codecs as ONNX nodes: importing this module fills the registry of emitters.

- `codec_base`: what an emitter is, the registry
- `codec_bytes`, `codec_radix`: codes in bytes
- `codec_scales`, `codec_lookup`, `codec_runs`: scales; nearest entries of tables; runs of channels
- `codec_exact`, `codec_int`, `codec_fp8`, `codec_static_int`: values on their own or in groups
- `codec_directions`: one norm a vector, and a table for its direction: `codec_lloyd_max`,
  `codec_fib_vq`, `codec_octahedral`
- `codec_polar`, `codec_nuq`: angles; levels in ranges
- `codec_klt`, `codec_klt_trellis`: components of unequal bits
- `codec_token_norm`, `codec_outliers`, `codec_low_rank`, `codec_saliency`,
  `codec_truncate`: around other codecs
"""

from __future__ import annotations

from kvxform.codecs.base import make_codec
from kvxform.codegen.onnx import (
    codec_exact,
    codec_fib_vq,
    codec_fp8,
    codec_int,
    codec_klt,
    codec_klt_trellis,
    codec_lloyd_max,
    codec_low_rank,
    codec_nuq,
    codec_octahedral,
    codec_outliers,
    codec_polar,
    codec_saliency,
    codec_static_int,
    codec_token_norm,
    codec_truncate,
)
from kvxform.codegen.onnx.codec_base import CODEC_EMITTERS, CodecEmitter, emitter_of
from kvxform.ir.stream_plan import StreamPlan

__all__ = ["CODEC_EMITTERS", "EMITTER_MODULES", "codec_emitter"]

EMITTER_MODULES = (  # they fill CODEC_EMITTERS
    codec_exact,
    codec_fib_vq,
    codec_fp8,
    codec_int,
    codec_klt,
    codec_klt_trellis,
    codec_lloyd_max,
    codec_low_rank,
    codec_nuq,
    codec_octahedral,
    codec_outliers,
    codec_polar,
    codec_saliency,
    codec_static_int,
    codec_token_norm,
    codec_truncate,
)


def codec_emitter(plan: StreamPlan) -> CodecEmitter:
    """Return the emitter of the codec of a stream; `capability` has checked that there is one."""
    return emitter_of(make_codec(plan.codec), plan.head_dim)
