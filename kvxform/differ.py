"""The public `diff`: opens two sides, compares them, says what a reader must know."""
