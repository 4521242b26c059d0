"""`verify_artifact`: every schedule of the cache-state checker on a finished model."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from kvxform.capture import capture
from kvxform.codecs.base import dtype_name
from kvxform.codegen.onnx.capability import takes_padding
from kvxform.errors import ArtifactError, KvxformError
from kvxform.ir.program import Program
from kvxform.ir.rounding import rounding_dtype
from kvxform.pass_lookup import find_pass
from kvxform.progress import ProgressDisplay
from kvxform.recipe import retarget
from kvxform.runtime.exporting import form_of, provider_here
from kvxform.runtime.loading import load_model
from kvxform.runtime.model import OptimizedModel
from kvxform.runtime.onnx_files import check_package
from kvxform.runtime.package_check import follow_package
from kvxform.runtime.package_model import is_package, load_package_model
from kvxform.runtime.packed_weights import comparable
from kvxform.verify.cache_state import is_lossy
from kvxform.verify.checking import Checker, Talk, compare_with_source
from kvxform.verify.probe import rewrite_probe, run_source
from kvxform.verify.prober import first_encoded_length
from kvxform.verify.results import Comparison, Verification
from kvxform.verify.suites import (
    LONG,
    SCHEDULES,
    SHORTEST,
    STEPS,
    Fit,
    Suite,
    check_keys,
    make_suites,
)
from kvxform.verify.tolerances import Tolerance, tolerance_for

LOWERINGS = ("eager", "triton", "onnx")
CALIBRATED = 1024  # tokens of the longest sequence that statistics are collected on
SEEN = 256  # where nothing was calibrated, positions beyond these count as long
INTERPRETED_STEPS = 8  # of the long decode, where kernels are interpreted
Target = OptimizedModel | str | Path


def verify_artifact(
    target: Target,
    *,
    source: nn.Module | str | Path | None = None,
    schedules: Collection[str] | None = None,
    lowering: str | None = None,
    progress: bool = True,
) -> Verification:
    """Run a finished model through every way in which tokens come into a cache and leave it.

    Without a source, K, V and logits are compared with the same model run in one piece, and what
    the cache holds and returns with the equations of its plan. Of an ONNX package, what it holds
    and returns is compared with the eager lowering.

    Args:
        target: A folder that `OptimizedModel.save` wrote, or a model, or an ONNX package, which is
            compared with the program and the weights inside it.
        source: The model it was made from, as `model` for `optimize`.
        schedules: Keys of `kvxform.verify.suites.SCHEDULES`; all by default.
        lowering: `eager`, `triton` or `onnx`; by default that of the recipe.
        progress: Show progress on stderr.

    Raises:
        KvxformError: KVX801 for an unknown schedule or lowering, KVX401 if the lowering cannot run
            the plan or there is no cache, and those of `load` and of `optimize`.
    """
    check_keys(schedules or ())
    if lowering is not None and lowering not in LOWERINGS:
        rule = f"the lowering must be one of {', '.join(LOWERINGS)}"
        raise KvxformError("KVX801", rule, where="verify", got=repr(lowering))
    if _is_package(target):
        lowering = _need_onnx(lowering)
    with ProgressDisplay(progress) as display:
        run = _Run(_open(target, lowering), lowering, display.talk)
        comparisons = []
        if source is not None:  # first, for a wrong one is to be found before the work
            name = str(source) if isinstance(source, Path) else source
            comparisons += run.compare_with(capture(name, progress=display.talk).program)
        comparisons += run.check(target, schedules)
        return run.result(comparisons, has_source=source is not None)


def _is_package(target: Target) -> bool:
    return not isinstance(target, OptimizedModel) and is_package(Path(target))


def _need_onnx(lowering: str | None) -> str:
    """Return the lowering of a package; KVX801 if another one is asked for."""
    if lowering not in (None, "onnx"):
        rule = "an ONNX package has the lowering onnx alone"
        raise KvxformError("KVX801", rule, where="verify", got=repr(lowering))
    return "onnx"


def _open(target: Target, lowering: str | None) -> OptimizedModel:
    wanted = "eager" if lowering == "onnx" else lowering  # a package is made from that
    if isinstance(target, OptimizedModel):
        model = target if wanted in (None, _lowering_of(target)) else _retargeted(target, wanted)
    elif is_package(Path(target)):
        model = load_package_model(Path(target))
    else:
        model = load_model(Path(target), target=wanted)
    if model.plan is None:
        raise KvxformError("KVX401", "only a program with a cache can be verified", where="verify")
    return model


def _lowering_of(model: OptimizedModel) -> str:
    return "eager" if model.recipe is None else model.recipe.target.lowering


def _retargeted(model: OptimizedModel, lowering: str) -> OptimizedModel:
    """Return the same program under another lowering."""
    if model.recipe is None:
        rule = "a model without a recipe runs eagerly"
        raise KvxformError("KVX801", rule, where="verify", got=repr(lowering))
    recipe = retarget(model.recipe, lowering)
    return OptimizedModel(model.program, report=model.report, recipe=recipe)


class _Run:
    """The verification of one model.

    Args:
        model: The model; for lowering `onnx`, its eager form.
        lowering: What was asked for.
        talk: Shows what runs.
    """

    def __init__(self, model: OptimizedModel, lowering: str | None, talk: Talk) -> None:
        assert model.plan is not None, "checked"
        self.model, self.lowering, self._talk = model, lowering or _lowering_of(model), talk
        self._plan, program = model.plan, model.program
        self._dtype = rounding_dtype(program)
        self._tolerance: Tolerance = tolerance_for(self._dtype)
        final = None if model.report is None else model.report.final
        self._cost = 0.0 if final is None else final.kl
        self._write = functools.partial(rewrite_probe, model, program.info.vocab_size)
        self._left_out: dict[str, str] = {}

    def check(self, target: Target, keys: Collection[str] | None) -> list[Comparison]:
        """Run all schedules on the lowering."""
        streams = [st for site in self._plan.owners for st in site.streams.values()]
        fit = Fit(
            self._plan,
            self.model.program.sites,
            first_encoded_length(self._plan),
            self.model.program.info.context_length or 1 << 30,
            steps=INTERPRETED_STEPS if self._is_interpreted else STEPS,
            known=CALIBRATED if any(st.calibration for st in streams) else SEEN,
            is_ragged=self.lowering != "onnx" or takes_padding(self._plan),
        )
        if keys is None and self._is_interpreted:
            keys = [key for key in SCHEDULES if key != LONG]
            self._left_out[LONG] = "kernels are interpreted here; it runs if it is named"
        suites = make_suites(fit, self._write, keys)
        for suite in suites:
            self._left_out |= suite.left_out
        if self.lowering == "onnx":
            return self._check_package(target, suites)
        checker = Checker(self.model, self._tolerance, self._cost, self._talk)
        again = self.model if self.lowering == "triton" else None
        found = [c for suite in suites for c in checker.check(suite, unwatched=again)]
        return found + checker.conclude()

    def compare_with(self, source: Program) -> list[Comparison]:
        """Compare the model in one piece with its source."""
        self._check_source(source)
        needed = first_encoded_length(self._plan)
        longest = max(SHORTEST, needed + needed // 4 + 8)
        probe = self._write((min(longest, source.info.context_length or longest),))
        passes = [find_pass(name) for name in self.model.program.passes]
        is_exact = all(p.numerics.is_exact for p in passes) and not is_lossy(
            self._plan, source.dtype
        )
        found = compare_with_source(
            self.model, run_source(source, probe), probe, self._tolerance, is_exact=is_exact
        )
        costs = [c.error for c in found if c.compared.endswith("(KL)") and c.error is not None]
        self._cost = max(self._cost, *costs)
        return found

    def result(self, comparisons: list[Comparison], *, has_source: bool) -> Verification:
        """Return everything that was found."""
        reference = (
            "the eager lowering"
            if self.lowering == "onnx"
            else "the equations of the plan, and the model in one piece"
        )
        name, recipe = self.model.program.info.name, self.model.recipe
        return Verification(
            name=name if recipe is None else f"{name} after {recipe.name}",
            lowering=self.lowering,
            dtype=dtype_name(self._dtype),
            reference=f"{reference}, and the source" if has_source else reference,
            is_lossy=is_lossy(self._plan, self.model.program.dtype),
            comparisons=tuple(comparisons),
            left_out=self._left_out,
        )

    def _check_source(self, source: Program) -> None:
        own, other = self.model.program, source
        mine = (own.info.family, own.info.vocab_size, len(own.sites))
        theirs = (other.info.family, other.info.vocab_size, len(other.sites))
        if mine != theirs:
            rule = "the source must be the model that the artifact was made from"
            got = f"{source.info.name}, {theirs[1]} tokens, {theirs[2]} layers"
            raise ArtifactError("KVX606", rule, where="verify", got=got)

    @property
    def _is_interpreted(self) -> bool:
        return self.lowering == "triton" and self.model.device.type == "cpu"

    def _check_package(self, target: Target, suites: tuple[Suite, ...]) -> list[Comparison]:
        from kvxform.runtime.onnx_rows import OnnxModel
        from kvxform.runtime.onnx_session import OnnxSession

        with _package(self.model, target) as folder:
            form, is_own = form_of(check_package(folder)), _is_package(target)
            with comparable(self.model, folder, form, is_unpacked=is_own) as (leader, exact):
                provider = provider_here(form, leader.program.info.dtype)
                session = OnnxSession(exact, provider=provider, is_edited=exact != folder)
                package = OnnxModel(leader.program, session)
                found, left_out = follow_package(package, leader, suites, self._cost, self._talk)
            self._left_out |= left_out
            return found


@contextmanager
def _package(model: OptimizedModel, target: Target) -> Iterator[Path]:
    """Give the package itself, or that beside the artifact, or one that is gone afterwards."""
    if _is_package(target):
        assert not isinstance(target, OptimizedModel), "checked"
        yield Path(target)
        return
    if not isinstance(target, OptimizedModel) and (Path(target) / "onnx" / "model.onnx").is_file():
        yield Path(target) / "onnx"
        return
    with tempfile.TemporaryDirectory() as folder:
        yield model.export_onnx(Path(folder) / "onnx", verify="none")
