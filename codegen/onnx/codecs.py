"""Codecs as ONNX nodes: importing this module fills the registry of emitters.

- `codec_base`: what an emitter is, the registry
- `codec_bytes`: codes in bytes
- `codec_exact`: codec `none`
- `codec_int`: codec `int`
"""

from __future__ import annotations

from kvxform.codecs.base import make_codec
from kvxform.codegen.onnx import codec_exact, codec_int
from kvxform.codegen.onnx.codec_base import CODEC_EMITTERS, CodecEmitter, emitter_of
from kvxform.ir.plan import StreamPlan

__all__ = ["CODEC_EMITTERS", "EMITTER_MODULES", "codec_emitter"]

EMITTER_MODULES = (codec_exact, codec_int)  # they fill CODEC_EMITTERS


def codec_emitter(plan: StreamPlan) -> CodecEmitter:
    """Return the emitter of the codec of a stream; `capability` has checked that there is one."""
    return emitter_of(make_codec(plan.codec), plan.head_dim)
