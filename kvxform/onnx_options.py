"""What may be asked of an ONNX package, as plain words that recipes and the command line share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["L0", "L1", "L2", "L3", "L4", "L5"]
Provider = Literal["cpu", "cuda"]
LogitsKind = Literal["all", "last"]
WeightKind = Literal["source", "int4"]


@dataclass(frozen=True)
class OnnxOptions:
    """What the user asks of an export; None means the best that is legal.

    Attributes:
        level: Emission level; `kvxform.codegen.onnx.levels` has the table.
        opset: Version of the default domain, 18 to 25.
        provider: The execution provider that the package is made for.
        runtime: Version of ONNX Runtime that it must run in, `major.minor`.
        logits: Of all new tokens, or of the last one of each row.
        weights: As in the program, or `int4`: products by `MatMulNBits`.
    """

    level: Level | None = None
    opset: int | None = None
    provider: Provider = "cpu"
    runtime: str = "1.31"
    logits: LogitsKind = "all"
    weights: WeightKind = "source"

    def changed(self, **given: Any) -> OnnxOptions:
        """Return these options with those of `given` that are not None."""
        wanted = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(self, **wanted)
