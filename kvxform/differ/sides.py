"""What can be compared, and how each of it is opened.

What captures models and what reads ONNX files is imported where it is needed: it takes longer to
import than two small artifacts take to compare.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.export import ExportedProgram

from kvxform.diffing.numeric import Runs
from kvxform.diffing.outline import Outline
from kvxform.diffing.outline_fx import outline_program
from kvxform.diffing.recipes import StepData
from kvxform.diffing.records import SideKind, SideSummary
from kvxform.diffing.streaming import open_streamed
from kvxform.diffing.walking import WalkingModel
from kvxform.errors import KvxformError
from kvxform.ir.artifact import CHECKSUMS, PROGRAM, load_program
from kvxform.ir.program import Program
from kvxform.locks.files import read_lock
from kvxform.locks.records import Lock, is_lock
from kvxform.recipe import Recipe
from kvxform.runtime.loading import saved_recipe
from kvxform.runtime.model import OptimizedModel
from kvxform.runtime.onnx_files import MODEL
from kvxform.tokenizer import load_tokenizer
from kvxform.verify.protocols import ModelLike

if TYPE_CHECKING:
    from kvxform.diffing.outline_onnx import OnnxSide

SideLike = OptimizedModel | Program | Lock | nn.Module | ExportedProgram | str | Path
Talk = Callable[[str], None]
RECIPE_MARK = "@"


@dataclass(frozen=True)
class Side:
    """One side of a diff.

    Attributes:
        name: What the user called it.
        kind: What it is.
        outline: Its graph in the dialect; of an ONNX file that is no package, that of the file.
        program: The program; None for a lock and for an ONNX file that is no package.
        whole: What runs all of it, with its cache, or None.
        logits: What gives its logits alone, where `whole` is None, or None.
        onnx: The ONNX graph, if it is one.
        recipe: Name of its recipe, or empty.
        steps: Passes of its recipe, or None if they are not known.
        lock: What was read, if it is a lock.
        folder: Where its weights are read from as they are needed, or None.
        tokenizer_path: Where its tokenizer is, or None.
    """

    name: str
    kind: SideKind
    outline: Outline
    program: Program | None = None
    whole: ModelLike | None = None
    logits: Runs | None = None
    onnx: OnnxSide | None = None
    recipe: str = ""
    steps: list[StepData] | None = None
    lock: Lock | None = None
    folder: Path | None = None
    tokenizer_path: str | None = None

    @property
    def model(self) -> ModelLike | Runs | None:
        """What runs it, or None if nothing can."""
        return self.logits if self.whole is None else self.whole

    @property
    def vocab_size(self) -> int | None:
        """Number of tokens it knows, or None if it does not say."""
        if self.program is not None:
            return self.program.info.vocab_size
        return getattr(self.logits, "vocab_size", None)

    @property
    def summary(self) -> SideSummary:
        """What a result says of it."""
        outline = self.outline
        layers, nodes = len(outline.sites or outline.layers), outline.operations
        return SideSummary(self.name, self.kind, outline.model, self.recipe, layers, nodes)

    def exportable(self) -> Program:
        """Return its program with tied weights as one tensor, as an exporter wants it."""
        assert self.program is not None, "asked for by programs alone"
        if self.folder is not None:
            return load_program(self.folder)
        if self.onnx is None:
            return self.program
        from kvxform.runtime.onnx_program import Initialisers

        weights = self.program.weights
        assert isinstance(weights, Initialisers), "the weights of a package"
        return dataclasses.replace(self.program, weights=weights.load())

    def load_tokenizer(self) -> Any:
        """Return its tokenizer, or None."""
        return load_tokenizer(self.tokenizer_path)


def open_side(source: SideLike, *, runs: bool, talk: Talk) -> Side:
    """Open one side.

    Args:
        source: An `OptimizedModel`, a `Program`, a `Lock`, an `nn.Module`, an `ExportedProgram`; or
            the path of an artifact, of an ONNX package or file, of a .pt2 file or of a lock; or a
            model as `optimize` takes it, alone or as `MODEL@RECIPE`.
        runs: Whether it is to be run; ONNX files need ONNX Runtime for that.
        talk: Called with a sentence before each step.

    Raises:
        KvxformError: KVX820 if it is none of these, and whatever opening it raises.
    """
    if isinstance(source, OptimizedModel):
        return _model_side(source, type(source).__name__)
    if isinstance(source, Program):
        return _program_side(source, "program", source.info.name)
    if isinstance(source, Lock):
        return _lock_side(source, source.model)
    if isinstance(source, nn.Module | ExportedProgram):
        kind: SideKind = "module" if isinstance(source, nn.Module) else "pt2"
        return _program_side(_capture(source, talk), kind, type(source).__name__)
    if isinstance(source, str | Path):
        return _named_side(str(source), runs, talk)
    rule = "a side of a diff must be a model, a program, a lock, or the path of one"
    raise KvxformError("KVX820", rule, where="diff", got=type(source).__name__)


def _named_side(text: str, runs: bool, talk: Talk) -> Side:
    """Open what the user named: a folder, a file, or a model."""
    path = Path(text)
    name = _shown(text)
    if any((path / file).is_file() for file in (PROGRAM, CHECKSUMS)):
        return _artifact_side(path, name)
    if (path / MODEL).is_file() or path.suffix == ".onnx":
        return _onnx_side(path, name, runs)
    if is_lock(path) or path.suffix == ".lock":
        return _lock_side(read_lock(path), name)
    model, mark, recipe = text.rpartition(RECIPE_MARK)
    if mark and model and not path.exists():
        from kvxform.api import optimize

        talk(f"optimising {name}")
        return _model_side(optimize(model, recipe, verify="none", progress=False), name)
    kind: SideKind = "pt2" if path.suffix == ".pt2" else "module"
    return _program_side(_capture(text, talk), kind, name)


def _capture(source: nn.Module | ExportedProgram | str, talk: Talk) -> Program:
    from kvxform.capture import capture

    return capture(source, progress=talk).program


def _shown(text: str) -> str:
    """Return what the user typed, without the folders of absolute paths."""
    parts = text.split(RECIPE_MARK)
    return RECIPE_MARK.join(Path(p).name if Path(p).is_absolute() else p for p in parts)


def _artifact_side(folder: Path, name: str) -> Side:
    program, recipe = open_streamed(folder), saved_recipe(folder)
    return Side(
        name,
        "artifact",
        _outline(program),
        program,
        WalkingModel(program),
        recipe="" if recipe is None else recipe.name,
        steps=_steps(recipe),
        folder=folder,
        tokenizer_path=str(folder / "tokenizer"),
    )


def _onnx_side(path: Path, name: str, runs: bool) -> Side:
    from kvxform.differ.onnx_runs import file_logits, package_model
    from kvxform.diffing.outline_onnx import read_onnx

    onnx, folder = read_onnx(path), path if path.is_dir() else path.parent
    if onnx.program is None:
        logits = file_logits(path) if runs else None
        return Side(name, "onnx", onnx.outline, logits=logits, onnx=onnx)
    side = Side(
        name,
        "onnx",
        _outline(onnx.program),
        onnx.program,
        onnx=onnx,
        recipe=onnx.recipe,
        steps=onnx.steps,
        tokenizer_path=str(folder),
    )
    if not runs:
        return side
    model = package_model(onnx.program, folder)
    if _has_values(onnx.program):
        return dataclasses.replace(side, whole=model)
    return dataclasses.replace(side, logits=model.__call__)


def _has_values(program: Program) -> bool:
    """Whether the file of a package has every weight that its program reads.

    Constants that were folded on the way to ONNX are not in it.
    """
    from kvxform.runtime.onnx_program import Initialisers

    weights = program.weights
    assert isinstance(weights, Initialisers), "the weights of a package"
    used = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
    for site in program.sites:
        for basis in (site.k_basis, site.v_basis):
            used |= {name for name in (basis.weight, basis.inverse) if name is not None}
    return all(map(weights.holds, used))


def _model_side(model: OptimizedModel, name: str) -> Side:
    program = model.program
    return Side(
        name,
        "program",
        _outline(program),
        program,
        model,
        recipe="" if model.recipe is None else model.recipe.name,
        steps=_steps(model.recipe),
        tokenizer_path=program.info.tokenizer_path,
    )


def _steps(recipe: Recipe | None) -> list[StepData] | None:
    return None if recipe is None else [step.to_data() for step in recipe.passes]


def _program_side(program: Program, kind: SideKind, name: str) -> Side:
    path, model = program.info.tokenizer_path, WalkingModel(program)
    return Side(name, kind, _outline(program), program, model, tokenizer_path=path)


def _lock_side(lock: Lock, name: str) -> Side:
    return Side(name, "lock", lock.outline, recipe=lock.recipe, lock=lock)


def _outline(program: Program) -> Outline:
    """Return the outline of a program; weights that are in files are not read for it."""
    return outline_program(dataclasses.replace(program, weights=dict(program.weights)))
