"""Codecs: how one stream of the cache is stored.

- `base`: the `Codec` interface, plane specifications, the registry
- `exact`: codec `none`, values as they are
- `integer`: codec `int`, uniform integers with scales and zero points
- `folded`: attention over codes with scales applied per query, token or step
- `token_norm`: codec `token-norm`, norms per token in front of another codec
- `norms`, `tables`: stored norms; codebooks kept on disk
- `outliers`: codec `outliers`, exact elements beside the codes of another codec
- `low_rank`: codec `low-rank-residual`, a low-rank correction of another codec
- `nuq`: codec `nuq`, tables of levels fitted on a calibration
- `kmeans`: weighted k-means of numbers
- `packing`: codes of 2, 3, 4 and 8 bits in bytes
- `basis`: bases (rotations) of a stream
- `hadamard`: block Hadamard transforms
"""

from __future__ import annotations

from kvxform.codecs import exact as exact  # importing a codec module registers its codec
from kvxform.codecs import integer as integer
from kvxform.codecs import low_rank as low_rank
from kvxform.codecs import nuq as nuq
from kvxform.codecs import outliers as outliers
from kvxform.codecs import token_norm as token_norm
