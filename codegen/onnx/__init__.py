"""codegen/onnx."""
