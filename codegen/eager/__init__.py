"""The eager lowering: torch ops on any device; the reference of every other lowering.

- `lowering`: EagerExecutable, a Program that can be called
- `specialise`: direct torch calls in place of dialect ops
- `cache`: PagedCache, what the cached ops talk to
- `site`: K and V of one layer; `store`: pools and buffers of one stream
- `reads`: one stream as attention reads it
- `step`: lengths, pages and masks that all layers of a step share
- `flush`: when tokens become codes, and from where to where they go
- `attend`: attention over what a cache holds
- `probes`: attention that tokens get until they are ranked
- `folded_body`: reading codes without decoding them
"""
