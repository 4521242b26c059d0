"""The smallest part of a program on which a pass still fails.

The nodes that the pass changes at the matches at fault are the anchors. Values through which all of
them run are the places to cut, nearest first. Then the part is made smaller: passes before the
failing one are left out, inputs move nearer to the anchors, tokens become fewer. Of every part it
is asked anew whether the pass fails on it in the same way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from kvxform.bisecting.anchors import find_anchors
from kvxform.bisecting.cutting import cut_program, operations, record, width_of
from kvxform.bisecting.flow import Flow
from kvxform.bisecting.outcomes import (
    Attempt,
    Limits,
    final_plan,
    run_passes,
    with_calibration,
)
from kvxform.bisecting.stages import Broken
from kvxform.errors import KvxformError
from kvxform.ir.program import Program
from kvxform.order import PlannedPass
from kvxform.verify.probe import Probe
from kvxform.verify.prober import Executor, Prober

ENDS, ENTRIES = 8, 3  # places where a part is cut at first, tried from the nearest on
NEAR_ENDS = 5  # where many sites are tried
FAR_ENDS = 3  # for which larger parts are tried, if no near cut shows the fault
CLOSER = 40  # further cuts that are tried
SHORTER = (5, 9, 17, 33)  # tokens of smaller inputs


@dataclass(frozen=True)
class Case:
    """A small program on which a pass fails.

    Attributes:
        program: Without a cache.
        steps: Passes; the last one fails.
        probe: Inputs on which it fails.
        end: Name of the node whose value is returned.
        found: How the pass fails.
    """

    program: Program
    steps: tuple[PlannedPass, ...]
    probe: Probe
    end: str
    found: Attempt


class Shrinker:
    """Looks for the smallest case.

    Args:
        broken: The pass that fails.
        wanted: Numbers of the matches at fault.
        limits: Bounds beside the contract, for a part alone.
        executor: Makes a runnable model of a program.
    """

    def __init__(
        self, broken: Broken, wanted: frozenset[int], limits: Limits, executor: Executor
    ) -> None:
        self._broken, self._limits, self._executor = broken, limits, executor
        self._program, self._probe = broken.uncached, broken.prober.probe
        self._flow = Flow(self._program)
        self._anchors = self._flow.known(find_anchors(broken, wanted, self._program))

    def first(self, *, alone: bool = False) -> Case | None:
        """Return a part around the anchors that fails, or None if there is none but the whole.

        Args:
            alone: Look only at a few parts, and at none with sites beside those of the anchors.
        """
        if not self._anchors:
            return None
        layers = {node.kwargs.get("layer") for node in self._anchors}
        cuts = list(self._near_cuts() if alone else self._cuts())
        values = record(self._program, {entry for _, entry in cuts}, self._probe)
        for end, entry in cuts:
            part = cut_program(self._program, {entry: values[entry]}, end)
            if alone and not {site.layer for site in part.sites} <= layers:
                continue
            found = self._try(part, self._broken.steps)
            if found is not None:
                return Case(part, self._broken.steps, found.prober.probe, end, found)
        return None

    def _near_cuts(self) -> Iterator[tuple[str, str]]:
        """Yield names of values that end and begin parts: the nearest entry of each end."""
        for end, entries in self._ends()[:NEAR_ENDS]:
            yield from ((end, entry) for entry in entries[:1])

    def _cuts(self) -> Iterator[tuple[str, str]]:
        """Yield the same, with more entries, those far away last."""
        ends = self._ends()
        for end, entries in ends:
            yield from ((end, entry) for entry in entries[:ENTRIES])
        for end, entries in ends[:FAR_ENDS]:
            doubling = [1 << power for power in range(2, len(entries).bit_length())]
            far = {entries[i] for i in doubling if i < len(entries)} | set(entries[ENTRIES:][-1:])
            yield from ((end, entry) for entry in entries if entry in far)

    def _ends(self) -> list[tuple[str, list[str]]]:
        """Return values that all anchors run through, nearest first, each with its entries."""
        ends = [n for n in self._flow.ends(self._anchors) if width_of(n)][:ENDS]
        return [
            (end.name, [n.name for n in self._flow.entries(self._anchors, end) if width_of(n)])
            for end in ends
        ]

    def shrink(self, case: Case) -> Case:
        """Return a case that is as small as can be found."""
        return self._shorten(self._cut_closer(self._drop_steps(case)))

    def _drop_steps(self, case: Case) -> Case:
        """Leave out passes before the failing one, the last ones first."""
        for index in reversed(range(len(case.steps) - 1)):
            steps = (*case.steps[:index], *case.steps[index + 1 :])
            found = self._try(case.program, steps)
            if found is not None:
                case = dataclasses.replace(case, steps=steps, found=found)
        return case

    def _cut_closer(self, case: Case) -> Case:
        """Turn values inside of the part into inputs, those that save most operations first."""
        anchors = {node.name for node in self._anchors}
        inside = {node.name: node for node in self._flow.nodes if node.name not in anchors}
        inside.pop(case.end, None)
        names = [n.name for n in operations(case.program) if n.name in inside]
        values = record(self._program, [n for n in names if width_of(inside[n])], self._probe)
        for _ in range(CLOSER):
            sizes = _sizes_if_cut(case.program, values)
            if not sizes:
                break
            name = min(sizes, key=lambda name: (sizes[name], name))
            part = cut_program(case.program, {name: values.pop(name)}, case.end)
            found = self._try(part, case.steps)
            if found is not None:  # if not, what hides the fault now hides it in smaller parts too
                case = dataclasses.replace(case, program=part, found=found)
        return case

    def _shorten(self, case: Case) -> Case:
        """Take one row of fewer tokens."""
        for tokens in SHORTER:
            if tokens >= case.probe.lengths[0]:
                break
            probe = Probe(case.probe.input_ids[:1, :tokens].clone(), (tokens,))
            found = self._try(case.program, case.steps, probe)
            if found is not None:
                return dataclasses.replace(case, probe=probe, found=found)
        return case

    def _try(
        self, part: Program, steps: Sequence[PlannedPass], probe: Probe | None = None
    ) -> Attempt | None:
        """Return the attempt at the last step if it fails as it does in the whole model."""
        found = try_steps(part, steps, self._limits, self._executor, probe)
        if found is None or found.failure is None:
            return None
        return found if found.failure.is_like(self._broken.failure) else None


def _sizes_if_cut(program: Program, names: Collection[str]) -> dict[str, int]:
    """Return how many operations are left if one node becomes an input, where that is fewer."""
    calls = operations(program)
    output = next(node for node in program.graph.nodes if node.op == "output")
    sizes = {}
    for node in calls:
        if node.name in names:
            seen = {node, output}
            waiting = [output]
            while waiting:
                new = [n for n in waiting.pop().all_input_nodes if n not in seen]
                seen.update(new)
                waiting += new
            sizes[node.name] = sum(call in seen for call in calls) - 1
    return {name: size for name, size in sizes.items() if size < len(calls)}


def try_steps(
    program: Program,
    steps: Sequence[PlannedPass],
    limits: Limits,
    executor: Executor,
    probe: Probe | None = None,
) -> Attempt | None:
    """Return the attempt at the last of some passes, or None if it is not reached.

    Args:
        program: A program without a cache.
        steps: At least one pass.
        limits: Bounds for the last one, beside its contract.
        executor: Makes a runnable model of a program.
        probe: Inputs; text that the program writes by default.
    """
    if not program.sites and any(planned.graph_pass.needs_calibration for planned in steps):
        return None  # there is nothing to collect statistics of
    try:
        program = with_calibration(program, steps)
        plan = final_plan(program, steps)
        return run_passes(program, steps, Prober(program, executor, plan, probe), limits)
    except (KvxformError, RuntimeError):
        return None
