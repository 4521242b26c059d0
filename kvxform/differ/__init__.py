"""The public `diff`: opens two sides, compares them, says what a reader must know.

- `comparing`: which parts of two sides are compared, and how
- `sides`: what can be compared, and how each of it is opened
- `exports`: programs against ONNX files
- `running`, `onnx_runs`, `row_caches`: both sides run on the same inputs
"""
