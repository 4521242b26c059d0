"""The Triton lowering: readable fused kernels over a paged, quantised cache.

- `spec`: what a kernel is generated from
- `registry`: which function turns which spec into a template and its variables
- `emit`: a spec to the text of one Python file; `describe` and `formatting` are its parts
- `loading`: the text to a module that can be called
"""
