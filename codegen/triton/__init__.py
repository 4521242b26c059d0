"""The Triton lowering: readable fused kernels over a paged, quantised cache.

- `spec`: what a kernel is generated from
- `sites`: which specs the attention sites of a program need
- `registry`: which function turns which spec into a template and its variables
- `emit`: a spec to the text of one Python file; `describe` and `formatting` are its parts
- `refusal`: KVX401 of this lowering
- `loading`: the text to a module that can be called
- `autotune`: launch parameters by timing
- `files`: the kernels of a program as files to read
- `fragment`: pages in the order in which tensor cores take them; `decode_fragment` and
  `fragment_configs`: the Gluon kernel that reads them
- `append`, `decode`, `gather`, `prefill`, `column_scores`: one module for each kind of kernel

and what runs them:

- `lowering`: TritonExecutable, a Program that can be called; `capability`: what it refuses
- `cache`: TritonCache, what the cached ops talk to; `store`: tensors of one layer
- `kernels`: the kernels of all sites; `modules`: those of one site, loaded and tuned
- `decoding`, `prefilling`: launches for one new token a row, and for more; `rotate`: q and K there
- `step`: lengths and pages that all layers of a step share
- `graphs`: decode steps from CUDA graphs; `compiled`: the rest of them through `torch.compile`
"""
