"""Running an optimised program.

- `model`: OptimizedModel, the object a user holds
- `session`: Session, a cache in use
- `rows`: lengths, pages and buffers of its rows: free, reorder, fork, crop
- `state`: what a session says of its rows
- `generate`: the token loop
- `pages`: which page belongs to which sequence
- `loading`: opening a saved model
- `huggingface`: a compiled model as a transformers model
- `session_cache`: a session as the cache of a transformers model
- `inputs`: checks of ids and masks, padding
- `onnx_session`: OnnxSession, the same for an ONNX package; `onnx_cache` says what its caches have
  in common: `onnx_growing`, `onnx_buffers`, `onnx_paged`
- `onnx_runtime`: what the installed ONNX Runtime must be; `onnx_engine`: a graph that it loaded
- `onnx_rows`: rows of a package as a session, for `verify`
"""
