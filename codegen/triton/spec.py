"""What a kernel is generated from: frozen data, with everything that its text depends on.

One spec gives one file. Specs hold no tensors and no device; what changes from call to call
(lengths, pages, scale) is an argument of the launcher instead.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from kvxform.codecs.base import PlaneSpec, make_codec
from kvxform.codecs.exact import ExactCodec
from kvxform.codecs.packing import packed_bytes
from kvxform.codegen.triton.formats import codec_fields
from kvxform.ir.plan import SitePlan
from kvxform.ir.stream_plan import StreamPlan

PAGE_LAYOUTS = ("rows", "fragment")


@dataclass(frozen=True)
class StreamSpec:
    """How the K or the V half of a site is stored, as far as a kernel must know.

    A stored value is `norm * (scale * f(code) + offset)`: f is the identity or a table, the norm
    is 1 unless `token_norm` or `gain`, the scale is 1 with `gain`, the offset is that of codec
    `int` (none with a table).

    Attributes:
        head_dim: Channels of one head, D.
        bits: 2, 3, 4, 6 or 8 for codes; 16 or 32 for plain values.
        dtype: Dtype of plain values by torch name; empty for codes.
        axis: `token`: channels of one token share a scale. `channel`: tokens of one channel do.
        group: Channels (axis token) or tokens (axis channel) that share a scale.
        symmetric: Codes around 2^(bits - 1), without a stored zero point.
        zero: Zero point as an integer code (`int`) or as the value to add (`float`).
        clip: Factor of the extremes of a group when it is encoded.
        include_zero: The range of a group is widened to contain zero.
        token_norm: Each token was divided by its norm first, and the norm is a plane: that of each
            `head`, or of all KV heads of the `site` (OScaR). Empty for no norm.
        table: Values of the codes, `block` numbers for each, or empty for f(code) = code. The
            2^bits values of single channels are in rising order.
        block: Neighbouring channels that share a code.
        gain: The norm of each head is stored in place of a scale, and the table holds directions;
            which factor is stored is said by `kvxform.codecs.directions`. Empty for no such codec.
        sink: First tokens that stay exact.
        keep: Newest tokens that stay exact.
        chunk: Tokens that become codes at a time.
        exact_dtype: Dtype of exact tokens by torch name; empty if there are none.
    """

    head_dim: int
    bits: int
    dtype: str = ""
    axis: Literal["token", "channel"] = "token"
    group: int = 0
    symmetric: bool = False
    zero: Literal["int", "float"] = "int"
    clip: float = 1.0
    include_zero: bool = False
    token_norm: Literal["", "head", "site"] = ""
    table: tuple[float, ...] = ()
    block: int = 1
    gain: Literal["", "norm", "corrected", "projected"] = ""
    sink: int = 0
    keep: int = 0
    chunk: int = 1
    exact_dtype: str = ""

    @classmethod
    def of(cls, stream: StreamPlan) -> StreamSpec:
        """Return the spec of a stream with a codec that `capability` has accepted."""
        keep, chunk = stream.keep_and_chunk
        has_exact = stream.regions.sink > 0 or keep + chunk > 1
        common: dict[str, Any] = {
            "head_dim": stream.head_dim,
            "sink": stream.regions.sink,
            "keep": keep,
            "chunk": chunk,
            "exact_dtype": stream.regions.dtype if has_exact else "",
        }
        codec = make_codec(stream.codec)
        if isinstance(codec, ExactCodec):
            (plane,) = stream.planes
            bits = plane.torch_dtype.itemsize * 8
            return cls(bits=bits, dtype=plane.dtype, group=stream.head_dim, **common)
        return cls(**codec_fields(codec, stream.head_dim), **common)

    @property
    def is_coded(self) -> bool:
        """Whether codes are stored, not values."""
        return not self.dtype

    @property
    def has_scale(self) -> bool:
        """Whether scales are stored."""
        return self.is_coded and not self.gain

    @property
    def has_norm(self) -> bool:
        """Whether norms of tokens are stored."""
        return bool(self.token_norm or self.gain)

    @property
    def has_zero(self) -> bool:
        """Whether zero points are stored."""
        return self.is_coded and not self.symmetric and not self.table

    @property
    def is_plain(self) -> bool:
        """Whether every token goes to its page at once."""
        return (self.sink, self.keep, self.chunk) == (0, 0, 1)

    @property
    def capacity(self) -> int:
        """Tokens of the ring of exact recent tokens."""
        return self.keep + self.chunk - 1

    @property
    def tokens_per_group(self) -> int:
        """Tokens that are encoded together."""
        return self.group if self.is_coded and self.axis == "channel" else 1

    @property
    def planes(self) -> tuple[PlaneSpec, ...]:
        """Planes of the body, of one head; names and widths are those of the codec."""
        if not self.is_coded:
            return (PlaneSpec("value", self.dtype, self.head_dim),)
        rows = self.tokens_per_group
        width = self.head_dim // self.group if self.axis == "token" else self.head_dim
        planes = [PlaneSpec("codes", "uint8", packed_bytes(self.num_codes, self.bits))]
        if self.has_scale:
            planes.append(PlaneSpec("scale", "float16", width, rows))
        if self.has_zero:
            planes.append(PlaneSpec("zero", "float16", width, rows))
        if self.has_norm:
            planes.append(PlaneSpec("norm", "float16", 1, shared=self.token_norm == "site"))
        return tuple(planes)

    @property
    def num_codes(self) -> int:
        """Codes of a token of one head."""
        return self.head_dim // self.block

    def bytes_per_token(self, num_kv_heads: int) -> float:
        """Stored bytes of one encoded token, all heads, metadata included."""
        return sum(plane.bytes_per_token(num_kv_heads) for plane in self.planes)


@dataclass(frozen=True)
class SiteSpec:
    """Geometry and storage of one attention site; part of the spec of all its kernels.

    Attributes:
        num_q_heads: Query heads, H.
        num_kv_heads: KV heads, Hk.
        key: The K stream.
        value: The V stream.
        page_size: Tokens a page.
        layout: How pages are laid out: `rows` keeps the planes of the codec, `fragment` keeps
            words in the order in which tensor cores take them (docs/adr/0008-triton-decode.md).
        dtype: Dtype of q, new k and v, and of outputs, by torch name.
    """

    num_q_heads: int
    num_kv_heads: int
    key: StreamSpec
    value: StreamSpec
    page_size: int
    layout: Literal["rows", "fragment"]
    dtype: str

    @classmethod
    def of(
        cls, site: SitePlan, page_size: int, layout: Literal["rows", "fragment"], dtype: str
    ) -> SiteSpec:
        """Return the spec of a planned site whose K and V are both stored."""
        assert isinstance(site.value, StreamPlan), "checked by `capability`"
        key, value = StreamSpec.of(site.key), StreamSpec.of(site.value)
        return cls(site.num_q_heads, site.num_kv_heads, key, value, page_size, layout, dtype)

    @property
    def groups(self) -> int:
        """Query heads that share a KV head, G."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def streams(self) -> dict[str, StreamSpec]:
        """`key` and `value`."""
        return {"key": self.key, "value": self.value}

    @property
    def has_exact(self) -> bool:
        """Whether any token is kept exact, in buffers beside the pages."""
        return any(st.sink or st.capacity for st in self.streams.values())

    @property
    def bytes_per_token(self) -> float:
        """Stored bytes of one encoded token, all heads, K and V."""
        return sum(st.bytes_per_token(self.num_kv_heads) for st in self.streams.values())


@dataclass(frozen=True)
class RopeSpec:
    """RoPE of new keys, applied by the append kernel.

    Attributes:
        rotary_dim: Channels that turn, counted from the first.
        interleaved: Pairs are (2i, 2i + 1) instead of (i, i + rotary_dim / 2).
    """

    rotary_dim: int
    interleaved: bool = False


@dataclass(frozen=True)
class KernelSpec:
    """Base of the specs of kernels; `kind` names the kernel and its module."""

    kind: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """Return plain data, the kind included."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class AppendSpec(KernelSpec):
    """Spec of `append`: rotate, quantise, pack and write new K and V into pages.

    Attributes:
        site: What is stored.
        rope: RoPE that is applied to new keys first, or None.
        key_block: Hadamard block that new keys are rotated with, after RoPE; 0 for none.
        has_signs: Channels of keys are multiplied by signs before the Hadamard.
    """

    kind: ClassVar[str] = "append"
    site: SiteSpec
    rope: RopeSpec | None = None
    key_block: int = 0
    has_signs: bool = False


@dataclass(frozen=True)
class DecodeSpec(KernelSpec):
    """Spec of `decode`: attention of one new query a sequence over what the pages hold.

    Attributes:
        site: What is stored.
        query_block: Hadamard block that queries are rotated with; 0 for none.
        has_signs: Channels of queries are multiplied by signs before the Hadamard.
        window: Sliding window in tokens, or None.
        chunk: Length of chunks that see only themselves, or None.
        softcap: Cap of scaled scores, or None.
        has_sink_logits: One more softmax column per head, without a value.
        has_alibi: ALiBi slopes are given.
        has_slot_bias: A bias per KV head and cached token is added to scores.
        has_lse: The log-sum-exp of scores is written too.
    """

    kind: ClassVar[str] = "decode"
    site: SiteSpec
    query_block: int = 0
    has_signs: bool = False
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    has_sink_logits: bool = False
    has_alibi: bool = False
    has_slot_bias: bool = False
    has_lse: bool = False


@dataclass(frozen=True)
class GatherSpec(KernelSpec):
    """Spec of `gather`: pages and exact buffers to dense K and V.

    Attributes:
        site: What is stored.
    """

    kind: ClassVar[str] = "gather"
    site: SiteSpec


@dataclass(frozen=True)
class PrefillSpec(KernelSpec):
    """Spec of `prefill`: causal attention of many new queries over dense K and V.

    Attributes:
        num_q_heads: Query heads.
        num_kv_heads: KV heads.
        key_dim: Channels of q and K.
        value_dim: Channels of V.
        dtype: Dtype of q, K, V and the output, by torch name.
        key_sink: First tokens of K that every query reads exact; likewise `value_sink`.
        key_keep: Newest tokens of K that stay exact; likewise `value_keep`.
        key_chunk: Tokens of K that become codes at a time; likewise `value_chunk`.
        for_hopper: Write it for Hopper: a warp loads, two groups of warps multiply. Only for specs
            that `prefill_hopper` can express.
        query_block: As in `DecodeSpec`, as are the rest.
    """

    kind: ClassVar[str] = "prefill"
    num_q_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: str
    key_sink: int = 0
    key_keep: int = 0
    key_chunk: int = 1
    value_sink: int = 0
    value_keep: int = 0
    value_chunk: int = 1
    for_hopper: bool = False
    query_block: int = 0
    has_signs: bool = False
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    has_sink_logits: bool = False
    has_alibi: bool = False
    has_lse: bool = False


@dataclass(frozen=True)
class ColumnScoresSpec(KernelSpec):
    """Spec of `column_scores`: attention that each cached token got, summed over queries.

    Attributes:
        num_q_heads: Query heads.
        num_kv_heads: KV heads; query heads of one of them are summed too.
        head_dim: Channels of q and K.
        dtype: Dtype of q and K, by torch name.
        window: As in `DecodeSpec`, as are the rest.
    """

    kind: ClassVar[str] = "column_scores"
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    has_alibi: bool = False
