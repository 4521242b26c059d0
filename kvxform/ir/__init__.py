"""The intermediate representation.

- `types`: dtype and shape of graph values
- `ops`: the kvx dialect, registered with torch on import
- `cache`: handles between cached ops and live caches
- `facts`: what is known of a Program
- `plan`: CachePlan and its arithmetic
- `program`: Program, AttentionSite, Projection
- `targets`: the functions a graph may call
- `text`, `parse`: print and read back
- `verify`, `verify_graph`, `verify_sites`, `verify_plan`: the verifier
- `schema`, `weights`, `artifact`: save and load
- `capture_cache`: captured programs in the user's cache folder
"""
