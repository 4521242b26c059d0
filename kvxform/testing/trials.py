"""One pass on one example: every promise is checked, and what breaks one is kept as a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from kvxform.errors import KvxformError
from kvxform.pass_base import GraphPass, Match
from kvxform.pipeline import apply_pass
from kvxform.testing import promises
from kvxform.testing.examples import Example, calibrated, planned, prepare
from kvxform.testing.fingerprint import digest, fingerprint

INVALID = "KVX215"  # what the verifier says of a graph that a pass has left


@dataclass(frozen=True)
class Fault:
    """A promise that a pass does not keep.

    Attributes:
        promise: Its name in `kvxform.testing.promises`.
        message: What is wrong.
        example: On what, as Python and words; empty if on everything.
    """

    promise: str
    message: str
    example: str = ""

    def __str__(self) -> str:
        at = f"\n    on {self.example}" if self.example else ""
        return f"{self.promise}: {self.message}{at}"


@dataclass(frozen=True)
class Trial:
    """A pass on one example.

    Attributes:
        example: The example.
        outcome: What became of it; `done` if there was nothing left to do, `unprepared` if a pass
            before refused the program.
        matches: Places that were rewritten.
        refusal: What the pass said where it refused.
        digest: Of the result; empty without one.
        faults: Promises that were broken.
    """

    example: Example
    outcome: Literal["applied", "done", "refused", "unprepared"]
    matches: int = 0
    refusal: str = ""
    digest: str = ""
    faults: tuple[Fault, ...] = ()


def try_pass(graph_pass: GraphPass, example: Example) -> Trial:
    """Hold a pass to all its promises on one example; the pipeline must know it by name."""
    try:
        source = calibrated(example.source(), (*example.before, graph_pass))
        program = prepare(source, example.before)
    except KvxformError as error:
        return Trial(example, "unprepared", refusal=str(error))
    faults = _Faults(str(example))
    faults.note("purity", promises.check_purity(graph_pass, program))
    kept = fingerprint(program)
    try:
        after, found = apply_pass(program, planned(graph_pass))
    except KvxformError as error:
        faults.note("purity", promises.check_untouched(kept, program))
        if error.code == INVALID:
            faults.note("validity", iter([f"the verifier refuses the result: {error}"]))
        faults.note("refusal", promises.check_refusal(graph_pass, program, error))
        return Trial(example, "refused", refusal=str(error), faults=tuple(faults.found))
    except Exception as error:  # whatever a pass raises that does not know this program
        faults.note("refusal", iter([crash(error)]))
        return Trial(example, "refused", refusal=crash(error), faults=tuple(faults.found))
    matches = [match for match in found if isinstance(match, Match)]
    faults.note("purity", promises.check_untouched(kept, program))
    if not matches:
        return Trial(example, "done", faults=tuple(faults.found))
    result, name = digest(after), graph_pass.pass_name()
    faults.note("validity", promises.check_validity(after))
    faults.note("provenance", promises.check_provenance(name, program, after))
    faults.note("idempotence", promises.check_idempotence(graph_pass, after))
    faults.note("shapes", promises.check_shapes(graph_pass, program, after))
    faults.note("transaction", promises.check_transaction(graph_pass, program, matches))
    faults.note("determinism", promises.check_determinism(graph_pass, example, result))
    faults.note("contract", promises.check_contract(graph_pass, source, example.before))
    return Trial(example, "applied", len(matches), digest=result, faults=tuple(faults.found))


def crash(error: Exception) -> str:
    """Return an error that is none of kvxform as a sentence."""
    lines = str(error).strip().splitlines()
    return f"it raises {type(error).__name__}: {lines[0] if lines else 'without a message'}"


class _Faults:
    """Collects what is wrong on one example."""

    def __init__(self, example: str) -> None:
        self.example, self.found = example, list[Fault]()

    def note(self, promise: str, messages: Iterator[str]) -> None:
        """Keep all `messages`; an error while they are found is one of them."""
        try:
            for message in messages:
                self.found.append(Fault(promise, message, self.example))
        except Exception as error:  # whatever a pass raises
            self.found.append(Fault(promise, crash(error), self.example))
