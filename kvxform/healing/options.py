"""How a model is healed."""

from __future__ import annotations

from dataclasses import dataclass

from kvxform.errors import KvxformError

FULL_RATE, LOW_RANK_RATE = 2e-4, 1e-3  # learning rates where none is given


@dataclass(frozen=True)
class HealOptions:
    """How a model is healed.

    Attributes:
        steps_local: Steps on the outputs of single attentions.
        steps: Steps on the logits.
        learning_rate: Of the longest step; None for 2e-4, or 1e-3 with a rank.
        rank: Rank of additions to matrices (LoRA), or None to train weights in full.
        seed: Of the order of the text and the first additions.
        batch_size: Windows of a step.
        window: Tokens of a window.
        every: Steps between checkpoints.
    """

    steps_local: int = 100
    steps: int = 300
    learning_rate: float | None = None
    rank: int | None = None
    seed: int = 0
    batch_size: int = 8
    window: int = 512
    every: int = 50

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        for name, least in (("steps_local", 0), ("steps", 0), ("seed", 0), ("batch_size", 1)):
            _require(getattr(self, name) >= least, f"{name} must be at least {least}", self)
        _require(self.every >= 1, "every must be at least 1", self)
        _require(self.rank is None or self.rank >= 1, "rank must be at least 1", self)
        rate = self.learning_rate
        _require(rate is None or rate > 0, "the learning rate must be positive", self)

    @property
    def rate(self) -> float:
        """The learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        return FULL_RATE if self.rank is None else LOW_RANK_RATE


def _require(holds: bool, rule: str, got: object) -> None:
    if not holds:
        raise KvxformError("KVX704", rule, where="heal", got=got)
