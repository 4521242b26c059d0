"""Where kvxform keeps what it can make again: captured programs, codebooks, kernels."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """Return the cache folder: `$KVXFORM_CACHE_DIR`, or that of the user."""
    chosen = os.environ.get("KVXFORM_CACHE_DIR")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("kvxform"))
