"""How a candidate says that it is something else, and how far it got before."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from kvxform.ir.program import RopeSpec

STEPS = ("core", "mask", "operands", "rope", "proof")  # of raising one attention, in order


class NotRaisedError(Exception):
    """A candidate is left alone.

    Args:
        reason: Why, without a full stop.
        node: The first node that differs from what was expected, if one can be named.
        hint: What would have to change in the model, or empty.
    """

    def __init__(self, reason: str, *, node: fx.Node | None = None, hint: str = "") -> None:
        super().__init__(reason)
        self.reason, self.node, self.hint = reason, node, hint


class Trace:
    """What has been proven of one candidate, in the order of `STEPS`.

    A step is its name and what was found: `mask: causal, window 5`.
    """

    def __init__(self) -> None:
        self._steps: list[str] = []

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps so far."""
        return tuple(self._steps)

    def note_core(self, scale: float, softcap: float | None) -> None:
        """Two products with a softmax between them were found."""
        cap = "" if softcap is None else f", softcap {softcap:g}"
        self._steps.append(f"core: softmax of scores with scale {scale:.6g}{cap}")

    def note_mask(self, window: int | None, chunk: int | None, *, has_slopes: bool) -> None:
        """The mask was classified by its values."""
        parts = ["mask: causal"]
        parts += [] if window is None else [f"window {window}"]
        parts += [] if chunk is None else [f"chunks of {chunk}"]
        parts += ["ALiBi slopes"] if has_slopes else []
        self._steps.append(", ".join(parts))

    def note_operands(self, q: Sequence[int], k: Sequence[int]) -> None:
        """Heads of q, k and v were traced; `q` and `k` are `[heads, head_dim]`."""
        self._steps.append(f"operands: {q[0]} query heads, {k[0]} KV heads, head_dim {q[1]}")

    def note_rope(self, rope: RopeSpec | None, left: str) -> None:
        """A rotary embedding was proven, or there is none, or it stays as it is (`left`)."""
        found = "none" if rope is None else f"{rope.rotary_dim} channels"
        self._steps.append(f"rope: left as it is: {left}" if left else f"rope: {found}")
