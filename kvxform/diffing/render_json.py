"""A diff as canonical JSON: equal diffs give equal text."""

from __future__ import annotations

import json

from kvxform.diffing.records import DiffResult
from kvxform.formats import rounded


def render_json(result: DiffResult) -> str:
    """Return a diff as JSON that `DiffResult.from_data` reads again.

    Numbers have six significant digits; infinities and NaN are the texts `inf`, `-inf`, `nan`.
    """
    data = {**result.to_data(), "is_same": result.is_same, "exit_code": result.exit_code}
    return json.dumps(rounded(data), indent=1, sort_keys=True, ensure_ascii=False)
