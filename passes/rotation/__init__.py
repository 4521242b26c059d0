"""passes/rotation."""
