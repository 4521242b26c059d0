"""Diff: what changed between two models, graphs or caches, at which layer, and why.

- `records`: everything that a diff says, as plain data
- `outline`: a graph reduced to what can be compared, whatever it came from
- `align`, `structure`: which node of A is which node of B, and what that makes of the rest
- `numeric`: both run on the same inputs
- `render_*`: a diff as text, JSON, Markdown, JUnit, SARIF, HTML
"""
