"""Codecs: how one stream of the cache is stored.

- `base`: the `Codec` interface, plane specifications, the registry
- `exact`: codec `none`, values as they are
- `integer`: codec `int`, uniform integers with scales and zero points
- `folded`: attention over codes with scales applied per query, token or step
- `token_norm`: codec `token-norm`, norms per token in front of another codec
- `outliers`: codec `outliers`, exact elements beside the codes of another codec
- `static_int`: codec `static-int`, symmetric integers with calibrated scales
- `low_rank`: codec `low-rank-residual`, a low-rank correction of another codec
- `nuq`, `kmeans`: codec `nuq`, tables of levels fitted on a calibration
- `saliency`: codec `saliency`, two codecs for tokens that matter more and less
- `directions`: what the codecs of directions share: `lloyd_max`, `fib_vq`, `octahedral`
- `polar`: codec `polar`, blocks as a length and angles
- `fp8`: codec `fp8`, 8-bit floating point
- `klt`: codec `klt`, components of a calibrated basis with bits of their own
- `klt_trellis`, `trellis`: codec `klt-trellis`, the same with codes of a whole row at once
- `slerp_pair`: codec `slerp-pair`, keys and values of two layers as one direction and two norms
- `truncate`: codec `truncate`, the first channels of heads, joined or not, through another codec
- `lloyd_tables`, `fib_codebook`, `tables`: codebooks, and where they are kept
- `packing`, `radix`: codes of some bits, and of any number of levels, in bytes
- `basis`: bases (rotations) of a stream
- `hadamard`: block Hadamard transforms
"""

from __future__ import annotations

from kvxform.codecs import exact as exact  # importing a codec module registers its codec
from kvxform.codecs import fib_vq as fib_vq
from kvxform.codecs import fp8 as fp8
from kvxform.codecs import integer as integer
from kvxform.codecs import klt as klt
from kvxform.codecs import klt_trellis as klt_trellis
from kvxform.codecs import lloyd_max as lloyd_max
from kvxform.codecs import low_rank as low_rank
from kvxform.codecs import nuq as nuq
from kvxform.codecs import octahedral as octahedral
from kvxform.codecs import outliers as outliers
from kvxform.codecs import polar as polar
from kvxform.codecs import saliency as saliency
from kvxform.codecs import slerp_pair as slerp_pair
from kvxform.codecs import static_int as static_int
from kvxform.codecs import token_norm as token_norm
from kvxform.codecs import truncate as truncate
