"""Codecs: how one stream of the cache is stored.

- `base`: the `Codec` interface, plane specifications, the registry
- `exact`: codec `none`, values as they are
- `integer`: codec `int`, uniform integers with scales and zero points
- `folded`: attention over codes with scales applied per query, token or step
- `packing`: codes of 2, 3, 4 and 8 bits in bytes
- `hadamard`: bases (rotations) of a stream
"""

from __future__ import annotations

from kvxform.codecs import exact as exact  # importing a codec module registers its codec
from kvxform.codecs import integer as integer
