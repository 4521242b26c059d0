"""Make a lock of a model that is there."""

from __future__ import annotations

from kvxform.diffing.outline_fx import outline_program
from kvxform.locks.contracts import bound_contracts, pass_contracts
from kvxform.locks.digests import make_digest
from kvxform.locks.records import Build, Lock
from kvxform.runtime.model import OptimizedModel


def make_lock(
    model: OptimizedModel,
    *,
    build: Build | None = None,
    digest: bool = True,
    lengths: tuple[int, ...] | None = None,
) -> Lock:
    """Return the lock of a model.

    Args:
        model: What is locked.
        build: How it was built, for `kvxform check`.
        digest: Run it on fixed tokens, in float64, and keep a digest of what comes out.
        lengths: Tokens of each of these sequences; by default as many as the plan needs.
    """
    program, report = model.program, model.report
    return Lock(
        model=program.info.name,
        recipe="" if model.recipe is None else model.recipe.name,
        outline=outline_program(program).without_digests(),
        digest=make_digest(program, lengths) if digest else None,
        passes=() if report is None else pass_contracts(report),
        bounds=() if report is None else bound_contracts(report),
        build=build,
    )
