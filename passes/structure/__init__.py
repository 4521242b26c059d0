"""passes/structure."""
