"""What can be compared, and how each of it is opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from kvxform.api import optimize
from kvxform.capture import capture
from kvxform.differ.onnx_side import package_logits
from kvxform.diffing.numeric import Runs
from kvxform.diffing.outline import Outline
from kvxform.diffing.outline_fx import outline_program
from kvxform.diffing.outline_onnx import read_onnx
from kvxform.diffing.records import SideKind, SideSummary
from kvxform.diffing.streaming import open_streamed
from kvxform.diffing.walking import WalkingModel
from kvxform.errors import KvxformError
from kvxform.ir.artifact import CHECKSUMS, PROGRAM, load_program
from kvxform.ir.program import Program
from kvxform.locks.files import read_lock
from kvxform.locks.records import Lock, is_lock
from kvxform.runtime.loading import saved_recipe
from kvxform.runtime.model import OptimizedModel
from kvxform.runtime.onnx_files import MODEL
from kvxform.tokenizer import load_tokenizer
from kvxform.verify.protocols import ModelLike

SideLike = OptimizedModel | Program | Lock | nn.Module | ExportedProgram | str | Path
Talk = Callable[[str], None]
RECIPE_MARK = "@"


@dataclass(frozen=True)
class Side:
    """One side of a diff.

    Attributes:
        name: What the user called it.
        kind: What it is.
        outline: Its graph.
        program: Graph, sites, plan and weights; of an ONNX file without the graph; None for a lock.
        whole: What runs all of it, with its cache, or None.
        logits: What gives its logits alone, where `whole` is None, or None.
        recipe: Name of its recipe, or empty.
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
    recipe: str = ""
    lock: Lock | None = None
    folder: Path | None = None
    tokenizer_path: str | None = None

    @property
    def model(self) -> ModelLike | Runs | None:
        """What runs it, or None if nothing can."""
        return self.logits if self.whole is None else self.whole

    @property
    def summary(self) -> SideSummary:
        """What a result says of it."""
        outline = self.outline
        layers, nodes = len(outline.sites or outline.layers), outline.operations
        return SideSummary(self.name, self.kind, outline.model, self.recipe, layers, nodes)

    def exportable(self) -> Program:
        """Return its program with tied weights as one tensor, as an exporter wants it."""
        assert self.program is not None, "only locks have none"
        return self.program if self.folder is None else load_program(self.folder)

    def load_tokenizer(self) -> Any:
        """Return its tokenizer, or None."""
        return load_tokenizer(self.tokenizer_path)


def open_side(source: SideLike, *, talk: Talk) -> Side:
    """Open one side.

    Args:
        source: An `OptimizedModel`, a `Program`, a `Lock`, an `nn.Module`, an `ExportedProgram`; or
            the path of an artifact, of an ONNX package or file, of a .pt2 file or of a lock; or a
            model as `optimize` takes it, alone or as `MODEL@RECIPE`.
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
        program = capture(source, progress=talk).program
        return _program_side(program, kind, type(source).__name__)
    if isinstance(source, str | Path):
        return _named_side(str(source), talk)
    rule = "a side of a diff must be a model, a program, a lock, or the path of one"
    raise KvxformError("KVX820", rule, where="diff", got=type(source).__name__)


def _named_side(text: str, talk: Talk) -> Side:
    """Open what the user named: a folder, a file, or a model."""
    path = Path(text)
    name = path.name if path.is_absolute() else text
    if any((path / file).is_file() for file in (PROGRAM, CHECKSUMS)):
        return _artifact_side(path, name)
    if (path / MODEL).is_file() or path.suffix == ".onnx":
        return _onnx_side(path, name)
    if is_lock(path) or path.suffix == ".lock":
        return _lock_side(read_lock(path), name)
    model, mark, recipe = text.rpartition(RECIPE_MARK)
    if mark and model and not path.exists():
        optimized = optimize(model, recipe, verify="none", progress=False)
        return _model_side(optimized, name)
    return _program_side(capture(text, progress=talk).program, "module", name)


def _artifact_side(folder: Path, name: str) -> Side:
    program, recipe = open_streamed(folder), saved_recipe(folder)
    outline = outline_program(program)
    return Side(
        name,
        "artifact",
        outline,
        program,
        WalkingModel(program),
        recipe="" if recipe is None else recipe.name,
        folder=folder,
        tokenizer_path=str(folder / "tokenizer"),
    )


def _onnx_side(path: Path, name: str) -> Side:
    side, folder = read_onnx(path), path if path.is_dir() else path.parent
    logits = package_logits(folder) if side.program.plan is not None else None
    return Side(name, "onnx", side.outline, side.program, logits=logits, tokenizer_path=str(folder))


def _model_side(model: OptimizedModel, name: str) -> Side:
    program = model.program
    return Side(
        name,
        "program",
        outline_program(program),
        program,
        model,
        recipe="" if model.recipe is None else model.recipe.name,
        tokenizer_path=program.info.tokenizer_path,
    )


def _program_side(program: Program, kind: SideKind, name: str) -> Side:
    outline, path = outline_program(program), program.info.tokenizer_path
    return Side(name, kind, outline, program, WalkingModel(program), tokenizer_path=path)


def _lock_side(lock: Lock, name: str) -> Side:
    return Side(name, "lock", lock.outline, recipe=lock.recipe, lock=lock)
