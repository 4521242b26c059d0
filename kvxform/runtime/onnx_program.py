"""The program that an ONNX package was made from, with weights out of the package."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from kvxform.codecs.base import dtype_from_name
from kvxform.codegen.onnx.builder import TRANSPOSED
from kvxform.errors import ArtifactError
from kvxform.ir.artifact import PROGRAM, decode_program
from kvxform.ir.plan import CachePlan
from kvxform.ir.program import Program
from kvxform.ir.schema import ProgramFile, WeightEntry, parse_file
from kvxform.runtime.onnx_files import DESCRIPTION, REMAKE


class Initialisers(dict[str, Tensor]):
    """Constants of an ONNX file: listed they have shapes alone, looked up they have values.

    Args:
        tensors: Constants by name. A name that ends in `.T` is listed without it, and transposed.
    """

    def __init__(self, tensors: Mapping[str, ir.TensorProtocol]) -> None:
        super().__init__()
        self._tensors: dict[str, tuple[ir.TensorProtocol, bool]] = {}
        for stored, tensor in tensors.items():
            self._enter(stored.removesuffix(TRANSPOSED), stored, tensor)

    def _enter(self, name: str, stored: str, tensor: ir.TensorProtocol) -> None:
        is_turned = stored.endswith(TRANSPOSED)
        sizes = tuple(tensor.shape.numpy())
        dtype = ir.tensor_adapters.to_torch_dtype(tensor.dtype)
        shape = sizes[::-1] if is_turned else sizes
        self[name] = torch.empty(shape, dtype=dtype, device="meta")
        self._tensors[name] = (tensor, is_turned)

    def __getitem__(self, name: str) -> Tensor:
        """Return a weight with its values, or with its shape alone if the file has none."""
        if name not in self._tensors:
            return super().__getitem__(name)
        tensor, is_turned = self._tensors[name]
        values = torch.from_numpy(tensor.numpy().copy())
        return values.T.contiguous() if is_turned else values

    def holds(self, name: str) -> bool:
        """Whether the file has the values of a weight."""
        return name in self._tensors

    def load(self) -> dict[str, Tensor]:
        """Return what the file has, by name; weights that share a constant are one tensor."""
        loaded: dict[str, Tensor] = {}
        first: dict[tuple[int, bool], str] = {}
        for name, (tensor, is_turned) in self._tensors.items():
            same = first.setdefault((id(tensor), is_turned), name)
            loaded[name] = loaded[same] if same in loaded else self[name]
        return loaded


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
            value = graph.initializers.get(entry.stored)
            if name in folded:
                values = torch.tensor(folded[name], dtype=like.dtype).reshape(like.shape)
                self._enter(name, name, ir.tensor_adapters.TorchTensor(values))
            if value is None or value.const_value is None:
                continue
            self._enter(name, entry.stored, value.const_value)
            listed = self.get(name, like)
            if (listed.shape, listed.dtype) != (like.shape, like.dtype):
                rule = "an initialiser must have the shape and dtype of its weight"
                raise ArtifactError("KVX602", rule, at=entry.stored, hint=REMAKE)


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
