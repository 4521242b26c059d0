"""Facts: what is known of a Program, and what a pass may rely on.

A fact is a name and a value. Passes state which values they need (`Requirement`), which they
establish, and which they make unknown; the pipeline checks a whole recipe before any work is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

FactValue = bool | int | str

DEFAULTS: Mapping[str, FactValue] = {
    "norms_fused": False,  # gains of norms are folded into the next linear layers
    "residual.basis": "identity",  # rotation that the residual stream is expressed in
    "k.basis": "identity",  # rotation that cached keys are expressed in
    "v.basis": "identity",
    "k.rope": "post",  # keys are cached after ("post") or before ("pre") RoPE
    "k.codec": "none",
    "v.codec": "none",
    "codecs.per_layer": False,  # options of codecs were chosen layer by layer
    "kv_heads": "source",  # KV heads are those of the source, or "merged" into fewer
    "cache.inserted": False,
    "cache.layout": "none",  # none | contiguous | paged(<page_size>)
    "latent.cached": False,  # latent attention caches its latents, not the K and V of every head
    "positions": "dense",  # dense: slot = position | sparse: some positions were dropped
    "read.simplified": False,  # scales and zero points are applied per query, token or step
}


@dataclass(frozen=True)
class Requirement:
    """A fact must have one of the allowed values.

    Attributes:
        fact: Name of the fact.
        allowed: Values that are fine.
        because: Clause that says what would go wrong, used in the refusal.
        refused: Values that are not fine; used when `allowed` is empty.
    """

    fact: str
    allowed: tuple[FactValue, ...]
    because: str
    refused: tuple[FactValue, ...] = ()

    def is_met(self, facts: Facts) -> bool:
        """Return whether `facts` satisfy this requirement."""
        value = facts[self.fact]
        return value in self.allowed if self.allowed else value not in self.refused


class Facts(Mapping[str, FactValue]):
    """An immutable set of facts; names not set have the value in `DEFAULTS`."""

    def __init__(self, values: Mapping[str, FactValue] | None = None) -> None:
        self._values = {k: v for k, v in sorted((values or {}).items()) if DEFAULTS.get(k) != v}

    def __getitem__(self, name: str) -> FactValue:
        return self._values[name] if name in self._values else DEFAULTS[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*DEFAULTS, *self._values}))

    def __len__(self) -> int:
        return len({*DEFAULTS, *self._values})

    def __repr__(self) -> str:
        return f"Facts({self._values})"

    def with_(self, **values: FactValue) -> Facts:
        """Return new facts; `.` in a name is written `__`."""
        return self.updated({k.replace("__", "."): v for k, v in values.items()})

    def updated(self, values: Mapping[str, FactValue], forget: tuple[str, ...] = ()) -> Facts:
        """Return new facts with `forget` back at their defaults and `values` set."""
        kept = {k: v for k, v in self._values.items() if k not in forget}
        return Facts({**kept, **values})

    def changed(self) -> dict[str, FactValue]:
        """Return only the facts that differ from their defaults."""
        return dict(self._values)
