"""Verification: does a rewritten model still compute, store and read what it must?

- `probe`: probe inputs, the source model run on them, differences of logits
- `equations`: what a cache holds and a query sees, over whole sequences
- `shadow`: a second copy of a live cache, checked by the equations
- `schedules`: the ways in which tokens come into a cache and leave it
- `cache_state`: runs a schedule and compares everything a session shows
- `prober`: measures the stages of a pipeline
- `tolerances`: the one table of tolerances
- `protocols`: what a runtime must offer to be checked
"""
