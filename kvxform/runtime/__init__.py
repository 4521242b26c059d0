"""Running an optimised program.

- `model`: OptimizedModel, the object a user holds
- `session`: Session, a cache in use
- `generate`: the token loop
- `pages`: which page belongs to which sequence
- `inputs`: checks of ids and masks, padding
- `onnx_session`: the same for an ONNX package
"""
