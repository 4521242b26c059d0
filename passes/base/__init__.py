"""passes/base."""
