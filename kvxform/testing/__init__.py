"""Help for tests of passes, models and recipes.

- `check_pass(P)` tries any pass on seeded programs and holds it to what passes promise
- `assert_equivalent(a, b)`: two models give the same logits
- `assert_graph_snapshot(program, path)`: a graph is the one that was committed
- `assert_cache_state(model)`: a cache holds what it must, however tokens arrive
- `llama_program`, `gpt2_program`, `latent_program`: small programs without a model

The asserts are fixtures too, of the pytest plug-in (`kvxform.testing.plugin`). Importing
this package is quick: torch is imported when the first of these is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvxform.testing.cache_states import assert_cache_state
    from kvxform.testing.checking import PassCheck, check_pass, fuzz_pass
    from kvxform.testing.equivalence import assert_equivalent
    from kvxform.testing.latent import latent_program
    from kvxform.testing.programs import gpt2_program, llama_program
    from kvxform.testing.snapshots import assert_graph_snapshot

__all__ = [
    "PassCheck",
    "assert_cache_state",
    "assert_equivalent",
    "assert_graph_snapshot",
    "check_pass",
    "fuzz_pass",
    "gpt2_program",
    "latent_program",
    "llama_program",
]
_HOMES = {
    "PassCheck": "checking",
    "assert_cache_state": "cache_states",
    "assert_equivalent": "equivalence",
    "assert_graph_snapshot": "snapshots",
    "check_pass": "checking",
    "fuzz_pass": "checking",
    "gpt2_program": "programs",
    "latent_program": "latent",
    "llama_program": "programs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvxform.testing' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"kvxform.testing.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
