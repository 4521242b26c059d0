"""Where means that a codec takes away can be left to the graph around attention; see `centers`."""

from __future__ import annotations

from kvxform.codecs.base import make_codec
from kvxform.codecs.static_int import StaticIntCodec
from kvxform.ir.plan import SitePlan
from kvxform.ir.program import Program
from kvxform.ir.stream_plan import StreamPlan


def has_center(stream: StreamPlan) -> bool:
    """Whether the codec of a stream takes means away."""
    codec = make_codec(stream.codec)
    return isinstance(codec, StaticIntCodec) and codec.center


def are_centers_free(program: Program, site: SitePlan) -> bool:
    """Whether scores of a site have neither a softcap nor a sink, or its streams no means."""
    options = program.attention_node(site.layer).kwargs
    is_plain = not options.get("softcap") and program.site(site.layer).sink_logits is None
    return is_plain or not any(map(has_center, site.streams.values()))
