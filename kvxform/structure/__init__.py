"""What passes that change the structure of a model have in common.

- `head_mixes`: the best linear map from t heads to one, and back
- `head_groups`: which KV heads become one
- `head_paths`: how heads are made, read off a graph and written anew
- `head_plans`, `head_merging`: how the KV heads of a layer become fewer, and the rewrite of that
- `head_latents`: KV heads that share one cached latent
- `owner_map`: which layer's keys and values each layer reads
- `owner_search`: an owner map by measured distance and a test of what it does to the model
- `narrowing`: a fused projection of which only the queries are left
- `components`: orthogonal bases of joined heads, the components that matter most first
- `latent_maps`, `latent_writer`: ordinary attention as latent attention
- `residual_input`: the input of a layer in the place of its keys and values
- `windows`: pieces of the calibration text
"""
