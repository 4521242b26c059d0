"""Statistics of a source model on a text, collected once for all passes."""

from kvxform.calibrate.collecting import collect

__all__ = ["collect"]
