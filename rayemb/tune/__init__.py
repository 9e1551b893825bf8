"""Search for the right loss, temperature and margin, on Ray Tune."""

from rayemb.tune.config import TuneConfig
from rayemb.tune.errors import TuneError
from rayemb.tune.measures import Measure, Trained
from rayemb.tune.record import front, load_record
from rayemb.tune.space import Space, parse_space
from rayemb.tune.sweep import SweepResult, check_sweep, sweep

__all__ = [
    "Measure",
    "Space",
    "SweepResult",
    "Trained",
    "TuneConfig",
    "TuneError",
    "check_sweep",
    "front",
    "load_record",
    "parse_space",
    "sweep",
]
