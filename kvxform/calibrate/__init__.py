"""Statistics of a source model on a text, collected once for all passes."""

from kvxform.calibrate.collecting import collect
from kvxform.calibrate.sources import CalibrationLike, make_calibration

__all__ = ["CalibrationLike", "collect", "make_calibration"]
