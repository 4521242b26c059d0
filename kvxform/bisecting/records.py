"""What `bisect` found, as plain data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvxform.ir.text import format_ranges


@dataclass(frozen=True)
class StageRow:
    """One pass of the recipe, in order, up to the one that fails.

    Attributes:
        name: Recipe name of the pass.
        relative: Largest difference of a logit from the stage before, over the largest logit; None
            where the pass did not get as far as that.
        kl: Mean KL(source || stage) in nats; None likewise.
        is_failing: Whether the pass fails.
    """

    name: str
    relative: float | None
    kl: float | None
    is_failing: bool = False


@dataclass(frozen=True)
class Culprit:
    """Matches of the pass that are at fault together; nearly always one.

    Attributes:
        matches: Their numbers, counted from 0 in the order in which the pass finds them.
        layers: Layers they are at; empty for matches outside of layers.
        module: Path of the source module of the first one, or empty.
        failure: How the pass fails if it is applied there alone, or empty.
        cost: Mean KL divergence in nats that these matches alone bring, on what was tried, or None.
    """

    matches: tuple[int, ...]
    layers: tuple[int, ...] = ()
    module: str = ""
    failure: str = ""
    cost: float | None = None


@dataclass(frozen=True)
class Subgraph:
    """The smallest graph found that shows the fault.

    Attributes:
        nodes: Operations in it, those that stand for inputs left out.
        nodes_before: Operations in the whole model.
        inputs: Values that it is given as they were recorded in the model.
        output: What it returns, which is where the fault shows.
        steps: Passes that it needs, as recipes write them; the last one is at fault.
        tokens: Tokens of the inputs.
        failure: How the pass fails on it.
        changes: What the pass changes on it, in words, an operation, weight or field each.
    """

    nodes: int
    nodes_before: int
    inputs: tuple[str, ...]
    output: str
    steps: tuple[Any, ...]
    tokens: int
    failure: str
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BisectResult:
    """What `bisect` found.

    Attributes:
        model: Name of the model.
        recipe: Name of the recipe.
        stages: Passes that ran, the failing one last.
        pass_name: The first pass that fails; empty if none does.
        step: That pass with its options, as recipes write it.
        failure: How it fails, as one line; empty if nothing does.
        matches: How many places it applies at.
        culprits: Those that are at fault, worst first.
        subgraph: The smallest graph that shows it; None if there is none smaller than the model.
        note: What could not be found, and why; or empty.
        repro: Folder that was written, or None.
    """

    model: str
    recipe: str
    stages: tuple[StageRow, ...]
    pass_name: str = ""
    step: Any = None
    failure: str = ""
    matches: int = 0
    culprits: tuple[Culprit, ...] = ()
    subgraph: Subgraph | None = None
    note: str = ""
    repro: Path | None = None

    @property
    def is_clean(self) -> bool:
        """Whether no pass fails."""
        return not self.pass_name

    @property
    def where(self) -> str:
        """At which of its matches the pass fails, as a sentence."""
        if not self.culprits:
            return "Where it fails is not known."
        if len(self.culprits) == self.matches:
            return f"It fails wherever it applies, at {_count(self.matches, 'place')}."
        layers = sorted({layer for culprit in self.culprits for layer in culprit.layers})
        modules = ", ".join(dict.fromkeys(c.module for c in self.culprits[:3] if c.module))
        word = "layer" if len(layers) == 1 else "layers"
        place = f" at {word} {format_ranges(layers)}" if layers else ""
        place += f" ({modules})" if modules else ""
        return f"It fails{place}: {len(self.culprits)} of {_count(self.matches, 'place')}."

    def to_data(self) -> dict[str, Any]:
        """Return plain data."""
        data = dataclasses.asdict(self)
        return {**data, "repro": None if self.repro is None else str(self.repro)}


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
