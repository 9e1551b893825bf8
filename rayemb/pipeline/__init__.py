"""The line of rooms: one config for a whole run, one function per stage, and the demo that runs them all."""

from rayemb.pipeline.config import Artefacts, RunConfig
from rayemb.pipeline.stages import STAGES, run_stage

__all__ = ["STAGES", "Artefacts", "RunConfig", "run_stage"]
