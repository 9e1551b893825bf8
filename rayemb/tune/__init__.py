"""Search for the right loss, temperature and margin, on Ray Tune."""

from rayemb.tune.config import TuneConfig
from rayemb.tune.sweep import SweepResult, TuneError, sweep

__all__ = ["SweepResult", "TuneConfig", "TuneError", "sweep"]
