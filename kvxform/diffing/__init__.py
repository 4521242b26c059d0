"""Diff: what changed between two models, graphs or caches, at which layer, and why.

- `records`: everything that a diff says, as plain data
- `outline`: a graph reduced to what can be compared, whatever it came from; `outline_fx` and
  `outline_onnx` make one, `layering` tells which layer an operation belongs to
- `align`: which operation of A is which one of B; `matching` finds out
- `structure`, `plans`, `metrics`: what differs; `pairs` compares two operations, `places` says in
  which layer, `folding` joins what many layers have in common
- `numeric`: both run on the same inputs
- `render_*`: a diff as text, JSON, Markdown, JUnit, SARIF, HTML
"""
