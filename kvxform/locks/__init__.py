"""Locks: a small file that says what a build is, to be committed and checked in CI.

- `records`: `Lock`, its text, and reading it; `compact_json`: how the text is laid out
- `making`: the lock of a model; `building`: the model of a lock
- `digests`, `sketches`, `widening`: what a model computes, the same on every machine
- `contracts`: what passes promised and what was measured
- `checking`: a model against its lock, and one lock against another
"""

from __future__ import annotations
