"""Compares an ONNX package with the eager lowering of its program, schedule by schedule.

`kvxform verify` runs every schedule; an export runs `EXPORT_SCHEDULES` on short sequences, before
the package gets its place.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from kvxform.errors import VerifyError
from kvxform.ir.program import Program
from kvxform.ir.rounding import rounding_dtype
from kvxform.verify.checking import Talk
from kvxform.verify.following import Follower
from kvxform.verify.probe import rewrite_probe
from kvxform.verify.prober import first_encoded_length
from kvxform.verify.results import Comparison
from kvxform.verify.schedules import Free, Prefill, Schedule
from kvxform.verify.suites import Fit, Suite, make_suites
from kvxform.verify.tolerances import tolerance_for

if TYPE_CHECKING:
    from kvxform.codegen.onnx.forms import Provider
    from kvxform.runtime.model import OptimizedModel
    from kvxform.runtime.onnx_rows import OnnxModel

EXPORT_SCHEDULES = ("chunked-prefill", "decode", "ring-wrap")  # ragged rows in all but the last
EXPORT_STEPS = 8  # of the long decode


def check_export(
    model: OptimizedModel, folder: Path, provider: Provider, talk: Talk
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Run a package in the schedules of an export.

    Args:
        model: What it was made from.
        folder: The package.
        provider: Where it runs.
        talk: Called with the name of each schedule before it runs.

    Returns:
        Keys of the schedules that ran, and why others were left out.

    Raises:
        VerifyError: KVX503 if it is not as the eager lowering.
    """
    from kvxform.runtime.model import OptimizedModel
    from kvxform.runtime.onnx_rows import OnnxModel
    from kvxform.runtime.onnx_session import OnnxSession

    leader = OptimizedModel(model.program)
    assert leader.plan is not None, "packages have a cache"
    package = OnnxModel(leader.program, OnnxSession(folder, provider=provider, is_edited=True))
    fit = export_fit(leader.program, is_ragged=package.takes_padding)
    write = functools.partial(rewrite_probe, leader, leader.program.info.vocab_size)
    suites = make_suites(fit, write, EXPORT_SCHEDULES)
    left_out = {key: why for suite in suites for key, why in suite.left_out.items()}
    final = None if model.report is None else model.report.final
    cost = 0.0 if final is None else final.kl
    found, unfit = follow_package(package, leader, suites, cost, talk)
    _require(found)
    run = [key for suite in suites for key in suite.schedules if key not in unfit]
    return tuple(run), left_out | unfit


def export_fit(program: Program, *, is_ragged: bool) -> Fit:
    """Return what the schedules of an export are made for."""
    assert program.plan is not None, "packages have a cache"
    return Fit(
        program.plan,
        program.sites,
        first_encoded_length(program.plan),
        program.info.context_length or 1 << 30,
        steps=EXPORT_STEPS,
        is_ragged=is_ragged,
    )


def follow_package(
    package: OnnxModel,
    leader: OptimizedModel,
    suites: tuple[Suite, ...],
    cost: float,
    talk: Talk,
) -> tuple[list[Comparison], dict[str, str]]:
    """Run schedules on a package and on the eager lowering.

    Args:
        package: What is checked.
        leader: The same program, eagerly.
        suites: What to run.
        cost: KL divergence in nats that the codes cost against the source, as far as it is known.
        talk: Called with the name of each schedule before it runs.

    Returns:
        What was compared, and why schedules were left out, by key.
    """
    tolerance = tolerance_for(rounding_dtype(leader.program))
    follower = Follower(package, leader, tolerance, cost, talk)
    found: list[Comparison] = []
    left_out: dict[str, str] = {}
    for suite in suites:
        reasons = {
            key: _unfit(schedule, takes_padding=package.takes_padding)
            for key, schedule in suite.schedules.items()
        }
        left_out |= {key: reason for key, reason in reasons.items() if reason}
        kept = {k: schedule for k, schedule in suite.schedules.items() if not reasons[k]}
        found += follower.check(dataclasses.replace(suite, schedules=kept))
    return found + follower.conclude(), left_out


def _unfit(schedule: Schedule, *, takes_padding: bool) -> str:
    """Return why a package cannot run a schedule, or nothing."""
    if any(isinstance(action, Free) for action in schedule.actions):
        return "rows of a package are freed together"
    counts = [set(a.tokens.values()) for a in schedule.actions if isinstance(a, Prefill)]
    if not takes_padding and any(len(lengths) > 1 for lengths in counts):
        return "rows of a package with exact regions or groups of tokens are equally long"
    return ""


def _require(comparisons: list[Comparison]) -> None:
    """Raise KVX503 for the first comparison that failed."""
    for line in comparisons:
        if not line.is_fine:
            bound = "equal" if line.bound is None else f"within {line.bound:.0e}"
            raise VerifyError(
                "KVX503",
                f"{line.compared}: a package must be {bound}",
                where="onnx",
                got=None if line.error is None else f"{line.error:.1e}",
                at=", ".join(text for text in (line.schedule, line.at) if text),
                hint="nothing was written; report it, and export another level meanwhile",
            )
