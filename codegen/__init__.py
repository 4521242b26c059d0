"""Lowerings: from a Program to something that runs.

- `eager`: torch operations on any device; defines what the others must compute
- `onnx`: a package for stock ONNX Runtime, the cache as inputs and outputs
"""
