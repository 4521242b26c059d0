"""What each rule of a finding means, in one line; docs/findings.md says what to do about it."""

from __future__ import annotations

from collections.abc import Mapping

RULES: Mapping[str, str] = {
    "recipe": "Recipes have other passes, or passes with other options",
    "weight-permuted": "A weight has its rows or columns in another order",
    "weight-negated": "A weight has the other sign",
    "weight-scaled": "A weight is multiplied by a factor",
    "weight-shape": "A weight has another shape",
    "weight-values": "A weight has other values",
    "rope-frequencies": "RoPE turns by other frequencies",
    "rope": "RoPE has other options",
    "window": "Attention sees another range of tokens",
    "attention-scale": "Scores of attention have another factor or another cap",
    "attention": "Attention has another option",
    "layer-owner": "A layer reads the keys and values of another layer",
    "sink": "Other first tokens stay exact, or they are lost",
    "recent": "Other last tokens stay exact, or they differ",
    "codec": "Keys or values are stored with another codec, or with other options of it",
    "dtype": "Something is computed or stored in another dtype",
    "page-order": "Full pages of the cache have changed places",
    "token-order": "Stored tokens have changed places",
    "encoded-again": "Stored tokens are encoded again by later steps",
    "positions": "New tokens have other positions",
    "scale": "Scales of codes differ",
    "zero-point": "Zero points of codes differ",
    "codes": "Codes differ, and nothing that goes with them",
    "plane": "Another stored plane differs",
    "decoder": "Equal codes are read back as other values",
    "cache-state": "The cache holds something else, in no way that is known",
    "inputs": "The model hands other keys and values to its cache",
    "reads": "Attention over an equal cache gives other outputs",
    "account": "Lengths or bytes of a cache are not what its plan says",
    "unexplained": "Results differ, and nothing else does",
    "plan": "Another field of the plan of the cache differs",
    "layout": "The cache is laid out otherwise",
    "operations": "Operations were added, removed or have other arguments",
    "operands": "An operation reads something else",
    "signature": "Inputs or outputs differ",
    "results": "Logits differ by more than rounding",
    "cost": "The cache takes more or fewer bytes",
    "rounding": "Logits differ by rounding, which is no change",
    "renamed": "Names differ, which is no change",
    "moved": "Source lines differ, which is no change",
}
"""By rule, those that say most first; see `records.Finding`."""
