"""The matches of a failing pass that are at fault."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from kvxform.bisecting.outcomes import Failure, Limits
from kvxform.bisecting.search import Verdict, fewest_to_leave_out, isolate
from kvxform.bisecting.shrinking import Case, Shrinker
from kvxform.bisecting.stages import Broken
from kvxform.errors import KvxformError
from kvxform.verify.probe import Probe
from kvxform.verify.prober import Executor, Prober

BOUND, CONTRACT = "KVX501", "KVX212"
SHORT = 12  # tokens on which a broken contract nearly always shows
PARTS = 64  # matches that are tried as parts of their own at most


@dataclass(frozen=True)
class Trial:
    """The pass tried at some matches: how it failed, and its mean KL from the source in nats."""

    failure: Failure | None
    cost: float | None


@dataclass(frozen=True)
class Group:
    """Matches that are at fault together.

    Attributes:
        matches: Their numbers.
        trial: The pass applied at them alone, or None if that cannot be done.
        case: A part of the model on which the pass fails, if one has been found already.
    """

    matches: tuple[int, ...]
    trial: Trial | None = None
    case: Case | None = None


@dataclass
class CulpritSearch:
    """Tries a failing pass at some of its matches.

    Attributes:
        broken: The pass.
        limits: Bounds of the whole model.
        executor: Makes a runnable model of a program.
    """

    broken: Broken
    limits: Limits
    executor: Executor
    _tried: dict[frozenset[int], Trial | None] = field(default_factory=dict)
    _short: Broken | None = None

    def find(self) -> list[Group]:
        """Return the groups at fault, those that cost most first; none if there is no match."""
        count = len(self.broken.matches)
        if count == 0:
            return []
        if self.broken.failure.code == CONTRACT:
            self._take_fewer_tokens()
        groups = isolate(range(count), self.judge)
        whole = len(groups) == 1 and len(groups[0]) > 1
        if whole and self.broken.failure.code == BOUND:
            groups = self._costliest(groups[0])
        elif whole and not self._can_try_one_of(groups[0]):
            return self._as_parts(groups[0])
        found = [Group(group, self.attempt(frozenset(group))) for group in groups]
        return sorted(found, key=lambda group: (-_cost(group.trial), group.matches))

    def judge(self, wanted: frozenset[int]) -> Verdict:
        """Say whether the pass fails at `wanted` as it does everywhere."""
        found = self.attempt(wanted)
        if found is None:
            return Verdict.UNKNOWN
        if found.failure is None:
            return Verdict.PASSES
        same = found.failure.is_like(self.broken.failure)
        return Verdict.FAILS if same else Verdict.UNKNOWN

    def attempt(self, wanted: frozenset[int]) -> Trial | None:
        """Return the pass tried at `wanted`, or None if it cannot be."""
        if wanted not in self._tried:
            try:
                found = (self._short or self.broken).attempt(wanted, self._limits)
            except KvxformError:
                self._tried[wanted] = None
            else:
                cost = None if found.stage is None else found.stage.vs_source.kl
                self._tried[wanted] = Trial(found.failure, cost)
        return self._tried[wanted]

    def healthy(self, groups: list[Group]) -> int | None:
        """Return a match that is not at fault, or None if all are."""
        guilty = {match for group in groups for match in group.matches}
        return next((i for i in range(len(self.broken.matches)) if i not in guilty), None)

    @property
    def _limits(self) -> Limits:
        return self.limits if self.broken.failure.code == BOUND else {}

    def _take_fewer_tokens(self) -> None:
        """Try the pass on a few tokens from here on, if it fails on them too."""
        probe = self.broken.prober.probe
        if probe.lengths[0] <= SHORT:
            return
        few = Probe(probe.input_ids[:1, :SHORT], (SHORT,))
        prober = Prober(self.broken.uncached, self.executor, None, few)
        prober.measure(self.broken.before, state=False)
        short = dataclasses.replace(self.broken, prober=prober)
        found = short.attempt(frozenset(range(len(short.matches))), {})
        if found.failure is not None and found.failure.is_like(short.failure):
            self._short = short

    def _can_try_one_of(self, group: tuple[int, ...]) -> bool:
        return any(self.judge(frozenset({i})) is not Verdict.UNKNOWN for i in group)

    def _costliest(self, group: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return the fewest matches without which the bound is kept, the costliest first."""
        order = sorted(group, key=lambda i: -_cost(self.attempt(frozenset({i}))))
        return [(i,) for i in order[: fewest_to_leave_out(order, self.judge)]]

    def _as_parts(self, group: tuple[int, ...]) -> list[Group]:
        """Try every match of a pass that must be applied everywhere on a part of its own."""
        found = []
        for match in group[:PARTS]:
            case = Shrinker(self.broken, frozenset({match}), {}, self.executor).first(alone=True)
            if case is not None:
                found.append(Group((match,), None, case))
        return found or [Group(group)]


def _cost(trial: Trial | None) -> float:
    """Return what a trial lies away from the source, in nats; nothing known counts as none."""
    return trial.cost or 0.0 if trial is not None else 0.0
