"""The intermediate representation.

- `types`: dtype and shape of graph values
- `ops`: the kvx dialect, registered with torch on import
- `cache`: handles between cached ops and live caches
- `facts`: what is known of a Program
- `plan`: CachePlan and its arithmetic
- `program`: Program, AttentionSite, Projection
- `text`: print and parse
- `verify`: the dialect verifier
- `artifact`: save and load
"""
