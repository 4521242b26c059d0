"""Options of merge-kv-heads that are refused without a model."""

from __future__ import annotations

import pytest

from kvxform.errors import RecipeError
from kvxform.passes.structure.merge_kv_heads import MergeKvHeads


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({}, "heads, ratio or layers must be given"),
        ({"heads": 2, "ratio": 0.5}, "must not be given together"),
        ({"heads": 0}, "at least 1"),
        ({"layers": {"0": 0}}, "at least 1"),
        ({"ratio": 1.0}, r"ratio must lie in \(0, 1\)"),
        ({"heads": 1, "planner": "best"}, "planner must be svd or mean"),
        ({"heads": 1, "rope": "before"}, "rope must be auto, commuting, post or latent"),
        ({"heads": 1, "grouping": "random"}, "grouping must be consecutive or similar"),
        ({"heads": 1, "objective": "keys"}, "objective must be vectors or attention"),
        ({"heads": 1, "rope": "latent", "planner": "mean"}, "rope: latent must go with no other"),
        (
            {"heads": 1, "rope": "latent", "grouping": "similar"},
            "rope: latent must go with no other",
        ),
        ({"layers": {"first": 1}}, "layers must be numbers"),
    ],
)
def test_options_are_checked(options, rule):
    with pytest.raises(RecipeError, match=rf"KVX107 \[merge-kv-heads\].*{rule}"):
        MergeKvHeads(**options)
