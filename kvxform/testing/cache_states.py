"""`assert_cache_state`: a cache holds what it must, however tokens come into it and leave it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from torch import nn

from kvxform.ir.program import Program
from kvxform.runtime.model import OptimizedModel
from kvxform.verify.results import Comparison, Verification
from kvxform.verifying import verify_artifact


def assert_cache_state(
    model: OptimizedModel | Program | str | Path,
    *,
    schedules: Collection[str] | None = None,
    source: nn.Module | str | Path | None = None,
    lowering: str | None = None,
) -> Verification:
    """Assert that logits, cache, lengths and bytes are right in every schedule.

    Args:
        model: A model with a cache, its program, or the path of an artifact.
        schedules: Keys of `kvxform.verify.suites.SCHEDULES`, for instance `["decode",
            "beam-fork"]`; all by default.
        source: The model it was made from, to compare with that too.
        lowering: `eager`, `triton` or `onnx`; by default that of the recipe.

    Returns:
        Everything that was compared.

    Raises:
        AssertionError: With each comparison that failed: schedule, what, error, bound, and where.
        KvxformError: KVX401 if there is no cache, and those of `kvxform.verifying`.
    """
    __tracebackhide__ = True
    runnable = OptimizedModel(model) if isinstance(model, Program) else model
    found = verify_artifact(
        runnable, source=source, schedules=schedules, lowering=lowering, progress=False
    )
    wrong = [_sentence(failure) for failure in found.failures()]
    if wrong:
        count = f"{len(wrong)} of {len(found.comparisons)} comparisons failed"
        raise AssertionError("\n".join([f"{found.name}, {found.lowering}: {count}", *wrong]))
    return found


def _sentence(failure: Comparison) -> str:
    line = f"  {failure.schedule}: {failure.compared}"
    if failure.error is not None and failure.bound is not None:
        line += f" differ by {failure.error:.1e}; {failure.bound:.0e} is allowed"
    return f"{line} ({failure.at})" if failure.at else line
