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
- `onnx_session`: the same for an ONNX package
"""
