"""The ONNX lowering: a cached Program as a folder that stock ONNX Runtime runs.

- `export`: `export_onnx`, and the walk over the graph
- `capability`: what can be expressed, checked before work
- `emission`: state of one emission, the table of emitters
- `builder`: nodes, names, constants, initialisers
- `aten_math`, `aten_shape`, `aten_index`, `aten_nn`: emitters of aten operations
- `dialect`, `rotations`: emitters of norm, rotary embedding, rotations
- `attend`, `streams`, `ranked`, `turning`, `masks`: emitters of the cached operations
- `codecs`: encode and decode as nodes, one file a family of codecs (`codec_*`)
- `fallback`: operations without an emitter, through the exporter of torch
- `ports`: cache planes as inputs and outputs
- `weights`: how weights are stored
- `package`: the files beside the graph
"""

from kvxform.codegen.onnx.export import export_onnx

__all__ = ["export_onnx"]
