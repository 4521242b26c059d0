"""What every pass promises, as checks: each says what is wrong in sentences, or nothing.

- `declaration`: contract, source and facts are stated
- `purity`: `match` changes nothing, and weights that were there are never written to
- `validity`: the result keeps the contract of `ir.program`, prints, and computes the types it says
- `provenance`: every new node names the pass and where it came from
- `determinism`: the same program gives the same result, bit for bit
- `idempotence`: a second run finds nothing to do
- `shapes`: a dry run on weights without values gives the same graph, sites and plan
- `transaction`: a rewrite that breaks off leaves the program as it was, and nothing behind
- `refusal`: what a pass cannot take, it refuses in words
- `contract`: logits and cache are as its numerics say
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx

from kvxform.contracts import require_contract
from kvxform.errors import KvxformError
from kvxform.ir.facts import DEFAULTS
from kvxform.ir.parse import parse_graph
from kvxform.ir.plan import CachePlan
from kvxform.ir.program import Program
from kvxform.ir.text import format_graph
from kvxform.pass_base import GraphPass, Match, NoMatch, Rewriter
from kvxform.pipeline import apply_pass
from kvxform.runtime.model import OptimizedModel
from kvxform.summary import pass_record
from kvxform.testing.examples import Example, calibrated, on_meta, planned, prepare
from kvxform.testing.fingerprint import Fingerprint, changed_parts, digest, fingerprint
from kvxform.testing.node_types import wrong_types
from kvxform.verify.prober import Prober

METRICS = ("kl", "relative", "max_abs")


def check_declaration(graph_pass: GraphPass) -> Iterator[str]:
    """Check what the class says of itself."""
    cls = type(graph_pass)
    if not (cls.__doc__ or "").strip() or (cls.__doc__ or "").startswith(f"{cls.__name__}("):
        yield "the class has no docstring that says what the pass does"
    if not cls.source:
        yield "`source` does not say where the method comes from"
    if not cls.numerics.is_exact and cls.numerics.metric not in METRICS:
        yield f"the metric of its numerics must be one of {', '.join(METRICS)}"
    facts = [*(r.fact for r in cls.requires), *graph_pass.ensures(), *cls.invalidates]
    for fact in dict.fromkeys(facts):
        if fact not in DEFAULTS:
            yield f"there is no fact called {fact!r}"
    for requirement in cls.requires:
        if not requirement.because:
            yield f"the requirement of {requirement.fact} does not say why (`because`)"


def check_purity(graph_pass: GraphPass, program: Program) -> Iterator[str]:
    """Let the pass match, and see that nothing has changed."""
    before, found = fingerprint(program), list[Match | NoMatch]()
    with contextlib.suppress(KvxformError):  # it may refuse the program here
        found = graph_pass.match(program)
    for part in changed_parts(before, fingerprint(program)):
        yield f"`match` changed the {part}"
    for miss in (f for f in found if isinstance(f, NoMatch)):
        if not miss.reason.strip() or miss.reason.endswith("."):
            yield f"the reason of a NoMatch must be words without a full stop, not {miss.reason!r}"


def check_untouched(before: Fingerprint, program: Program) -> Iterator[str]:
    """Compare a program with what it was before the pass ran on a clone of it."""
    for part in changed_parts(before, fingerprint(program)):
        yield f"the rewrite of a clone changed the {part} of the program itself"


def check_validity(program: Program) -> Iterator[str]:
    """Print the graph and read it back; compute types, and compare them with those of the nodes.

    The pipeline has run the verifier on it already.
    """
    text = format_graph(program.graph)
    if format_graph(parse_graph(text)) != text:
        yield "the graph that is printed is not the graph that is read back"
    try:
        yield from wrong_types(program)
    except Exception as error:  # whatever a graph that cannot run raises
        yield f"the graph does not run on shapes: {type(error).__name__}: {error}"


def check_provenance(name: str, before: Program, after: Program) -> Iterator[str]:
    """Look at every node that is new or calls something else."""
    known = {node.name: node for node in before.graph.nodes}
    for node in after.graph.nodes:
        old = known.get(node.name)
        if node.op == "output" or (old is not None and _call(old) == _call(node)):
            continue
        what = "is new" if old is None else "has changed"
        via = node.meta.get("via") or ("no pass",)
        if name not in via:
            yield f"{node.name} {what}, and names {via[-1]} as what made it, not {name}"


def check_idempotence(graph_pass: GraphPass, after: Program) -> Iterator[str]:
    """Let the pass match once more."""
    again = [found for found in graph_pass.match(after) if isinstance(found, Match)]
    if again:
        layers = sorted({m.layer for m in again if m.layer is not None})
        at = f" (layers {', '.join(map(str, layers))})" if layers else ""
        yield f"a second run matches {len(again)} places again{at}"


def check_shapes(graph_pass: GraphPass, program: Program, after: Program) -> Iterator[str]:
    """Run the pass on weights without values, and compare with the real result."""
    try:
        dry, _ = apply_pass(on_meta(program), planned(graph_pass))
    except KvxformError as error:
        yield f"the dry run refuses what the real one takes: {error}"
        return
    real = [name for name, weight in dry.weights.items() if not weight.is_meta]
    if real:
        yield f"weight {real[0]} has values although all others have none"
    if dry.sites != after.sites:
        yield "the dry run gives other sites"
    if graph_pass.needs_calibration:  # what that decides, a dry run cannot know
        if without_codecs(dry.plan) != without_codecs(after.plan):
            yield "the dry run gives another plan, codecs aside"
        return
    shapes = [{n: (w.dtype, w.shape) for n, w in p.weights.items()} for p in (dry, after)]
    if format_graph(dry.graph) != format_graph(after.graph):
        yield "the dry run gives another graph"
    elif shapes[0] != shapes[1]:
        names = [n for n in shapes[1] if shapes[0].get(n) != shapes[1][n]]
        yield f"the dry run gives weights of other names or shapes: {', '.join(names[:3])}"
    if dry.plan != after.plan:
        yield "the dry run gives another plan"


def check_transaction(
    graph_pass: GraphPass, program: Program, matches: Sequence[Match]
) -> Iterator[str]:
    """Break the rewrite off after its first change, half way and at its last one."""
    changes = _changes_until(graph_pass, program, matches, None)
    before = fingerprint(program)
    for limit in sorted({1, (changes + 1) // 2, changes}):
        try:
            _changes_until(graph_pass, program, matches, limit)
            yield f"an error at change {limit} of {changes} is swallowed by the rewrite"
        except _InterruptedError:
            pass
        for part in changed_parts(before, fingerprint(program)):
            yield f"broken off at change {limit} of {changes}, the {part} had changed"


def check_refusal(graph_pass: GraphPass, program: Program, error: KvxformError) -> Iterator[str]:
    """Look at what the pass said where it refused, and let it refuse shapes alone too."""
    if not error.rule.strip():
        yield f"{error.code} does not say what must hold"
    if not error.where:
        yield f"{error.code} does not say which pass it is about"
    with contextlib.suppress(KvxformError):
        apply_pass(on_meta(program), planned(graph_pass))


def check_determinism(graph_pass: GraphPass, example: Example, result: str) -> Iterator[str]:
    """Make the program and the result once more."""
    if replay(graph_pass, example) != result:
        yield "the same program gives another result the second time"


def replay(graph_pass: GraphPass, example: Example) -> str:
    """Return the digest of what a pass makes of an example, from the start.

    Raises:
        KvxformError: If the example is refused.
    """
    source = calibrated(example.source(), (*example.before, graph_pass))
    after, _ = apply_pass(prepare(source, example.before), planned(graph_pass))
    return digest(after)


def check_contract(
    graph_pass: GraphPass, source: Program, before: Sequence[GraphPass]
) -> Iterator[str]:
    """Measure the pass as the pipeline does: logits against the stage before, and the cache."""
    program = prepare(source, before)
    after, found = apply_pass(program, planned(graph_pass))
    prober = Prober(source, OptimizedModel, after.plan)
    try:
        if before:
            prober.measure(program)
        stage = prober.measure(after)
        record = pass_record(planned(graph_pass), found, program, after)
        record = require_contract(planned(graph_pass), record, stage, prober)
    except KvxformError as error:
        yield str(error)
        return
    if record.vs_before is not None and not math.isfinite(record.vs_before.max_abs):
        yield "the logits are not finite"


def without_codecs(plan: CachePlan | None) -> CachePlan | None:
    """Return a plan without codecs and the planes that they store."""
    for site in plan.sites if plan else ():
        streams = {
            name: dataclasses.replace(stream, codec={}, planes=(), calibration=None)
            for name, stream in site.streams.items()
        }
        assert plan is not None, "it has sites"
        plan = plan.replace_site(site.layer, **streams)
    return plan


class _InterruptedError(Exception):
    """Stands for any error inside of a rewrite."""


class _Breaking(Rewriter):
    """A rewriter that counts its changes, and breaks off at one of them."""

    limit: int | None = None
    changes = 0

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "modified" and value:
            self.changes += 1
            if self.changes == self.limit:
                raise _InterruptedError


def _changes_until(
    graph_pass: GraphPass, program: Program, matches: Sequence[Match], limit: int | None
) -> int:
    """Rewrite a clone of `program` until change `limit`; return how many there were."""
    rewriter = _Breaking(program.clone(), graph_pass.pass_name(), graph_pass.numerics)
    rewriter.limit = limit
    for match in matches:
        graph_pass.rewrite(rewriter.program, match, rewriter)
    rewriter.finish()
    return rewriter.changes


def _call(node: fx.Node) -> tuple[Any, ...]:
    """Return what a node calls and its constants: all but which nodes it reads."""
    arguments = fx.node.map_arg((node.args, dict(node.kwargs)), lambda _: None)
    return node.op, str(node.target), repr(arguments)
