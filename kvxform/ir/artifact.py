"""Save and load programs: JSON and safetensors, no pickle, nothing in a file can run.

A program folder holds `program.json` (sites, facts, passes, the graph as text, a table of
weights), `plan.json` and `weights.safetensors`. An artifact adds whatever the caller passes
(report, recipe, kernels, tokenizer) and `checksums.json`, the hash of every file. Files are
canonical: equal programs give equal bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

from torch import Tensor

from kvxform.atomic import atomic_folder, safe_join
from kvxform.codecs.base import dtype_name
from kvxform.errors import ArtifactError, KvxformError
from kvxform.ir.checksums import hash_file
from kvxform.ir.facts import Facts
from kvxform.ir.parse import parse_graph
from kvxform.ir.plan import CachePlan
from kvxform.ir.program import Program
from kvxform.ir.schema import (
    VERSION,
    ChecksumsFile,
    PlanFile,
    ProgramFile,
    WeightEntry,
    canonical_json,
    parse_file,
)
from kvxform.ir.text import format_graph
from kvxform.ir.verify import verify_program
from kvxform.ir.weights import read_weights, write_weights

PROGRAM, PLAN, WEIGHTS = "program.json", "plan.json", "weights.safetensors"
CHECKSUMS = "checksums.json"
WeightReader = Callable[[Path, Mapping[str, WeightEntry]], dict[str, Tensor]]
_MADE_WITH = ("kvxform", "torch", "transformers")  # their versions may change the bytes


def save_artifact(
    folder: Path, program: Program, extra_files: Mapping[str, str | bytes] | None = None
) -> None:
    """Write a whole artifact: the old folder stays until the new one is complete.

    Args:
        folder: Where to; see `atomic_folder`.
        program: What to save.
        extra_files: Content of further files by relative path; text is written as UTF-8.

    Raises:
        ArtifactError: KVX601 if `folder` holds something else, KVX603 for a path that leaves it.
    """
    with atomic_folder(folder) as temporary:
        save_program(program, temporary)
        for name, content in sorted((extra_files or {}).items()):
            path = safe_join(temporary, name)
            if path.exists() or name == CHECKSUMS:
                raise ArtifactError(
                    "KVX603", "the name of an extra file must be free", got=repr(name)
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        (temporary / CHECKSUMS).write_bytes(_make_checksums(temporary))


def load_artifact(folder: Path) -> Program:
    """Check every file of an artifact against its checksums and return the program in it.

    Raises:
        ArtifactError: KVX601 missing, KVX602 damaged, KVX603 unsafe path, KVX604 other version.
    """
    check_artifact(folder)
    return load_program(folder)


def check_artifact(folder: Path) -> None:
    """Check every file of an artifact against its checksums.

    Raises:
        ArtifactError: As for `load_artifact`.
    """
    checksums = parse_file(ChecksumsFile, _read_bytes(folder, CHECKSUMS), CHECKSUMS)
    for name in (PROGRAM, PLAN, WEIGHTS):
        if name not in checksums.files:
            raise ArtifactError("KVX602", f"the checksums must name {name}", where=CHECKSUMS)
    for name, digest in checksums.files.items():
        if hash_file(_member(folder, name)) != digest:
            raise ArtifactError(
                "KVX602",
                "a file of an artifact must be as it was saved",
                where=name,
                hint="copy the folder again or make it again",
            )


def save_program(program: Program, folder: Path) -> None:
    """Write the three files of a program into an existing folder; not atomic, see `save_artifact`.

    Tied weights are stored once. Weights on the CPU are written from where they are.
    """
    content = canonical_json(encode_program(program))
    (folder / PROGRAM).write_bytes(content)
    plan = None if program.plan is None else program.plan.to_json()
    (folder / PLAN).write_bytes(canonical_json({"version": VERSION, "plan": plan}))
    stored = {entry.stored for entry in weight_table(program.weights).values()}
    weights = {name: program.weights[name] for name in sorted(stored)}
    write_weights(weights, folder / WEIGHTS, program.store)


def load_program(folder: Path, read: WeightReader = read_weights) -> Program:
    """Read what `save_program` wrote. Weights stay on disk until they are used (mmap).

    Args:
        folder: The folder.
        read: Opens the weights of a file.

    Raises:
        ArtifactError: KVX601 missing, KVX602 damaged, KVX603 unsafe path, KVX604 other version.
    """
    file = parse_file(ProgramFile, _read_bytes(folder, PROGRAM), PROGRAM)
    plan = parse_file(PlanFile, _read_bytes(folder, PLAN), PLAN).plan
    weights = read(_member(folder, WEIGHTS), file.weights)
    return decode_program(file, plan, weights)


def encode_program(program: Program) -> dict[str, object]:
    """Return `program.json` as plain data."""
    info = dataclasses.replace(program.info, tokenizer_path=None)  # a path of this machine
    table = weight_table(program.weights)
    return {
        "version": VERSION,
        "info": dataclasses.asdict(info),
        "sites": [dataclasses.asdict(site) for site in program.sites],
        "rejected": [dataclasses.asdict(site) for site in program.rejected],
        "facts": program.facts.changed(),
        "passes": list(program.passes),
        "touched": program.touched,
        "graph": format_graph(program.graph).splitlines(),
        "weights": {name: entry.model_dump() for name, entry in table.items()},
    }


def decode_program(
    file: ProgramFile, plan: CachePlan | None, weights: dict[str, Tensor]
) -> Program:
    """Build and verify a program from its files.

    Raises:
        ArtifactError: KVX602 if the parts do not make a valid program.
    """
    text = "\n".join(file.graph) + "\n"
    program = Program(
        graph=parse_graph(text),
        weights=weights,
        sites=file.sites,
        info=file.info,
        rejected=file.rejected,
        plan=plan,
        facts=Facts(file.facts),
        passes=file.passes,
        touched=file.touched,
    )
    try:
        verify_program(program)
        is_canonical = format_graph(program.graph) == text
    except ArtifactError:
        raise
    except KvxformError as error:
        raise ArtifactError(
            "KVX602", error.rule, where=PROGRAM, got=error.got, at=error.at
        ) from error
    if not is_canonical:
        raise ArtifactError("KVX602", "a graph must be saved as it is printed", where=PROGRAM)
    return program


def weight_table(weights: Mapping[str, Tensor]) -> dict[str, WeightEntry]:
    """Return what each weight is and under which name it is stored."""
    first_name: dict[object, str] = {}
    table = {}
    for name in sorted(weights):
        tensor = weights[name]
        # Meta and empty tensors have no address; the object tells them apart.
        place = tensor.data_ptr() if not tensor.is_meta and tensor.numel() else id(tensor)
        same = (place, tensor.dtype, tensor.shape, tensor.stride())
        stored = first_name.setdefault(same, name)
        table[name] = WeightEntry(
            dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape), stored=stored
        )
    return table


def _make_checksums(folder: Path) -> bytes:
    files = {
        path.relative_to(folder).as_posix(): hash_file(path)
        for path in folder.rglob("*")
        if path.is_file()
    }
    made_with = {name: metadata.version(name) for name in _MADE_WITH}
    return canonical_json({"version": VERSION, "made_with": made_with, "files": files})


def _read_bytes(folder: Path, name: str) -> bytes:
    return _member(folder, name).read_bytes()


def _member(folder: Path, name: str) -> Path:
    path = safe_join(folder, name)
    if not path.is_file():
        raise ArtifactError(
            "KVX601", "an artifact must hold all of its files", got=f"no file {name} in {folder}"
        )
    return path
