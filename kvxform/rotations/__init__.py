"""What passes that rotate have in common.

- `keys`: q and k pass through an operation between RoPE and attention
- `values`: a basis of V folded into the projections around it
- `residual`: which weights make and read the residual stream
- `orders`: Hadamard matrices of sizes that are not powers of two
- `stiefel`: descent over orthogonal matrices
- `at_read`: bases that are undone when a stream is read
- `transform`: bases of components, and the bits of each
- `fake_quant`: a program whose K and V are rounded, with gradients
"""
