"""What passes that rotate have in common.

- `keys`: q and k pass through an operation between RoPE and attention
- `values`: a basis of V folded into the projections around it
- `dense`: streams in matrices of their own for each KV head
- `residual`: which weights make and read the residual stream
- `orders`: Hadamard matrices of sizes that are not powers of two
- `spectral`: bases from second moments
- `fake_quant`: a program whose K and V are rounded, with gradients
- `stiefel`: descent over orthogonal matrices
- `learning`: bases of least loss, by both
- `transform`: KLT bases of several heads, and what their channels cost
- `at_read`: bases of keys that are undone when the cache is read
"""
