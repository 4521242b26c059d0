"""passes/memory."""
