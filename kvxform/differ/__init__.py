"""The public `diff`: opens two sides, compares them, says what a reader must know.

- `sides`: what can be compared, and how each of it is opened
- `comparing`: which parts of two sides are compared, and how
- `running`: on what inputs both are run
"""
