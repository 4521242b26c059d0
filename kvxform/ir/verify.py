"""The verifier: does a Program keep the contract of `ir.program`?

The pipeline runs it after every pass, and loading runs it on every artifact. Each rule is a small
function, and the first rule that is broken is reported with its node.
"""

from __future__ import annotations

from kvxform.ir.program import Program
from kvxform.ir.verify_graph import verify_graph
from kvxform.ir.verify_plan import verify_facts, verify_plan
from kvxform.ir.verify_rope import verify_key_reads
from kvxform.ir.verify_sites import verify_sites


def verify_program(program: Program) -> None:
    """Check graph, weights, sites, plan and facts of a program; changes nothing.

    Raises:
        PassError: KVX215 with the rule, what was found instead, and the node or layer.
    """
    verify_graph(program)
    verify_sites(program)
    verify_plan(program)
    if program.plan is not None:
        verify_key_reads(program)
    verify_facts(program)
