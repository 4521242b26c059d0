"""Calibration: what the source model computes on a text, as statistics of every attention site.

Passes and codecs read it; `kvxform.calibrate` makes it. Everything is in the basis of the source
model: what its own q, k and v projections give, before any pass has changed them. A pass that
works in another basis takes `StreamStatistics.in_basis`.

All tensors are on the CPU. Shapes: `Hk` KV heads (`H` query heads in streams of q), `D` channels,
`N` sampled tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, eq=False)
class StreamStatistics:
    """One stream of one site over all calibration tokens, and some of its vectors.

    Attributes:
        count: Tokens behind the moments.
        mean: E[x], float64 `[Hk, D]`.
        gram: E[x x^T], float64 `[Hk, D, D]`; not centred.
        low: Smallest value of each channel, float32 `[Hk, D]`.
        high: Largest value of each channel, float32 `[Hk, D]`.
        samples: Vectors of the sampled tokens, float32 `[Hk, N, D]`; the tokens are the same in
            all streams of all layers, in the order of the text.
        positions: Position of each sampled token in its window, int64 `[N]`.
        gradients: Gradient of the summed next-token cross entropy of a window with respect to
            each sample, float32 `[Hk, N, D]`, or None if no pass asked for it.
        first: E[x] of the first token of a window, which much of attention often goes to, float32
            `[Hk, D]`; None if it was not collected.
    """

    count: int
    mean: Tensor
    gram: Tensor
    low: Tensor
    high: Tensor
    samples: Tensor
    positions: Tensor
    gradients: Tensor | None = None
    first: Tensor | None = None

    @property
    def covariance(self) -> Tensor:
        """E[(x - mean) (x - mean)^T], float64 `[Hk, D, D]`."""
        return self.gram - self.mean[..., :, None] * self.mean[..., None, :]

    @property
    def fisher(self) -> Tensor | None:
        """Squared gradients at the samples, float32 `[Hk, N, D]`: Fisher's diagonal.

        Source: KVQuant, arXiv 2401.18079, section 3.3.
        """
        return None if self.gradients is None else self.gradients.square()

    def in_basis(self, matrix: Tensor) -> StreamStatistics:
        """Return the statistics of `x @ matrix`, for an orthogonal matrix.

        `low` and `high` come from the samples alone: extremes of all tokens cannot be turned.

        Args:
            matrix: `[D, D]`, or one for each head `[Hk, D, D]`; any float dtype.
        """
        exact = matrix.to(self.gram)
        single = matrix.to(self.samples)
        samples = self.samples @ single
        return dataclasses.replace(
            self,
            mean=(self.mean[..., None, :] @ exact)[..., 0, :],
            gram=exact.mT @ self.gram @ exact,
            low=samples.amin(-2),
            high=samples.amax(-2),
            samples=samples,
            gradients=None if self.gradients is None else self.gradients @ single,
            first=None if self.first is None else (self.first[..., None, :] @ single)[..., 0, :],
        )


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """The streams of one attention site.

    Attributes:
        k_post: Keys as attention gets them, after RoPE if there is one.
        v: Values.
        q_post: Queries as attention gets them, `H` heads.
        v_weighted: E over queries of `sum_t p_t v_t v_t^T`, p the attention probabilities: which
            directions of V reach the output. Mean over the query heads of a KV head; float64
            `[Hk, D, D]`.
        envelope: Largest magnitude of each channel of the keys at any position, float32 `[Hk, D]`:
            the largest radius of the pair that RoPE turns, or the largest value of a channel that
            it leaves alone.
        k_pre: Keys before RoPE; None without RoPE, or where it turns a part of the key alone.
        q_pre: Queries before RoPE, likewise.
    """

    k_post: StreamStatistics
    v: StreamStatistics
    q_post: StreamStatistics
    v_weighted: Tensor
    envelope: Tensor
    k_pre: StreamStatistics | None = None
    q_pre: StreamStatistics | None = None

    @property
    def k_fisher(self) -> Tensor | None:
        """Squared gradients at the samples of `k_post`, or None."""
        return self.k_post.fisher

    @property
    def v_fisher(self) -> Tensor | None:
        """Squared gradients at the samples of `v`, or None."""
        return self.v.fisher

    def rotary_envelope(self) -> Tensor:
        """Return `envelope`, float32 `[Hk, D]`: bounds that hold at positions never calibrated."""
        return self.envelope


@dataclass(frozen=True, eq=False)
class Calibration:
    """Statistics of a model on a text.

    Attributes:
        name: What was read, for reports and plans: text, tokens, window, seed.
        token_ids: The text, int64 `[windows, window]`; each row is a sequence of its own.
        layers: Statistics by the layer of the site.
        inputs: E[|x|] of each channel of what K and V are projected from, float64 `[in]`, by the
            name of the weight.
    """

    name: str
    token_ids: Tensor
    layers: Mapping[int, LayerStatistics]
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def has_gradients(self) -> bool:
        """Whether gradients were collected."""
        return all(layer.v.gradients is not None for layer in self.layers.values())
