"""The program that an ONNX package was made from, with weights out of the package."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from kvxform.codecs.base import dtype_from_name
from kvxform.codegen.onnx.builder import TRANSPOSED
from kvxform.codegen.onnx.nbits import PARTS, Packing, packing_from_name, unpack
from kvxform.errors import ArtifactError
from kvxform.ir.artifact import PROGRAM, decode_program
from kvxform.ir.plan import CachePlan
from kvxform.ir.program import Program
from kvxform.ir.schema import ProgramFile, WeightEntry, parse_file
from kvxform.runtime.onnx_files import DESCRIPTION, REMAKE


@dataclass(frozen=True)
class Stored:
    """A weight as a file has it.

    Attributes:
        shape: Of the weight.
        dtype: Of the weight.
        sources: The constants that hold it, one but for packed weights.
        form: How they hold it: the end of their names.
        load: Returns its values.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: tuple[ir.TensorProtocol, ...]
    form: str
    load: Callable[[], Tensor]


class Initialisers(dict[str, Tensor]):
    """Constants of an ONNX file: listed they have shapes alone, looked up they have values.

    Args:
        tensors: Constants by name. A name that ends in `.T` is listed without it, and transposed.
    """

    def __init__(self, tensors: Mapping[str, ir.TensorProtocol]) -> None:
        super().__init__()
        self._stored: dict[str, Stored] = {}
        for name, tensor in tensors.items():
            self._enter(name.removesuffix(TRANSPOSED), plain_weight(name, tensor))

    def _enter(self, name: str, stored: Stored) -> None:
        self[name] = torch.empty(stored.shape, dtype=stored.dtype, device="meta")
        self._stored[name] = stored

    def __getitem__(self, name: str) -> Tensor:
        """Return a weight with its values, or with its shape alone if the file has none."""
        return self._stored[name].load() if name in self._stored else super().__getitem__(name)

    def holds(self, name: str) -> bool:
        """Whether the file has the values of a weight."""
        return name in self._stored

    def load(self) -> dict[str, Tensor]:
        """Return what the file has, by name; weights that share a constant are one tensor."""
        loaded: dict[str, Tensor] = {}
        first: dict[tuple[object, ...], str] = {}
        for name, stored in self._stored.items():
            places = tuple(id(source) for source in stored.sources)
            same = first.setdefault((stored.form, *places) if places else (name,), name)
            loaded[name] = loaded[same] if same in loaded else self[name]
        return loaded


def plain_weight(name: str, tensor: ir.TensorProtocol) -> Stored:
    """Return the weight in a constant, which is transposed if the name ends in `.T`."""
    is_turned = name.endswith(TRANSPOSED)
    sizes = tuple(tensor.shape.numpy())

    def load() -> Tensor:
        values = read_constant(tensor)
        return values.T.contiguous() if is_turned else values

    shape = sizes[::-1] if is_turned else sizes
    return Stored(
        shape,
        ir.tensor_adapters.to_torch_dtype(tensor.dtype),
        (tensor,),
        TRANSPOSED * is_turned,
        load,
    )


def packed_weight(parts: Sequence[ir.TensorProtocol], packing: Packing, like: Tensor) -> Stored:
    """Return the weight that packed parts stand for, of the shape and dtype of `like`."""
    wanted = [packing.shape(part, like) for part in PARTS]
    if [list(part.shape.numpy()) for part in parts] != wanted:
        rule = "the parts of a packed weight must have the shapes of its packing"
        raise ArtifactError("KVX602", rule, at=str(parts[0].name), hint=REMAKE)

    def load() -> Tensor:
        return unpack([read_constant(part) for part in parts], packing, like)

    return Stored(tuple(like.shape), like.dtype, tuple(parts), packing.suffix, load)


def read_constant(tensor: ir.TensorProtocol) -> Tensor:
    """Return a copy of the values of a constant."""
    dtype = ir.tensor_adapters.to_torch_dtype(tensor.dtype)
    values = np.frombuffer(bytearray(tensor.tobytes()), np.uint8)
    return torch.from_numpy(values).view(dtype).reshape(tuple(tensor.shape.numpy()))


class PackageWeights(Initialisers):
    """Weights of a program in a package; one that nothing reads may have its shape alone.

    Args:
        graph: The graph of the package.
        table: The weights of the program, and the initialiser of each.
        folded: Values of weights that are in no initialiser.

    Raises:
        ArtifactError: KVX602 if an initialiser is not what the table says.
    """

    def __init__(
        self,
        graph: ir.Graph,
        table: Mapping[str, WeightEntry],
        folded: Mapping[str, Sequence[float]],
    ) -> None:
        super().__init__({})
        for name, entry in table.items():
            like = torch.empty(entry.shape, dtype=dtype_from_name(entry.dtype), device="meta")
            self[name] = like
            if name in folded:
                values = torch.tensor(folded[name], dtype=like.dtype).reshape(like.shape)
                self._enter(name, Stored(tuple(like.shape), like.dtype, (), "", values.clone))
            stored = _find(graph, entry.stored, like)
            if stored is None:
                continue
            self._enter(name, stored)
            if (stored.shape, stored.dtype) != (tuple(like.shape), like.dtype):
                rule = "an initialiser must have the shape and dtype of its weight"
                raise ArtifactError("KVX602", rule, at=entry.stored, hint=REMAKE)


def _find(graph: ir.Graph, name: str, like: Tensor) -> Stored | None:
    """Return the weight that is stored as `name`, or None if the graph has none."""
    packing = packing_from_name(name)
    names = [name] if packing is None else [f"{name}.{part}" for part in PARTS]
    values = [graph.initializers[n].const_value for n in names if n in graph.initializers]
    tensors = [value for value in values if value is not None]
    if len(tensors) != len(names):
        return None
    return (
        plain_weight(name, tensors[0]) if packing is None else packed_weight(tensors, packing, like)
    )


def package_program(model: ir.Model, description: Mapping[str, Any]) -> Program:
    """Return the program of a package.

    Args:
        model: Its graph file.
        description: Its `kvxform.json`.

    Raises:
        ArtifactError: KVX602 if it is damaged, KVX604 if it has another version.
    """
    text = json.dumps(description.get("program"))
    file = parse_file(ProgramFile, text.encode(), f"{PROGRAM} in {DESCRIPTION}")
    try:
        plan = CachePlan.from_json(description["plan"])
        weights = PackageWeights(model.graph, file.weights, description["folded"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        rule = "a package must have a plan, and the constants that its program reads"
        raise ArtifactError("KVX602", rule, where=DESCRIPTION, hint=REMAKE) from error
    return decode_program(file, plan, weights)
