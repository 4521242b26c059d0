"""What an explanation says, as plain records; `text` prints them, `to_data` gives them as JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from kvxform.explain.pass_records import FINE, PassFinding
from kvxform.ir.program import RejectedSite

EXPLANATION_VERSION = 1


@dataclass(frozen=True)
class NormRecord:
    """One norm beside an attention.

    Attributes:
        role: `input`, `input of q`, `input of k`, `input of v`, `q`, `k`, `v` or `output`.
        kind: `RMSNorm` or `LayerNorm`.
        eps: Added to the mean square or the variance.
        size: Channels that are normalised together.
        gain: Weight of the gain, or None.
        offset: Added to the gain (Gemma stores gain - 1).
        bias: Weight of the bias, or None.
        place: For q, k and v: `per head` or `across heads`, and the side of RoPE; else empty.
    """

    role: str
    kind: str
    eps: float
    size: int
    gain: str | None = None
    offset: float = 0.0
    bias: str | None = None
    place: str = ""


@dataclass(frozen=True)
class RopeRecord:
    """Rotary embedding of a site.

    Attributes:
        rotary_dim: Channels that turn.
        pairs: `half` or `interleaved`.
        inv_freq: Weight of the frequencies.
        frequencies: `geometric`, `table` if they are no geometric series, or `unknown`.
        theta: Base of the geometric series, or None.
        linear_factor: Positions are divided by it (linear scaling); 1 if they are not.
        attention_scaling: Factor of cosine and sine.
    """

    rotary_dim: int
    pairs: str
    inv_freq: str
    frequencies: str
    theta: float | None = None
    linear_factor: float = 1.0
    attention_scaling: float = 1.0


@dataclass(frozen=True)
class WeightRecord:
    """Where the heads of q, k, v or o stand in a weight.

    Head h takes `head_dim` entries from `start + h * head_stride` on `axis`. Both are None where
    more than a choice of channels happens between the linear layer and the heads: a norm, a sum.

    Attributes:
        weight: Name of the matrix.
        shape: Its shape.
        bias: Name of the bias, or None.
        layout: `out_in` (nn.Linear) or `in_out` (Conv1D of GPT-2).
        axis: `rows` or `columns`.
        heads: Number of heads.
        head_dim: Channels of one.
        start: First entry of head 0.
        head_stride: Distance between heads.
    """

    weight: str
    shape: tuple[int, ...]
    bias: str | None
    layout: str
    axis: str
    heads: int
    head_dim: int
    start: int | None = None
    head_stride: int | None = None


@dataclass(frozen=True)
class LatentRecord:
    """K and V of all heads are made from one narrow vector per token (DeepSeek MLA).

    Attributes:
        rank: Channels of the vector.
        rope_dim: Channels of the part of a key that all heads share.
        up_k: What makes the other channels of the keys.
        up_v: What makes the values.
    """

    rank: int
    rope_dim: int
    up_k: WeightRecord
    up_v: WeightRecord


@dataclass(frozen=True)
class SiteRecord:
    """One attention that was raised.

    Attributes:
        layer: Layer index of the program.
        module: Path of the source module.
        origin: Op and source line of the attention.
        num_q_heads: Query heads.
        num_kv_heads: KV heads.
        group: Query heads that share one KV head.
        head_dim: Channels of q and k.
        v_head_dim: Channels of v.
        scale: Factor of the scores.
        is_default_scale: Whether `scale` is 1 / sqrt(head_dim).
        causal: Whether later tokens are masked.
        window: Sliding window in tokens, or None.
        chunk: Length of chunks that see only themselves, or None.
        softcap: Softcap of the scores, or None.
        sink_logits: Weight of the sink logits, or None.
        alibi_slopes: Weight of the ALiBi slopes, or None.
        rope: Rotary embedding, or None.
        keeps_positions: Whether q or k still pass through other code that reads positions.
        norms: Norms before, inside and after.
        q: Where queries come from; None if not from a linear layer. Likewise k, v.
        k: Keys.
        v: Values.
        o: What reads the heads.
        latent: The vector that K and V of all heads are made from, or None.
        owner: Layer whose keys and values this one reads; itself unless layers share.
        notes: What was left in the graph as it is, and why.
    """

    layer: int
    module: str
    origin: str
    num_q_heads: int
    num_kv_heads: int
    group: int
    head_dim: int
    v_head_dim: int
    scale: float
    is_default_scale: bool
    causal: bool
    window: int | None
    chunk: int | None
    softcap: float | None
    sink_logits: str | None
    alibi_slopes: str | None
    rope: RopeRecord | None
    keeps_positions: bool
    norms: tuple[NormRecord, ...]
    q: WeightRecord | None
    k: WeightRecord | None
    v: WeightRecord | None
    o: WeightRecord | None
    latent: LatentRecord | None
    owner: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """What was found in a model, and what passes find in it.

    Attributes:
        model: What the user called it.
        family: Model family, or empty if capture failed.
        dtype: Compute dtype by torch name, or empty.
        sites: Attentions that were raised.
        rejected: Candidates that were left alone.
        passes: Passes that were asked for, in their order.
        failure: Why the whole model cannot be captured, or empty.
        version: Version of this form.
    """

    model: str
    family: str = ""
    dtype: str = ""
    sites: tuple[SiteRecord, ...] = ()
    rejected: tuple[RejectedSite, ...] = ()
    passes: tuple[PassFinding, ...] = ()
    failure: str = ""
    version: int = EXPLANATION_VERSION

    @property
    def is_fine(self) -> bool:
        """Whether attention was found and every pass that was asked for can run."""
        return not self.failure and all(p.state in FINE for p in self.passes)

    def to_data(self) -> dict[str, Any]:
        """Return plain data: everything, layer by layer."""
        return dataclasses.asdict(self)

    def to_text(self) -> str:
        """Return text for people; layers that are alike are folded."""
        from kvxform.explain.text import format_explanation  # it reads these records

        return format_explanation(self)
