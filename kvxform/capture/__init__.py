"""Capture: from a source model to a Program in the kvx dialect.

- `sources`, `smollm2`, `checkpoints`: open what the user names
- `exporting`, `normalise`: torch.export, then the graph contract of `ir.program`
- `structure`, `probing`: walk a graph, run parts of it, compare
- `norms`, `attention`, `masks`, `heads`, `rope`, `projections`, `positions`: recognise by values
- `sites`: raise one attention; `capturing`: the whole way
"""

from __future__ import annotations

from kvxform.capture.capturing import Captured, capture
from kvxform.capture.sources import load_source_module, open_source

__all__ = ["Captured", "capture", "load_source_module", "open_source"]
