"""codegen/eager."""
