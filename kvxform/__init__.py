"""kvxform: a compiler for the KV cache of decoder language models."""
