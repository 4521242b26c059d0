"""How good and how fast: measurements of any model that gives logits.

- `runners`: one interface to a source module, an OptimizedModel and an ONNX session
- `texts`: the text that models are measured on
- `perplexity`: perplexity, KL divergence and top-1 agreement, in two protocols
- `bench`: tokens per second of prefill and decode
"""
