"""`check_pass`: tries a pass on small programs of many forms, and holds it to its promises."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvxform.errors import PassError
from kvxform.ir.program import Program
from kvxform.pass_base import PASSES, GraphPass
from kvxform.pass_lookup import find_pass
from kvxform.testing.examples import Example, draw_examples, prerequisites
from kvxform.testing.promises import check_declaration
from kvxform.testing.replaying import compare_processes
from kvxform.testing.trials import Fault, Trial, try_pass

PassLike = GraphPass | type[GraphPass] | str


@dataclass(frozen=True)
class PassCheck:
    """All trials of one pass.

    Attributes:
        name: Recipe name of the pass.
        trials: One an example.
        faults: All promises that were broken.
        notes: What could not be checked, in words.
    """

    name: str
    trials: tuple[Trial, ...]
    faults: tuple[Fault, ...]
    notes: tuple[str, ...] = ()

    @property
    def applied(self) -> int:
        """Examples that the pass took."""
        return sum(trial.outcome == "applied" for trial in self.trials)

    def __str__(self) -> str:
        refused = sum(trial.outcome == "refused" for trial in self.trials)
        lines = [
            f"{self.name}: {len(self.trials)} examples, {self.applied} taken, {refused} refused,"
            f" {len(self.faults)} faults"
        ]
        lines += [f"  {fault}" for fault in self.faults]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def check_pass(
    graph_pass: PassLike,
    *,
    before: Sequence[GraphPass] | None = None,
    programs: Sequence[Program] = (),
    examples: int = 8,
    seed: int = 0,
    new_process: bool = True,
) -> PassCheck:
    """Try a pass on small programs and raise if it breaks a promise; see `promises`.

    Args:
        graph_pass: The pass: an instance with its options, its class, or its recipe name, which may
            be that of an installed package (`kvxform.pass_lookup`).
        before: Passes that must have run. By default those that `requires` asks for, found by
            their facts, and others at random.
        programs: Programs of your own to try it on too, as capture left them.
        examples: How many seeded programs to draw.
        seed: Another seed, other programs.
        new_process: Also make the results in a second process and compare them bit for bit.

    Returns:
        What was tried. Equal arguments give equal checks.

    Raises:
        PassError: KVX220 at the first promise that is broken; the others are notes of the error.
            KVX223 if the pass took none of the examples, so that nothing was checked.
    """
    check = fuzz_pass(
        graph_pass,
        before=before,
        programs=programs,
        examples=examples,
        seed=seed,
        new_process=new_process,
    )
    if check.faults:
        first, *rest = check.faults
        error = PassError(
            "KVX220",
            f"a pass must keep its promise of {first.promise}",
            where=check.name,
            got=first.message,
            at=first.example,
            hint=f"{len(rest)} more faults" if rest else "",
        )
        for fault in rest:
            error.add_note(str(fault))
        raise error
    if not check.applied:
        refusals = [trial.refusal for trial in check.trials if trial.refusal]
        raise PassError(
            "KVX223",
            "a pass that is checked must take one of the examples",
            where=check.name,
            got=refusals[0] if refusals else "examples that passes before it refuse",
            hint="give the passes that must run before it, or programs that it takes",
        )
    return check


def fuzz_pass(
    graph_pass: PassLike,
    *,
    before: Sequence[GraphPass] | None = None,
    programs: Sequence[Program] = (),
    examples: int = 8,
    seed: int = 0,
    new_process: bool = True,
) -> PassCheck:
    """Do as `check_pass`, but return the faults instead of raising."""
    tried = as_pass(graph_pass)
    with registered(tried):
        drawn = draw_examples(tried, examples, before=before, seed=seed)
        chain = prerequisites(tried) if before is None else tuple(before)
        drawn += [Example("given", before=chain, program=program) for program in programs]
        trials = tuple(try_pass(tried, example) for example in drawn)
    faults = [Fault("declaration", text) for text in check_declaration(tried)]
    faults += [fault for trial in trials for fault in trial.faults]
    notes: tuple[str, ...] = ()
    if new_process:
        more, notes = compare_processes(tried, trials)
        faults += more
    return PassCheck(tried.pass_name(), trials, tuple(faults), notes)


def as_pass(graph_pass: PassLike) -> GraphPass:
    """Return an instance.

    Raises:
        RecipeError: KVX104 for an unknown name.
        PassError: KVX205 if the class has options without a default.
    """
    if isinstance(graph_pass, GraphPass):
        return graph_pass
    cls = find_pass(graph_pass) if isinstance(graph_pass, str) else graph_pass
    try:
        return cls()
    except TypeError as error:
        rule = f"options without a default must be given ({error})"
        hint = "check an instance: check_pass(MyPass(bits=4))"
        raise PassError("KVX205", rule, where=cls.pass_name(), hint=hint) from error


@contextlib.contextmanager
def registered(graph_pass: GraphPass) -> Iterator[None]:
    """Let the pipeline know a pass by name for a while, if it does not yet."""
    name, before = graph_pass.pass_name(), PASSES.get(graph_pass.pass_name())
    PASSES[name] = type(graph_pass)
    try:
        yield
    finally:
        if before is None:
            del PASSES[name]
        else:
            PASSES[name] = before
