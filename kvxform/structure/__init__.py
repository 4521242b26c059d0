"""What passes that change the structure of a model have in common.

- `owner_map`: which layer's keys and values each layer reads
- `owner_search`: an owner map by measured distance and a test of what it does to the model
- `narrowing`: a fused projection of which only the queries are left
- `components`: orthogonal bases of joined heads, the components that matter most first
- `latent_maps`, `latent_writer`: ordinary attention as latent attention
- `windows`: pieces of the calibration text
"""
