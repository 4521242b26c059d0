"""The eager lowering: torch ops on any device; the reference of every other lowering.

- `lowering`: EagerExecutable, a Program that can be called
- `cache`: PagedCache, what the cached ops talk to
- `store`: pools and buffers of one stream
- `step`: lengths, slots and masks that all layers of a step share
- `attend`: attention over what a cache holds
"""
