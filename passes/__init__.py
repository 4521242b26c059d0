"""Rewrites of a Program; one file a pass, named like it in recipes.

- `rotation.fuse_norms`: gains of norms move into the linear layers that follow
- `rotation.rotate_residual`: the residual stream is rotated inside of the weights
- `structure.cache_latent`: latent attention caches its latents instead of K and V of all heads
- `structure.merge_kv_heads`: several KV heads become one, so that fewer are cached
- `structure.share_kv_layers`: layers read the keys and values of an earlier layer
- `structure.cache_residual`: ids, or inputs of layers, in the place of keys and values
- `structure.tie_kv`: values are the keys before RoPE, and one tensor is cached
- `structure.merge_layer_pairs`: two neighbouring layers keep one direction a token and two norms
- `structure.loop_layers`: a window of layers runs several times, in damped steps
- `structure.to_latent`: ordinary attention becomes latent attention
- `structure.factor_kv`: keys and values of a layer are cached as a few features of all its heads
- `structure.cache_prerope`: keys are cached before RoPE and turned when they are read
- `rotation.rotate_v`: values are stored rotated; the rotation lives in W_v and W_o
- `rotation.spectral_rotation`: K and V in eigenbases that calibration has found
- `rotation.learn_rotation`: K and V in bases learnt on calibration tokens
- `rotation.balance_channels`: channels of K in which queries are large are stored larger
- `rotation.rotate_k_prerope`: keys before RoPE are rotated over several heads and put in order
- `rotation.rotate_qk`: queries and new keys are rotated after RoPE
- `base.insert_cache`: stateless attention becomes append and cached attention
- `memory.page_cache`: the cache lives in pages
- `quantize.quantize_kv`: keys and values are stored through codecs
- `quantize.per_layer_bits`: each layer gets the codec options that its sensitivity asks for
- `base.fuse_projections`: linear layers that read the same values become one
- `quantize.klt`: keys and values are stored as components of a calibrated basis
- `base.simplify`: rotations cancel; scales move from cached elements to query, token or step
"""

from __future__ import annotations

from kvxform.passes.base import fuse_projections as fuse_projections  # importing registers it
from kvxform.passes.base import insert_cache as insert_cache
from kvxform.passes.base import simplify as simplify
from kvxform.passes.memory import page_cache as page_cache
from kvxform.passes.quantize import klt as klt
from kvxform.passes.quantize import per_layer_bits as per_layer_bits
from kvxform.passes.quantize import quantize_kv as quantize_kv
from kvxform.passes.rotation import balance_channels as balance_channels
from kvxform.passes.rotation import fuse_norms as fuse_norms
from kvxform.passes.rotation import learn_rotation as learn_rotation
from kvxform.passes.rotation import rotate_k_prerope as rotate_k_prerope
from kvxform.passes.rotation import rotate_qk as rotate_qk
from kvxform.passes.rotation import rotate_residual as rotate_residual
from kvxform.passes.rotation import rotate_v as rotate_v
from kvxform.passes.rotation import spectral_rotation as spectral_rotation
from kvxform.passes.structure import cache_latent as cache_latent
from kvxform.passes.structure import cache_prerope as cache_prerope
from kvxform.passes.structure import cache_residual as cache_residual
from kvxform.passes.structure import factor_kv as factor_kv
from kvxform.passes.structure import loop_layers as loop_layers
from kvxform.passes.structure import merge_kv_heads as merge_kv_heads
from kvxform.passes.structure import merge_layer_pairs as merge_layer_pairs
from kvxform.passes.structure import share_kv_layers as share_kv_layers
from kvxform.passes.structure import tie_kv as tie_kv
from kvxform.passes.structure import to_latent as to_latent
