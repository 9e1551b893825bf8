"""The line of rooms: one config for a whole run, one function per stage, recipes of them, and the demo of all."""

from rayemb.pipeline.config import Artefacts, RunConfig
from rayemb.pipeline.recipe import run_recipe
from rayemb.pipeline.stages import STAGES, run_stage

__all__ = ["STAGES", "Artefacts", "RunConfig", "run_recipe", "run_stage"]
