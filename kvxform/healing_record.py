"""What healing did to a model, as part of its report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HealedQuality:
    """A model with its cache, measured on text that it was not trained on.

    Attributes:
        perplexity: `exp` of the mean negative log likelihood in nats.
        kl: Mean KL(source || model) per token, in nats.
        top1: Share of positions with the greedy token of the source.
    """

    perplexity: float
    kl: float
    top1: float


@dataclass(frozen=True)
class HealedLayer:
    """One attention, on the residual stream of the source.

    Attributes:
        layer: Layer index.
        before: Root mean square error of its output over that of the source's output.
        after: The same after training.
    """

    layer: int
    before: float
    after: float


@dataclass(frozen=True)
class HealingRecord:
    """One run of healing.

    Attributes:
        text: What was read.
        steps_local: Steps on the outputs of single attentions.
        steps: Steps on the divergence of the logits from those of the source.
        learning_rate: Of the longest step.
        rank: Rank of the additions, or None where weights were trained in full.
        seed: Of order and additions.
        batch_size: Windows of a step.
        window: Tokens of a window.
        weights: Weights that were trained.
        parameters: Numbers that were trained.
        trained_windows: Windows of the text that steps took from.
        held_out_windows: Windows that `before` and `after` are measured on.
        source_perplexity: Of the source, on the same windows.
        before: The model that came in.
        after: The model that went out.
        layers: The attentions that depend on what was trained.
        notes: What was left out, and why.
    """

    text: str
    steps_local: int
    steps: int
    learning_rate: float
    rank: int | None
    seed: int
    batch_size: int
    window: int
    weights: int
    parameters: int
    trained_windows: int
    held_out_windows: int
    source_perplexity: float
    before: HealedQuality
    after: HealedQuality
    layers: tuple[HealedLayer, ...] = ()
    notes: tuple[str, ...] = ()
