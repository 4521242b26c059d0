"""Explanations: what capture found in a model, what a pass finds in it, and why not more.

- `records`, `pass_records`: everything that is said, as plain data
- `explaining`: the question, and the whole explanation of a program
- `layers`: the part of it about one layer
- `sites`, `norms`: what the graph says of an attention
- `passes`: contracts, and what `match` says, pass by pass
- `text`, `pass_text`: for people, with layers that are alike folded
"""

from __future__ import annotations

from kvxform.explain.explaining import (
    Question,
    StepLike,
    explain_failure,
    explain_program,
    make_question,
)
from kvxform.explain.records import Explanation

__all__ = [
    "Explanation",
    "Question",
    "StepLike",
    "explain_failure",
    "explain_program",
    "make_question",
]
