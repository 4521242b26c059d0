from __future__ import annotations
import onnx_ir as ir
def write_package(model, program, folder, *, tokenizer_path, recipe):
    ir.save(model, folder/"model.onnx", external_data="model.onnx.data", size_threshold_bytes=1024)
    (folder/"kvxform.json").write_text("{}")
