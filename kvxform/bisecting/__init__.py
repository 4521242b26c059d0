"""Bisect: which pass breaks a recipe, at which site, shown by the smallest graph that shows it.

- `records`: what was found, as plain data
- `outcomes`: one pass tried on one program, and how it failed
- `stages`: the first pass of a recipe that fails
- `search`: which of many matches are at fault
- `flow`, `cutting`: part of a program as a program of its own
- `shrinking`: the smallest such part that still fails
- `changes`: what the pass changes on it, in words
- `culprits`: the matches at fault, on the whole model or on parts of it
- `anchors`: the nodes that a pass changes
- `writing`, `replaying`: a folder that shows the fault without the rest of the model
- `bisecting`: all of it, one after the other
"""
