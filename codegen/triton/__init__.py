"""The Triton lowering: readable fused kernels over a paged, quantised cache.

- `spec`: what a kernel is generated from
"""
